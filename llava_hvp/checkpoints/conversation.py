"""How a checkpoint is asked: the mark of an image, and LLaVA's template by its name."""

from __future__ import annotations

IMAGE = -200  # the mark of an image in a prompt's ids, LLaVA's IMAGE_TOKEN_INDEX
# Parts of a name in lower case, in the order in which LLaVA's chat and run_llava look for them.
TEMPLATES = (
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "vicuna_v1"),
    ("mpt", "mpt"),
)
OTHERS = "llava_v0"


def default_template(name: str) -> str:
    """The conversation template of a checkpoint that LLaVA calls `name`.

    As LLaVA's chat chooses, but for names with `v1`, where the chat takes llava_v1: LLaVA's shell
    scripts, which the published figures come from, pass vicuna_v1. The two differ in one word of
    their first sentences ("human" for "user").
    """
    found = (template for part, template in TEMPLATES if part in name.lower())
    return next(found, OTHERS)
