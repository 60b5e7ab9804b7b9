"""How often one call waits for the device, on tensors that stand for ones that lie there."""

import pytest
import torch
from test_every_method import RUNTIMES, VARIANTS

from llava_hvp import prune
from llava_hvp.pruning.packing import pack

WAITS = {
    getattr(torch.Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"),
        *("masked_select", "unique", "bincount", "argwhere", "equal", "allclose"),
    )
} | {torch.nonzero, torch.masked_select, torch.unique, torch.bincount, torch.equal, torch.where}


class OnDevice(torch.Tensor):
    """A tensor that says when somebody waits for it; `cpu()` takes it off the device."""

    waits: list[str]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cpu:
            cls.waits.append("cpu")
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs).as_subclass(torch.Tensor)
        if cls._waits(func, args, kwargs):
            cls.waits.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)

    @staticmethod
    def _waits(func, args, kwargs):
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            # A mask on the device decides how long the result is.
            return func is torch.Tensor.__getitem__ and any(
                isinstance(part, OnDevice) and part.dtype == torch.bool for part in index
            )
        if func in (torch.repeat_interleave, torch.Tensor.repeat_interleave):
            times = args[1] if len(args) > 1 else kwargs.get("repeats", args[0])
            return isinstance(times, OnDevice) and "output_size" not in kwargs
        if func is torch.where:
            return len(args) == 1
        return func in WAITS


@pytest.fixture
def waits():
    """What waited for the device, in order."""
    OnDevice.waits = []
    yield OnDevice.waits
    del OnDevice.waits


def test_a_tensor_on_the_device_says_who_waits(waits):
    tensor = torch.arange(6.0).as_subclass(OnDevice)
    assert (tensor * 2).sum().item() == 30
    assert tensor[tensor > 3].tolist() == [4, 5]
    assert bool((tensor + 1 > 0).all())
    assert waits == ["item", "__getitem__", "tolist", "__bool__"]
    assert type(tensor.cpu() + 1) is torch.Tensor


@pytest.mark.parametrize("kind", ["llava-1.5-llama", "llava-next-llama"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_call_waits_for_the_device_once(kind, name, loaded, photos, waits):
    bundle = loaded(kind)
    pictures = [photos[0], photos[3].resize((300, 900))]
    stacks = [bundle.pixels(picture)[0] for picture in pictures]
    stacks = [stack if stack.ndim == 4 else stack[None] for stack in stacks]
    tiles = tuple(len(stack) for stack in stacks)
    pixels = torch.cat(stacks).as_subclass(OnDevice)
    rows = [bundle.ids(text)[0] for text in ("What is this?", "How many cups are there?")]
    sizes = [picture.size for picture in pictures]
    with prune(bundle.model, VARIANTS[name], runtime=RUNTIMES.get(name)) as pruned, torch.no_grad():
        packed = pack(pruned, pixels, tiles, sizes, rows, laid_out=bundle.is_next)
    assert all(isinstance(features, OnDevice) for features in packed.features)
    assert all(0 < report.kept_tokens < report.stock_tokens for report in packed.reports)
    # References read nothing: their masks are made on the CPU.
    assert waits == ([] if name in ("random", "uniform") else ["cpu"])
