#!/usr/bin/env bash
# MMBench, dev: multiple choice; with the table for the server.
exec llava-hvp eval mmbench "$@"
