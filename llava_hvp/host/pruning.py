"""Putting a method on a model, and taking it off again."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from llava.model.llava_arch import LlavaMetaForCausalLM
from torch import Tensor, nn

from llava_hvp.encoder.text import ClipText, relevance
from llava_hvp.errors import PrunedStateError, TextEncoderError, UnsupportedModelError
from llava_hvp.host import arch, compat
from llava_hvp.host.prompt import read_prompt, rows_of_images
from llava_hvp.host.reuse import RecentlyEncoded, stamp
from llava_hvp.host.tower import Encoded, PrunedCLIPVisionTower, Relevance
from llava_hvp.methods.base import Method
from llava_hvp.report import ImageReport

OVERRIDES: tuple[Callable[..., Any], ...] = (
    arch.encode_images,
    arch.prepare_inputs_labels_for_multimodal,
)


# Held while a model is looked at and changed, so that of two threads one comes first.
_CHANGING = threading.RLock()


class Pruning:
    """A model being pruned; what `prune` returns.

    Ends with `unprune(model)`, or at the end of its `with` block.

    reuse : set it to True, and an image that comes again is encoded only once, as in LLaVA's own
        chat and worker. For several questions about one picture, as long as the vision tower's
        weights do not change through `.data`. Without effect where gradients are wanted, where the
        method reads the prompt, and where the weights are partitioned (ZeRO-3, FSDP).
    on_record : called with the reports of each call, from the thread that made it
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, clip_text: ClipText | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.reuse = False
        self.on_record: Callable[[list[ImageReport]], None] | None = None
        self._recently = RecentlyEncoded()
        self.clip_text = clip_text
        self._newest: list[ImageReport] = []

    @property
    def method(self) -> Method:
        """The method in force."""
        return self.model.get_vision_tower().prune_method

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

    def __getstate__(self) -> dict[str, Any]:
        # Who listens belongs to this process, and the reports are of its calls.
        return {**vars(self), "on_record": None, "_newest": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Pruning:
        # In the same process a copy is listened to as well.
        copied = memo[id(self)] = Pruning.__new__(Pruning)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def _repr_html_(self) -> str:
        from llava_hvp.show.notebook import html_of_all

        return html_of_all(self.last)

    def encode(self, pixels: Tensor, tiles: tuple[int, ...], rows: list[Tensor] | None) -> Encoded:
        """Encode and select, or find what was made of the same pixels a short while ago.

        Parameters
        ----------
        pixels : (T, 3, H, W)
        tiles : tiles of each image, T in all
        rows : token ids of each row of the batch, without padding
        """
        tower = self.model.get_vision_tower()
        relevance = self.relevance(tiles, rows)
        if not self.reuse or torch.is_grad_enabled() or tower.reading().needs.relevance:
            return tower.encode(pixels, tiles, relevance)
        made_by = stamp(tower)
        if made_by is None:
            return tower.encode(pixels, tiles, relevance)
        encoded = self._recently.find(pixels, tiles, made_by)
        if encoded is None:
            encoded = tower.encode(pixels, tiles, relevance)
            self._recently.add(pixels, tiles, made_by, encoded)
        return encoded

    def __enter__(self) -> Pruning:
        return self

    def __exit__(self, *exception: object) -> None:
        self.take_back()

    def take_back(self) -> None:
        """Unprune the model, unless this is over and another pruning in force."""
        with _CHANGING:
            if self.model.__dict__.get("llava_hvp") is self:
                detach(self.model)

    def load_text(self) -> None:
        """Load what a prompt-aware method reads the prompt with; raises TextEncoderError."""
        tower = self.model.get_vision_tower()
        text = tower.reading().needs.relevance
        if text is not None and self.tokenizer is None:
            self.tokenizer = _tokenizer_of(self.model)
        if text == "clip" and self.clip_text is None:
            self.clip_text = ClipText.load(tower.vision_tower_name)

    def relevance(self, tiles: tuple[int, ...], rows: list[Tensor] | None) -> Relevance | None:
        """The function of patch features that a prompt-aware method needs; None for others.

        Parameters
        ----------
        tiles : tiles of each image
        rows : token ids of each row of the batch, without padding
        """
        tower = self.model.get_vision_tower()
        if tower.reading().needs.relevance is None or rows is None:
            return None
        self.load_text()
        prompts = [read_prompt(row, self.tokenizer) for row in rows_of_images(rows, len(tiles))]
        repeats = torch.tensor(tiles)

        def of_features(features: Tensor) -> Tensor:
            if self.clip_text is not None:
                clip = self.clip_text.to(features.device)
                patches = clip.patches(tower.vision_tower, features)
                texts = torch.stack([clip.embed(prompt) for prompt in prompts])
            else:
                patches = self.model.get_model().mm_projector(features)
                texts = torch.stack([self._mean_embedding(prompt) for prompt in prompts])
            texts = texts.to(patches.device)
            return relevance(patches, texts.repeat_interleave(repeats.to(texts.device), 0))

        return of_features

    def _mean_embedding(self, prompt: str) -> Tensor:
        """(D,) float32, mean of the language model's input embeddings of the prompt."""
        ids = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        embed = self.model.get_model().embed_tokens
        return embed(ids.to(embed.weight.device))[0].float().mean(0)


_LAST: ContextVar[tuple[weakref.ref[Pruning], list[ImageReport]] | None] = ContextVar(
    "llava_hvp_last", default=None
)


def attach(
    model: Any, method: Method, *, tokenizer: Any = None, clip_text: ClipText | None = None
) -> Pruning:
    """See `llava_hvp.prune`.

    clip_text : instead of the one in the tower's own checkpoint
    """
    if not isinstance(method, Method):
        raise UnsupportedModelError(
            f"{method!r} is no Method: give one, as HIVTP(r_max=0.5) or get_method('hivtp')"
        )
    model = find_llava(model)
    with _CHANGING:
        PrunedCLIPVisionTower.adopt(_unpruned_tower(model), method)
        pruning = bind(model, tokenizer, clip_text)
    try:
        pruning.load_text()
    except BaseException:
        pruning.take_back()
        raise
    return pruning


def _unpruned_tower(model: Any) -> Any:
    """The vision tower of a model that nobody prunes; raises a LlavaHvpError where that is not."""
    tower = model.get_vision_tower()
    if tower is None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no vision tower: load a LLaVA checkpoint"
        )
    if "llava_hvp" in model.__dict__ or isinstance(tower, PrunedCLIPVisionTower):
        raise PrunedStateError(
            "this model is pruned already: unprune(model) first, or leave its `with` block"
        )
    patched = [f.__name__ for f in OVERRIDES if f.__name__ in model.__dict__]
    if patched:
        raise PrunedStateError(
            f"{', '.join(patched)} of this model is patched by something else: undo that first"
        )
    return tower


