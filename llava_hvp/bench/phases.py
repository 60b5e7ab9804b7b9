"""The phases of an answer, timed on a real LLaVA model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from llava_hvp.bench.clock import Clock
from llava_hvp.bench.workload import Workload
from llava_hvp.checkpoints.geometry import Vision

if TYPE_CHECKING:
    from llava_hvp.checkpoints.checkpoint import Checkpoint

Call = Callable[..., Any]


class Bench:
    """A checkpoint and what it is given; every method is put on it and taken off again.

    Parameters
    ----------
    vision : Vision
        the shape of the model's tower
    """

    def __init__(
        self, checkpoint: Checkpoint, vision: Vision, work: Workload, clock: Clock
    ) -> None:
        self.checkpoint, self.vision, self.work, self.clock = checkpoint, vision, work, clock

    @property
    def model(self) -> Any:
        """The model."""
        return self.checkpoint.model

    @torch.inference_mode()
    def prepare(self) -> dict[str, Any]:
        """From prompts and images to what the language model gets."""
        work = self.work
        return self.checkpoint.prepare(work.ids, work.images, work.sizes)

    @torch.inference_mode()
    def prefill(self, prepared: dict[str, Any]) -> None:
        """The language model over the whole prompt."""
        self.model(**prepared, use_cache=True)

    def generate(self, new_tokens: int, first: Call | None = None) -> None:
        """A greedy answer of a fixed length; `first` is a logits processor."""
        work = self.work
        self.checkpoint.generate(
            work.ids,
            images=work.images,
            image_sizes=work.sizes,
            do_sample=False,
            use_cache=True,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            **({} if first is None else {"logits_processor": [first]}),
        )

    def time_parts(self, pruning: Any) -> dict[str, float]:
        """Seconds of the image encode (selection included) and of the prefill.

        launched : until the last kernel of the prefill was launched; as long as `prefill` where
            the device waits for the host
        """
        prepared, encode = time_encode(self.checkpoint, self.work, pruning, self.clock)
        seconds = {"encode": encode}
        started = self.clock.now()
        self.prefill(prepared)
        seconds["launched"] = self.clock.look() - started
        seconds["prefill"] = self.clock.now() - started
        return seconds

    def time_answer(self, new_tokens: int) -> dict[str, float]:
        """Seconds to the first token, and to the last."""
        at: list[float] = []

        def first(ids: Any, logits: Any) -> Any:
            if not at:
                at.append(self.clock.now())
            return logits

        started = self.clock.now()
        self.generate(new_tokens, first)
        return {"ttft": at[0] - started, "answer": self.clock.now() - started}

    def peaks(self, pruning: Any) -> dict[str, int]:
        """Peak bytes of the image encode, the prefill, and an answer of two tokens."""
        peaks = {"encode": 0}

        def measured(encode: Call) -> Call:
            def call(*args: Any, **kwargs: Any) -> Any:
                peaks["encode"] = self.clock.peak_bytes(lambda: encode(*args, **kwargs))
                return encode(*args, **kwargs)

            return call

        with _around_encode(self.checkpoint, pruning, measured):
            prepared = self.prepare()
        peaks["prefill"] = self.clock.peak_bytes(functools.partial(self.prefill, prepared))
        del prepared  # the answer makes its own
        peaks["answer"] = self.clock.peak_bytes(lambda: self.generate(2))
        return peaks


@torch.inference_mode()
def time_encode(
    checkpoint: Checkpoint, work: Workload, pruning: Any, clock: Clock
) -> tuple[dict[str, Any], float]:
    """What the language model gets, and the seconds of the image encode, selection included.

    Parameters
    ----------
    pruning : Pruning | None
        what prunes the model; None for stock
    """
    seconds = 0.0

    def timed(encode: Call) -> Call:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seconds
            started = clock.now()
            result = encode(*args, **kwargs)
            seconds += clock.now() - started
            return result

        return call

    with _around_encode(checkpoint, pruning, timed):
        prepared = checkpoint.prepare(work.ids, work.images, work.sizes)
    return prepared, seconds


@contextlib.contextmanager
def _around_encode(
    checkpoint: Checkpoint, pruning: Any, wrap: Callable[[Call], Call]
) -> Iterator[None]:
    """Wrap what encodes images: the tower, or pruned all that stands in its place."""
    owner, name = (checkpoint.stock_tower, "forward") if pruning is None else (pruning, "encode")
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        delattr(owner, name)
