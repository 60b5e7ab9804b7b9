"""Tiny complete checkpoints, made offline in seconds, for tests, examples and dry runs."""

from llava_hvp.testing.checkpoints import make_checkpoint
from llava_hvp.testing.clip import make_clip

__all__ = ["make_checkpoint", "make_clip"]
