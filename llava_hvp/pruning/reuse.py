"""An image that comes again, as at every turn of a chat, is not encoded again.

Pays where one picture is asked about several times and the tower stays as it is. To look for a
picture waits for the device, so that it is off where nobody asked for it.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llava_hvp.encoder.capture import only_reads
from llava_hvp.encoder.partitioned import is_partitioned
from llava_hvp.pruning.encoding import EncodedTiles, PrunedEncoder
from llava_hvp.pruning.vision_inputs import HostInputs

ENTRIES = 8  # a worker serves several chats in turn
BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Entry:
    pixels: Tensor
    tiles: tuple[int, ...]
    inputs: HostInputs
    made_by: Any
    encoded: EncodedTiles

    @property
    def bytes(self) -> int:
        mix, extra = self.encoded.selection.mix, self.encoded.extra
        held = (self.pixels, self.encoded.features, extra, None if mix is None else mix.added)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


class RecentlyEncoded:
    """The newest encodings, found again by their pixels. Several threads may ask.

    Holds up to 8 calls and 64 MiB, on the device.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: deque[_Entry] = deque(maxlen=ENTRIES)

    def __reduce__(self) -> tuple[type[RecentlyEncoded], tuple[()]]:
        # A copied or loaded model begins with none.
        return RecentlyEncoded, ()

    def find(
        self, pixels: Tensor, tiles: tuple[int, ...], inputs: HostInputs, made_by: Any
    ) -> EncodedTiles | None:
        """The encoding of equal pixels by an encoder of the same version; None if new."""
        with self._lock:
            alike = [
                entry
                for entry in self._entries
                if _alike(entry, pixels, tiles, inputs) and entry.made_by == made_by
            ]
        if not alike:
            return None
        # One transfer from the device for all of them.
        equal = torch.stack([(entry.pixels == pixels).all() for entry in alike]).tolist()
        found = next((e.encoded for e, same in zip(alike, equal, strict=True) if same), None)
        return None if found is None else replace(found, reused=True)

    def add(
        self,
        pixels: Tensor,
        tiles: tuple[int, ...],
        inputs: HostInputs,
        made_by: Any,
        encoded: EncodedTiles,
    ) -> None:
        """Remember an encoding; the oldest give way."""
        # A clone: the caller may fill the same memory with the next image.
        entry = _Entry(pixels.clone(), tiles, inputs, made_by, encoded)
        with self._lock:
            self._entries.append(entry)
            while sum(e.bytes for e in self._entries) > BYTES:
                self._entries.popleft()


def _alike(entry: _Entry, pixels: Tensor, tiles: tuple[int, ...], inputs: HostInputs) -> bool:
    mine, padding = entry.pixels, entry.inputs.padding
    # Equal pixels can be cut from pictures of other sizes.
    padded_alike = (
        padding is inputs.padding
        if padding is None or inputs.padding is None
        else torch.equal(padding, inputs.padding)
    )
    return (
        entry.tiles == tiles
        and entry.inputs.mosaics == inputs.mosaics
        and entry.inputs.shrunk == inputs.shrunk
        and padded_alike
        and mine.shape == pixels.shape
        and mine.dtype == pixels.dtype
        and mine.device == pixels.device
    )


def weights_version(encoder: PrunedEncoder, projector: nn.Module | None = None) -> Any:
    """Changes when the encoder does; None where its encodings must not be used again.

    Parameters
    ----------
    projector : nn.Module | None
        looked at too, where the method reads what it gives

    Sees another method, layer, module or hook, and weights that were loaded, moved, exchanged or
    changed by an optimiser. What changes through a parameter's `.data` in place leaves no trace: to
    find out, all weights would have to be read at each image.
    """
    # All of what is in force: an image that another method inside gets counts as one of its own.
    made_by: list[Any] = [encoder.prune_switch.now, encoder.hidden_state_index]
    read = (encoder.vit,) if projector is None else (encoder.vit, projector)
    for module in itertools.chain.from_iterable(part.modules() for part in read):
        # Numbers of hooks are given once only.
        made_by += (id(module), *module._forward_pre_hooks)
        made_by += (n for n, hook in module._forward_hooks.items() if not only_reads(hook))
        made_by.append(id(vars(module).get("forward")))
        for weight in module._parameters.values():
            if weight is None:
                continue
            # Inference tensors keep no count of their changes. Partitioned weights are gathered by
            # all ranks together at each run of the tower: none of them may leave one out.
            if weight.is_inference() or is_partitioned(weight):
                return None
            made_by += (weight.data_ptr(), weight._version)
    return made_by
