"""Which releases of transformers have the classes that are pruned here, and which is here."""

from __future__ import annotations

from llava_hvp.errors import UnsupportedVersionError
from llava_hvp.version import release_of, version_of

OLDEST, NEWEST = (4, 57), (6, 0)  # the second excluded
TESTED = "4.57.6 and 5.23.0"


def release() -> tuple[int, int]:
    """(major, minor) of the installed transformers; (0, 0) where there is none."""
    return release_of(version_of("transformers"))


def check_release() -> None:
    """Raise UnsupportedVersionError unless this transformers is one that we know."""
    if not OLDEST <= release() < NEWEST:
        raise UnsupportedVersionError(
            f"found transformers {version_of('transformers')}; its own LLaVA classes are pruned "
            f"with transformers >= 4.57, < 6 (tested: {TESTED}). On an older one use haotian-liu's "
            "llava, whose load_pretrained_model loads the liuhaotian checkpoints"
        )
