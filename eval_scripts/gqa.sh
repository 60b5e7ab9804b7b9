#!/usr/bin/env bash
# GQA, balanced test-dev: questions about scenes.
exec llava-hvp eval gqa "$@"
