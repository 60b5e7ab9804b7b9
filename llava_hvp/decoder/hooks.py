"""The hooks by which a method drops tokens between the layers of a decoder that runs as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llava_hvp.decoder.checks import check_cache, check_decoder, check_step, check_window
from llava_hvp.decoder.projections import Projections
from llava_hvp.decoder.prompt import Prompt, announce, find
from llava_hvp.decoder.run import PromptRun, StepRun, current, set_current
from llava_hvp.decoder.sequence import Generation
from llava_hvp.decoder.stage import apply_stage
from llava_hvp.methods.language import LanguageMethod

NewCache = Callable[[Any], Any]  # of the decoder's config


def attach(decoder: nn.Module, method: LanguageMethod, new_cache: NewCache) -> DecoderHooks:
    """Let a method drop visual tokens inside a decoder; see `DecoderHooks`."""
    return DecoderHooks(decoder, method, new_cache)


class DecoderHooks:
    """What sits on a decoder whose visual tokens a method drops.

    A forward pass whose embeddings were announced by `expect` is a prompt with images: it drops,
    and its cache remembers what. Passes that go on from such a cache get masks and positions that
    fit. All others run as if nothing sat here. Several threads may run one decoder.

    Parameters
    ----------
    decoder : nn.Module
        with `layers` (of `self_attn` and `input_layernorm`), a `config`, and a `rotary_emb` on
        itself or on each attention
    method : LanguageMethod
        what is dropped
    new_cache : Callable[[Any], Any]
        an empty DynamicCache for the decoder's config, put in where a prompt comes without one

    Raises
    ------
    UnsupportedModelError
        a decoder, or an attention, that cannot be pruned
    OptionError
        stages or a budget that do not fit its depth
    """

    def __init__(self, decoder: Any, method: LanguageMethod, new_cache: NewCache) -> None:
        check_decoder(decoder)
        self.decoder: Any = decoder
        self.method = method
        self.depth = len(self.decoder.layers)
        self.stages = method.stages(self.depth)
        method.check(self.depth)
        self._new_cache = new_cache
        self._keeps: dict[tuple[int, int], tuple[int, ...]] = {}
        self._handles = [
            self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.decoder.register_forward_hook(self._end, always_call=True),
        ]
        for index, layer in enumerate(self.decoder.layers):
            hook = functools.partial(self._enter, index)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            rotary = getattr(layer.self_attn, "rotary_emb", None)
            if rotary is not None:
                self._handles.append(rotary.register_forward_pre_hook(self._far, with_kwargs=True))
        before = sorted({stage.layer - 1 for stage in self.stages if stage.of == "before"})
        self._projections = Projections(self.decoder, before)

    def remove(self) -> None:
        """Leave the decoder as it was."""
        self._projections.remove()
        for handle in self._handles:
            handle.remove()

    def drops(self, images: tuple[tuple[int, ...], ...]) -> bool:
        """Whether of rows with these visual tokens by image any goes."""
        return any(
            min(kept, default=sum(row)) < sum(row)
            for row, kept in zip(images, self._kept(images), strict=True)
        )

    def expect(self, embeds: Tensor, prompt: Prompt) -> None:
        """Drop what the method does not keep when these embeddings, or copies of them, come."""
        announce(embeds, prompt, self.decoder)

    def _kept(self, images: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        """Visual tokens that the method keeps of each row at each stage."""
        return tuple(self._of_row(sum(row), len(row)) for row in images)

    def _of_row(self, visual: int, images: int) -> tuple[int, ...]:
        if not visual:
            return (0,) * len(self.stages)
        # A search in some methods, and wanted twice of a prompt: by `drops`, and where it begins.
        if (visual, images) not in self._keeps:
            self._keeps[visual, images] = self.method.keeps(visual, self.depth, images)
        return self._keeps[visual, images]

    def _begin(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        set_current(None)
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        check_cache(cache)
        known: Generation | None = getattr(cache, "llava_hvp_inside", None)
        if known is not None:
            check_step(embeds if embeds is not None else kwargs["input_ids"], cache, known)
            run = StepRun(module, known, check_window(module.config, cache, 1))
            set_current(run)
            return None
        found = None if embeds is None else find(embeds, self.decoder)
        if embeds is None or found is None:
            return None
        check_cache(cache, fresh=True)
        check_window(module.config, cache, embeds.shape[1])
        if cache is None and kwargs.get("use_cache") is not False and module.config.use_cache:
            cache = self._new_cache(module.config)
        self._projections.sit()
        announced, times = found
        prompt = announced.repeated(times)
        set_current(
            PromptRun(
                module,
                Generation(embeds.shape[1], self.method.positions == "renumbered"),
                prompt,
                announced,
                self._kept(prompt.images),
                self._raters(embeds, prompt),
                cache,
            )
        )
        return args, kwargs | {"past_key_values": cache}

    def _raters(self, embeds: Tensor, prompt: Prompt) -> Tensor | None:
        """(B, R) bool, which of the last R tokens of each row score; None where the last does."""
        if all(stage.reads == "last" for stage in self.stages):
            return None
        tails = zip(prompt.tails, prompt.visual_counts, strict=True)
        longest = max((tail for tail, count in tails if count), default=1)
        columns = torch.arange(embeds.shape[1], device=embeds.device)
        first = torch.tensor([embeds.shape[1] - t for t in prompt.tails], device=embeds.device)
        text = (columns >= first[:, None]) & prompt.valid
        return self.method.raters(embeds, prompt.visual, text)[:, -longest:]

    def _enter(self, index: int, module: Any, args: tuple, kwargs: dict) -> Any:
        run = current(self.decoder)
        if run is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        if isinstance(run, PromptRun):
            if index == 0:
                run.begin(kwargs["position_ids"])
            for number, stage in enumerate(self.stages):
                if stage.layer == index:
                    states = apply_stage(self, run, number, module, states, kwargs)
            wanted = any(s.layer == index + 1 and s.of == "before" for s in self.stages)
            run.reading = index if wanted else None
        changed = run.arguments(index, states, kwargs)
        if not changed:
            return None
        if args:
            return (states, *args[1:]), kwargs | changed
        return args, kwargs | changed | {"hidden_states": states}

    def _end(self, module: Any, args: tuple, output: Any) -> None:
        run = current(self.decoder)
        set_current(None)
        if output is None or not isinstance(run, PromptRun):  # None after an error
            return
        if run.cache is not None:
            run.cache.llava_hvp_inside = run.generation
        run.announced.ran = True
        if run.announced.on_prefill is not None:
            run.announced.on_prefill(run.generation.levels)

    def _far(self, module: Any, args: tuple, kwargs: dict) -> Any:
        """A rotary table that is cut to a layer's own keys ends before the original positions."""
        run = current(self.decoder)
        if run is None or kwargs.get("seq_len") is None:
            return None
        return args, kwargs | {"seq_len": max(kwargs["seq_len"], run.total)}
