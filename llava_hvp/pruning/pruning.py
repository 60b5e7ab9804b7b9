"""A model that is being pruned: its method, what was kept, and what encodes for it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_hvp.decoder.hooks import DecoderHooks
from llava_hvp.decoder.plan import DropPlan
from llava_hvp.encoder.text import ClipText
from llava_hvp.errors import LlavaHvpError, OptionError, PrunedStateError
from llava_hvp.given import config_for
from llava_hvp.methods.base import VisionMethod
from llava_hvp.methods.language import LanguageMethod
from llava_hvp.pruning.encoding import EncodedTiles
from llava_hvp.pruning.host import HostModel
from llava_hvp.pruning.layout import Size
from llava_hvp.pruning.reading import ReadsPrompts
from llava_hvp.pruning.report import ImageReport
from llava_hvp.pruning.reuse import RecentlyEncoded, weights_version
from llava_hvp.pruning.shrunk import Shrunk
from llava_hvp.pruning.vision_inputs import HostInputs
from llava_hvp.runtime import PruningConfig, Runtime

# Held while a model is looked at and changed, so that of two threads one comes first.
CHANGING = threading.RLock()


class Pruning(ReadsPrompts):
    """A model being pruned; what `prune` returns.

    Ends with `unprune(model)`, or at the end of its `with` block.

    Attributes
    ----------
    reuse : bool
        set it to True, and an image that comes again is encoded only once, as in LLaVA's own chat
        and worker. For several questions about one picture, as long as the vision tower's weights
        do not change through `.data`. Without effect where gradients are wanted, where the method
        reads the prompt, and where the weights are partitioned (ZeRO-3, FSDP).
    on_record : Callable[[list[ImageReport]], None] | None
        called with the reports of each call, from the thread that made it; where a method prunes
        inside the language model, once the prompt has run there
    on_refused : Callable[[LlavaHvpError], None] | None
        called with what a call was refused for, on transformers' own classes
    hooks : DecoderHooks | None
        on the language model, once a method has pruned inside it
    """

    def __init__(
        self,
        host_model: HostModel,
        tokenizer: Any = None,
        clip_text: str | Path | ClipText | None = None,
    ) -> None:
        self.host_model = host_model
        self.tokenizer = tokenizer
        self.reuse = False
        self.on_record: Callable[[list[ImageReport]], None] | None = None
        self.on_refused: Callable[[LlavaHvpError], None] | None = None
        self._recently = RecentlyEncoded()
        self.clip_text = clip_text
        self.hooks: DecoderHooks | None = None
        self._newest: list[ImageReport] = []

    @property
    def model(self) -> Any:
        """The model, as the host has it."""
        return self.host_model.model

    @property
    def method(self) -> VisionMethod:
        """The method in force, in this thread."""
        return self.config.method

    @property
    def inside(self) -> LanguageMethod | None:
        """The method inside the language model, if there is one in force."""
        return self.config.inside

    @property
    def runtime(self) -> Runtime:
        """How the method is run."""
        return self.config.runtime

    @property
    def config(self) -> PruningConfig:
        """Methods and running together, as they are in force in this thread."""
        return self.host_model.encoder.prune_switch.now

    @contextlib.contextmanager
    def using(
        self, method: Any, inside: LanguageMethod | str | None = None, **options: Any
    ) -> Iterator[Pruning]:
        """Prune by another method inside the block, or by none.

        `with pruned.using(HiPrune(num_tokens=64)):`, by name `using("hiprune", num_tokens=64)`,
        unpruned `using(None)`. It counts for the thread, or asynchronous task, that entered the
        block; all others, and threads that are started inside it, have the model's own method.
        Blocks nest. How the model runs (`runtime`) stays as it is.

        Parameters
        ----------
        method : Method | str | Mapping | tuple | None
            the method, its name, `{"method": name, **options}`, or both methods as a pair
        inside : LanguageMethod | str | None
            a second method, inside the language model
        **options : Any
            of a method that is given by name

        Raises
        ------
        LlavaHvpError
            an unknown method or option, or one that cannot run on this model; nothing has changed.
            At the end of the block: it was left in another thread or task than it was entered in
        """
        self._check_on()
        config = config_for(self.runtime, method, inside, options)
        self._check(config)
        switch = self.host_model.encoder.prune_switch
        with switch.using(config):
            self.load_text()
            yield self

    def take_budget(self, r_max: float) -> None:
        """Go on by the same method with another budget, outside of blocks and in all threads.

        Parameters
        ----------
        r_max : float
            as of a method

        Raises
        ------
        LlavaHvpError
            one out of range, or that this model cannot be pruned by; nothing has changed
        """
        self._check_on()
        switch = self.host_model.encoder.prune_switch
        method = dataclasses.replace(switch.own.method, r_max=r_max, num_tokens=None)
        config = dataclasses.replace(switch.own, method=method)
        self._check(config)
        switch.own = config

    def _check_on(self) -> None:
        """Raise PrunedStateError where this pruning is over."""
        if self.model.__dict__.get("llava_hvp") is not self:
            raise PrunedStateError(
                "this model is not pruned any more, or anew: prune(model, method) gives what has "
                "`using`"
            )

    def _check(self, config: PruningConfig) -> None:
        """Raise a LlavaHvpError unless a block or a call of this model can be pruned so."""
        encoder = self.host_model.encoder
        own = encoder.prune_switch.own
        if own.runtime.tower_dtype == "model" and config.method.keeps_all != own.method.keeps_all:
            raise OptionError(
                f"{config} for a block or a call, on a model pruned by {own}: its vision tower "
                "cannot be in stock's dtype for one and in the model's for the other: leave "
                "tower_dtype out"
            )
        encoder.check(config.method)
        encoder.check_tower(config)
        if config.inside is not None:
            self.plan_of(config.inside)

    def plan_of(self, inside: LanguageMethod) -> DropPlan:
        """What a method drops inside the language model, with the hooks in place.

        Raises a LlavaHvpError where this language model cannot be pruned so.
        """
        if self.hooks is not None:
            return self.hooks.plan(inside)
        with CHANGING:
            hooks = self.hooks or self.host_model.decoder_hooks()
            try:
                plan = hooks.plan(inside)
            except BaseException:
                if self.hooks is None:
                    hooks.remove()
                raise
            self.hooks = hooks
        return plan

    @property
    def drop_plan(self) -> DropPlan | None:
        """What is dropped inside the language model, by the method in force in this thread."""
        return None if self.inside is None else self.plan_of(self.inside)

    @property
    def last(self) -> list[ImageReport]:
        """A report for each image of this thread's newest call; of any thread's if it made none."""
        owner, reports = _LAST.get() or (None, [])
        return reports if owner is not None and owner() is self else self._newest

    def record(self, reports: Iterable[ImageReport]) -> None:
        """Make these the newest reports."""
        self._newest = list(reports)
        _LAST.set((weakref.ref(self), self._newest))
        if self.on_record is not None:
            self.on_record(self._newest)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Whoever listens hears of what is refused inside the block."""
        try:
            yield
        except LlavaHvpError as error:
            if self.on_refused is not None:
                self.on_refused(error)
            raise

    def __getstate__(self) -> dict[str, Any]:
        # Who listens belongs to this process, and the reports are of its calls.
        return {**vars(self), "on_record": None, "on_refused": None, "_newest": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Pruning:
        # In the same process a copy is listened to as well.
        copied = memo[id(self)] = Pruning.__new__(Pruning)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def _repr_html_(self) -> str:
        from llava_hvp.show.notebook import html_of_all

        return html_of_all(self.last)

    def encode(
        self,
        pixels: Tensor,
        tiles: tuple[int, ...],
        rows: list[Tensor] | None,
        sizes: Sequence[Size | None] | None = None,
        laid_out: bool = False,
        shrunk: Sequence[Shrunk | None] = (),
    ) -> EncodedTiles:
        """Encode and select, or find what was made of the same pixels a short while ago.

        Parameters
        ----------
        pixels : Tensor
            (T, 3, H, W)
        tiles : tuple[int, ...]
            tiles of each image, T in all
        rows : list[Tensor] | None
            token ids of each row of the batch, without padding
        sizes : Sequence[Size | None] | None
            (width, height) of each image in pixels where known
        laid_out : bool
            whether the host lays tiles out by its config; else each image is one bare tile
        shrunk : Sequence[Shrunk | None]
            of each image whose mosaic the host shrinks, how; empty where it shrinks none
        """
        encoder = self.host_model.encoder
        needs = encoder.plan().needs
        inputs = self._inputs(tiles, sizes or [None] * len(tiles), rows, laid_out)
        if any(shrunk):
            inputs = dataclasses.replace(inputs, shrunk=tuple(shrunk))
        reads_prompt = needs.relevance is not None or needs.words
        if not self.reuse or torch.is_grad_enabled() or reads_prompt:
            return encoder.encode(pixels, tiles, inputs)
        made_by = weights_version(encoder, self.host_model.projector if needs.projected else None)
        if made_by is None:
            return encoder.encode(pixels, tiles, inputs)
        encoded = self._recently.find(pixels, tiles, inputs, made_by)
        if encoded is None:
            encoded = encoder.encode(pixels, tiles, inputs)
            self._recently.add(pixels, tiles, inputs, made_by, encoded)
        return encoded

    def _inputs(
        self,
        tiles: tuple[int, ...],
        sizes: Sequence[Size | None],
        rows: list[Tensor] | None,
        laid_out: bool,
    ) -> HostInputs:
        """What the method reads besides the tower, and no more."""
        host, needs = self.host_model, self.host_model.encoder.plan().needs
        images = list(zip(tiles, sizes, strict=True))
        mosaics, padding = None, None
        if needs.mosaics:
            mosaics = tuple(host.mosaic(*image) if laid_out else None for image in images)
        if needs.padding:
            padding = torch.cat([host.padding(size).expand(count, -1) for count, size in images])
        return HostInputs(
            self.relevance(tiles, rows),
            host.project if needs.projected else None,
            self._words(len(tiles), rows) if needs.words else None,
            mosaics,
            padding,
        )

    def __enter__(self) -> Pruning:
        return self

    def __exit__(self, *exception: object) -> None:
        self.take_back()

    def take_back(self) -> None:
        """Unprune the model, unless this is over and another pruning in force."""
        with CHANGING:
            if self.model.__dict__.get("llava_hvp") is self:
                self.host_model.detach()

    def with_text(self) -> Pruning:
        """Itself once its text is loaded; where that fails, the model is as it was."""
        try:
            self.load_text()
        except BaseException:
            self.take_back()
            raise
        return self


_LAST: ContextVar[tuple[weakref.ref[Pruning], list[ImageReport]] | None] = ContextVar(
    "llava_hvp_last", default=None
)
