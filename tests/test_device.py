"""`.cuda()` on a machine without CUDA, for commands that insist on it."""

import pytest
import torch

from llava_hvp.hosts.llava.compat.device import bridge_to_cpu
from llava_hvp.pruning.monkeypatch import MonkeyPatcher


@pytest.fixture
def on_cpu():
    patches = MonkeyPatcher()
    bridge_to_cpu(patches)
    yield
    patches.undo()


@pytest.mark.usefixtures("on_cpu")
def test_what_is_sent_to_cuda_stays():
    x = torch.arange(3)
    device = torch.device("cuda:1")
    for moved in (
        x.cuda(),
        x.cuda(0, non_blocking=True),
        x.to("cuda"),
        x.to("cuda:0"),
        x.to(device),
        x.to(device="cuda", non_blocking=True),
        torch.nn.Linear(2, 2).cuda().weight,
        torch.nn.Linear(2, 2).to("cuda").weight,
    ):
        assert moved.device.type == "cpu"


@pytest.mark.usefixtures("on_cpu")
def test_other_arguments_do_what_they_did():
    x = torch.arange(3)
    assert x.to("cuda", torch.float16).dtype == torch.float16
    assert x.to(dtype=torch.float16, device="cuda").dtype == torch.float16
    assert x.to(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert x.to("meta").device.type == "meta"
    assert torch.nn.Linear(2, 2).to("cuda", torch.float16).weight.dtype == torch.float16


def test_undone_it_is_as_before():
    before = torch.Tensor.to, torch.Tensor.cuda, torch.nn.Module.to, torch.nn.Module.cuda
    patches = MonkeyPatcher()
    bridge_to_cpu(patches)
    patches.undo()
    assert before == (
        torch.Tensor.to,
        torch.Tensor.cuda,
        torch.nn.Module.to,
        torch.nn.Module.cuda,
    )
    # Inherited by Tensor, and so again.
    assert "to" not in vars(torch.Tensor)
