#!/usr/bin/env bash
# ScienceQA, test: multiple choice with and without a picture.
exec llava-hvp eval scienceqa "$@"
