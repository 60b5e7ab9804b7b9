"""A trained LLaVA small enough to ship, and the drawn pictures it answers questions about."""

from llava_hvp.shapes.weights import CHECKPOINTS, checkpoint, list_checkpoints

__all__ = ["CHECKPOINTS", "checkpoint", "list_checkpoints"]
