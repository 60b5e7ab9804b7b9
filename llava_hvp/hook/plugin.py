"""The entry point `llava.plugins`, for a LLaVA checkout with patches/0001 instead of the hook.

Where the hook runs as well, it comes first and all of this finds its work done.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import llava_hvp_startup as startup

from llava_hvp import config
from llava_hvp.config import Request
from llava_hvp.hook import session


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add our flags to the parser of a LLaVA command."""
    config.add_flags(parser, device=startup.llava_command() in startup.EVALUATING)


def configure(args: argparse.Namespace) -> None:
    """Do what the parsed flags and the environment ask for."""

    def begin() -> None:
        request = config.requested(args)
        if startup.llava_command() not in startup.EVALUATING:
            request = dataclasses.replace(request, device=None)  # the command's own flag
        session.begin_parsed(request)

    _or_exit(begin)


def before_load() -> None:
    """LLaVA's `load_pretrained_model` begins; by now no flags means none were given."""
    _or_exit(lambda: session.begin_parsed(Request()).before_load())


def after_load(tokenizer: Any, model: Any) -> None:
    """LLaVA's `load_pretrained_model` is about to return."""
    _or_exit(lambda: session.begin_parsed(Request()).after_load(tokenizer, model))


def _or_exit(step: Any) -> None:
    try:
        step()
    except Exception as error:
        sys.exit(session.refuse(error))
