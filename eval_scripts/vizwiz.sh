#!/usr/bin/env bash
# VizWiz, test: the file for the server; a score for splits with --annotation-file.
exec llava-hvp eval vizwiz "$@"
