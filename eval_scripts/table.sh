#!/usr/bin/env bash
# A whole table of a paper: table.sh hivtp-1 --model-path … --data … --gpus 0,1,2,3 [--dry-run]
exec llava-hvp reproduce "$@"
