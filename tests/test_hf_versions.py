"""transformers' own LLaVA on a release that is too old: refused, with the oldest that is not."""

import pytest
from torch import nn

from llava_hvp import HIVTP, prune
from llava_hvp.errors import UnsupportedVersionError
from llava_hvp.hosts.hf import versions


class LlavaForConditionalGeneration(nn.Module):
    """Found by its name; nothing of it is read."""


def test_a_release_that_is_too_old_is_refused(monkeypatch):
    if versions.release() >= versions.OLDEST:
        versions.check_release()
        monkeypatch.setattr(versions, "version_of", lambda name: "4.56.2")
    model = LlavaForConditionalGeneration()
    with pytest.raises(UnsupportedVersionError, match=r">= 4\.57, < 6.*load_pretrained_model"):
        prune(model, HIVTP(r_max=0.5))
    assert "llava_hvp" not in vars(model)


def test_the_next_major_release_is_refused(monkeypatch):
    monkeypatch.setattr(versions, "version_of", lambda name: "6.0.0")
    with pytest.raises(UnsupportedVersionError):
        prune(LlavaForConditionalGeneration(), HIVTP(r_max=0.5))
