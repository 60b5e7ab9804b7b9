#!/usr/bin/env bash
# MME: perception and cognition, yes or no, two questions a picture.
exec llava-hvp eval mme "$@"
