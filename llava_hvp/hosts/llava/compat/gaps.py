"""Which gaps between the installed LLaVA and transformers are bridged here, in words."""

from __future__ import annotations

from llava_hvp.hosts.llava.compat.history import chat_forgets
from llava_hvp.hosts.llava.compat.loading import DTYPE_SINCE
from llava_hvp.hosts.llava.compat.versions import transformers_version


def bridged_here() -> list[str]:
    """A line for each gap that these versions have."""
    version = transformers_version()
    gaps = [
        ((4, 38) <= version < (5, 0), "generate passes cache_position, which LLaVA does not take"),
        (version >= (4, 46), "load_4bit and load_8bit pass flags beside their config"),
        (version >= DTYPE_SINCE, "torch_dtype is called dtype"),
        (version >= (5, 0), "a v1.6 tower is loaded inside the model's own load"),
        (version >= (4, 46), "the trainer's names and arguments have moved"),
        (chat_forgets(), "the chat of PyPI's llava-torch loses its history"),
    ]
    return [text for here, text in gaps if here]
