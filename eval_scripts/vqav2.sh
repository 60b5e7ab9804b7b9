#!/usr/bin/env bash
# VQAv2, test-dev: the file for the server; a score for splits with --annotation-file.
exec llava-hvp eval vqav2 "$@"
