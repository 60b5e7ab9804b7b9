"""LLaVA on transformers releases that it was not written for: every gap, and its bridge."""

from llava_hvp.hosts.llava.compat.generation import (
    bridge,
    bridged,
    instance_bridges,
    new_cache,
    unbridge,
)
from llava_hvp.hosts.llava.compat.loading import bridge_loading
from llava_hvp.hosts.llava.compat.versions import (
    check_versions,
    found_versions,
    llava_models,
    transformers_version,
)

__all__ = [
    "bridge",
    "bridge_loading",
    "bridged",
    "check_versions",
    "found_versions",
    "instance_bridges",
    "llava_models",
    "new_cache",
    "transformers_version",
    "unbridge",
]
