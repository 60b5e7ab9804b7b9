#!/usr/bin/env bash
# TextVQA, validation: reading text in pictures; OCR tokens in the prompts for LLaVA-1.5 only.
exec llava-hvp eval textvqa "$@"
