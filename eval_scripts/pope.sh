#!/usr/bin/env bash
# POPE: does the model see things that are not there? F1, mean of three categories.
exec llava-hvp eval pope "$@"
