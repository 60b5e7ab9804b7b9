#!/usr/bin/env bash
# MMBench-CN, dev: the same in Chinese.
exec llava-hvp eval mmbench_cn "$@"
