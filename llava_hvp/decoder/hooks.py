"""The hooks by which methods drop tokens between the layers of a decoder that runs as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava_hvp.decoder.checks import check_cache, check_decoder, check_step, check_window
from llava_hvp.decoder.plan import DropPlan
from llava_hvp.decoder.projections import Projections
from llava_hvp.decoder.prompt import Prompt, announce, find
from llava_hvp.decoder.run import PromptRun, StepRun, current, set_current
from llava_hvp.decoder.sequence import Generation
from llava_hvp.decoder.stage import apply_stage
from llava_hvp.methods.language import LanguageMethod

NewCache = Callable[[Any], Any]  # of the decoder's config
PLANS = 16  # methods whose plans are held; of others they are made anew


class DecoderHooks:
    """What sits on a decoder whose visual tokens methods drop, each call by its own.

    A forward pass whose embeddings were announced by `expect` is a prompt with images: it drops,
    and its cache remembers what. Passes that go on from such a cache get masks and positions that
    fit, whatever method comes next. All others run as if nothing sat here. Several threads may run
    one decoder.

    Parameters
    ----------
    decoder : nn.Module
        with `layers` (of `self_attn` and `input_layernorm`), a `config`, and a `rotary_emb` on
        itself or on each attention
    new_cache : Callable[[Any], Any]
        an empty DynamicCache for the decoder's config, put in where a prompt comes without one

    Raises
    ------
    UnsupportedModelError
        a decoder, or an attention, that cannot be pruned
    """

    def __init__(self, decoder: Any, new_cache: NewCache) -> None:
        check_decoder(decoder)
        self.decoder: Any = decoder
        self._new_cache = new_cache
        self._plans: tuple[DropPlan, ...] = ()
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
        self._projections = Projections(self.decoder)

    def plan(self, method: LanguageMethod) -> DropPlan:
        """What a method drops here; raises OptionError where its stages or budget do not fit."""
        plan = next((each for each in self._plans if each.method == method), None)
        if plan is None:
            plan = DropPlan(method, len(self.decoder.layers))
            self._plans = (plan, *self._plans)[:PLANS]
        return plan

    def remove(self) -> None:
        """Leave the decoder as it was."""
        self._projections.remove()
        for handle in self._handles:
            handle.remove()

    def expect(self, embeds: Tensor, prompt: Prompt, plan: DropPlan) -> None:
        """Drop what the plan does not keep when these embeddings, or copies of them, come."""
        prompt.plan = plan
        announce(embeds, prompt, self.decoder)

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
        announced, times = found
        plan, prompt = announced.plan, announced.repeated(times)
        self._projections.sit(plan.reads)
        set_current(
            PromptRun(
                module,
                Generation(embeds.shape[1], plan.method.positions == "renumbered"),
                plan,
                prompt,
                announced,
                plan.kept(prompt.images),
                _raters(plan, embeds, prompt),
                cache,
            )
        )
        return args, kwargs | {"past_key_values": cache}

    def _enter(self, index: int, module: Any, args: tuple, kwargs: dict) -> Any:
        run = current(self.decoder)
        if run is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        if isinstance(run, PromptRun):
            if index == 0:
                run.begin(kwargs["position_ids"])
            for number, stage in enumerate(run.plan.stages):
                if stage.layer == index:
                    states = apply_stage(run, number, module, states, kwargs)
            run.reading = index if index in run.plan.reads else None
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


def _raters(plan: DropPlan, embeds: Tensor, prompt: Prompt) -> Tensor | None:
    """(B, R) bool, which of the last R tokens of each row score; None where the last does."""
    if all(stage.reads == "last" for stage in plan.stages):
        return None
    tails = zip(prompt.tails, prompt.visual_counts, strict=True)
    longest = max((tail for tail, count in tails if count), default=1)
    columns = torch.arange(embeds.shape[1], device=embeds.device)
    first = torch.tensor([embeds.shape[1] - t for t in prompt.tails], device=embeds.device)
    text = (columns >= first[:, None]) & prompt.valid
    return plan.method.raters(embeds, prompt.visual, text)[:, -longest:]