def bind(model: Any, tokenizer: Any = None, clip_text: ClipText | None = None) -> Pruning:
    """Give one model the overrides; its tower decides what they do."""
    pruning = Pruning(model, tokenizer, clip_text)
    model.llava_hvp = pruning
    for override in (*OVERRIDES, *compat.instance_bridges()):
        # No MethodType: one of those is pickled by its name, and loaded as the stock method.
        setattr(model, override.__name__, functools.partial(override, model))
    return pruning


def check_bound(model: Any) -> Pruning:
    """The pruning of a model that was loaded after `builder.install`.

    Raises UnsupportedModelError if it would run unpruned.
    """
    model = find_llava(model)
    tower = model.get_vision_tower()
    if "llava_hvp" not in model.__dict__ or not isinstance(tower, PrunedCLIPVisionTower):
        raise UnsupportedModelError(
            f"this {type(model).__name__} with a {type(tower).__name__} was not built by LLaVA's "
            "own builder, and would not be pruned: call prune(model, method) on it instead"
        )
    if not tower.is_loaded:
        raise UnsupportedModelError(
            "LLaVA's loader left the vision tower unloaded, as it does for names without `llava` "
            "in them: rename the checkpoint's folder, or call the tower's load_model()"
        )
    return model.llava_hvp


def detach(model: Any) -> None:
    """See `llava_hvp.unprune`."""
    model = find_llava(model)
    with _CHANGING:
        if "llava_hvp" not in model.__dict__:
            raise PrunedStateError("this model is not pruned: nothing to undo")
        for override in (*OVERRIDES, *compat.instance_bridges()):
            model.__dict__.pop(override.__name__, None)
        del model.__dict__["llava_hvp"]
        tower = model.get_vision_tower()
        if isinstance(tower, PrunedCLIPVisionTower):
            tower.release()


def find_llava(model: Any) -> Any:
    """The LLaVA model in what the user holds: itself, or inside a wrapper (PEFT, DDP).

    Raises UnsupportedModelError where there is none.
    """
    if isinstance(model, LlavaMetaForCausalLM):
        return model
    modules = model.modules() if isinstance(model, nn.Module) else ()
    for module in modules:
        if isinstance(module, LlavaMetaForCausalLM):
            return module
    raise UnsupportedModelError(
        f"{type(model).__name__} is not a LLaVA model: give what llava.model.builder."
        "load_pretrained_model returns (transformers' own LlavaForConditionalGeneration is another "
        "implementation)"
    )


def _tokenizer_of(model: Any) -> Any:
    from transformers import AutoTokenizer

    checkpoint = model.config._name_or_path
    try:
        return AutoTokenizer.from_pretrained(checkpoint, use_fast=False)
    except Exception as error:  # hub, file format, missing library: there is no tokenizer
        raise TextEncoderError(
            f"no tokenizer to read the prompt with in {checkpoint!r} ({error}): pass it, as "
            "prune(model, method, tokenizer=tokenizer)"
        ) from error
