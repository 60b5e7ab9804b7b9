"""What a prefill with drops between decoder layers takes, beside the sum of its parts.

    python eval_scripts/inside_speed.py [--rounds 15]

The parts are the layers before a drop at full length and those behind it at theirs, run as stock
runs them: what is above their sum is scoring, choosing, gathering and the hooks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava_hvp import FastV, LanguageMethod, PyramidDrop, SparseVLM
from llava_hvp.decoder.hooks import DecoderHooks
from llava_hvp.decoder.prompt import Prompt
from llava_hvp.hosts.llava.compat import new_cache
from llava_hvp.tables import MARKDOWN, aligned

DEPTH, WIDTH, START, IMAGE, TEXT, STEPS = 12, 512, 35, 576, 50, 16
METHODS: tuple[LanguageMethod, ...] = (
    FastV(r_max=0.5),
    PyramidDrop(r_max=0.5),
    SparseVLM(r_max=0.5),
    SparseVLM(version="2.0", r_max=0.5),
)


def model_of(layers: int) -> Any:
    """A Llama with so many layers, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=11 * WIDTH // 4,
        vocab_size=1000,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config).eval()


def prefill(decoder: Any, embeds: torch.Tensor) -> tuple[float, Any]:
    """Seconds of the processor, so that what else runs on it does not count, and the cache."""
    start = time.process_time()
    cache = decoder(inputs_embeds=embeds, use_cache=True).past_key_values
    return time.process_time() - start, cache


def decode(cache: Any, model: Any) -> float:
    """Seconds of the processor for STEPS words."""
    word = torch.tensor([[1]])
    start = time.process_time()
    for _ in range(STEPS):
        model(input_ids=word, past_key_values=cache)
    return time.process_time() - start


def prompt_of() -> Prompt:
    """One row: words, an image, words."""
    columns = torch.arange(START + IMAGE + TEXT)[None]
    visual = (columns >= START) & (columns < START + IMAGE)
    length = columns.shape[1]
    return Prompt(visual, torch.ones_like(visual), (length,), ((IMAGE,),), (TEXT,))


def parts_of(method: LanguageMethod) -> list[tuple[Any, torch.Tensor]]:
    """Stock decoders of the layers between two drops, each with states of their length."""
    starts = [0, *(stage.layer for stage in method.stages(DEPTH)), DEPTH]
    counts = [IMAGE, *method.counts(IMAGE, DEPTH)]
    return [
        (model_of(end - start).model, torch.randn(1, START + count + TEXT, WIDTH))
        for start, end, count in zip(starts, starts[1:], counts, strict=False)
    ]


@torch.no_grad()
def measured(method: LanguageMethod, rounds: int) -> list[str]:
    """A row of the table: medians of rounds that take turns."""
    model, parts = model_of(DEPTH), parts_of(method)
    stock = model_of(DEPTH)
    hooks = DecoderHooks(model.model, new_cache)
    embeds = torch.randn(1, START + IMAGE + TEXT, WIDTH)
    found: dict[str, list[float]] = {name: [] for name in ("pruned", "parts", "stock", "d", "ds")}
    for number in range(rounds + 2):
        hooks.expect(embeds, prompt_of(), hooks.plan(method))
        pruned_time, pruned_cache = prefill(model.model, embeds)
        stock_time, stock_cache = prefill(stock.model, embeds)
        times = {
            "pruned": pruned_time,
            "parts": sum(prefill(decoder, states)[0] for decoder, states in parts),
            "stock": stock_time,
            "d": decode(pruned_cache, model),
            "ds": decode(stock_cache, stock),
        }
        if number >= 2:
            for name, value in times.items():
                found[name].append(value)
    hooks.remove()
    middle = {name: statistics.median(values) for name, values in found.items()}
    ratio = statistics.median([a / b for a, b in zip(found["pruned"], found["parts"], strict=True)])
    steps = statistics.median([a / b for a, b in zip(found["d"], found["ds"], strict=True)])
    name = f"{method.name} {getattr(method, 'version', '')}".strip()
    return [
        name,
        *(f"{1000 * middle[key]:.1f}" for key in ("stock", "pruned", "parts")),
        f"{ratio:.3f}",
        f"{1000 * middle['ds'] / STEPS:.2f}",
        f"{steps:.3f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    header = ["method", "stock ms", "pruned ms", "parts ms", "to parts", "step ms", "step to stock"]
    print(f"{DEPTH} layers of width {WIDTH}, {START + IMAGE + TEXT} tokens, {rounds} rounds")
    print(aligned(header, [measured(method, rounds) for method in METHODS], MARKDOWN))


if __name__ == "__main__":
    main()
