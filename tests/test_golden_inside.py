"""What the released codes keep inside a real Llama, index for index."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava_hvp import FastV, PyramidDrop, SparseVLM
from llava_hvp.decoder.hooks import DecoderHooks
from llava_hvp.decoder.prompt import Prompt
from llava_hvp.hosts.llava.compat import new_cache

GOLDEN = Path(__file__).parent / "golden"
WIDTH, INNER, VOCABULARY = 64, 128, 50


def cases(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


def case_id(case):
    return f"seed{case['seed']}"


def drawn(case):
    """(state dict of a Llama, embeddings (n, 64)), as golden/README.md draws them."""
    generator = np.random.default_rng(case["seed"])

    def normal(*shape, scale=1.0, shift=0.0):
        values = shift + scale * generator.standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(values.astype(np.float32))

    sharp, flat = 1.5 / 8, 0.5 / 8
    keys = WIDTH // case["heads"] * case["kv_heads"]
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH, sharp),
        "self_attn.k_proj": (keys, WIDTH, sharp),
        "self_attn.v_proj": (keys, WIDTH, flat),
        "self_attn.o_proj": (WIDTH, WIDTH, flat),
        "mlp.gate_proj": (INNER, WIDTH, flat),
        "mlp.up_proj": (INNER, WIDTH, flat),
        "mlp.down_proj": (WIDTH, INNER, 0.5 / INNER**0.5),
    }
    state = {}
    for layer in range(case["layers"]):
        for name, (*shape, scale) in shapes.items():
            state[f"model.layers.{layer}.{name}.weight"] = normal(*shape, scale=scale)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{layer}.{name}.weight"] = normal(WIDTH, scale=0.1, shift=1.0)
    state["model.norm.weight"] = normal(WIDTH, scale=0.1, shift=1.0)
    state["model.embed_tokens.weight"] = normal(VOCABULARY, WIDTH)
    state["lm_head.weight"] = normal(VOCABULARY, WIDTH, scale=1 / 8)
    return state, normal(length(case), WIDTH)


def length(case):
    return case["start"] + case["image"] + case["text"]


def run(case, method):
    """(levels of the prompt, next token, cache)."""
    state, embeds = drawn(case)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        vocab_size=VOCABULARY,
        num_hidden_layers=case["layers"],
        num_attention_heads=case["heads"],
        num_key_value_heads=case["kv_heads"],
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    hooks = DecoderHooks(model.model, new_cache)
    columns = torch.arange(length(case))[None]
    visual = (columns >= case["start"]) & (columns < case["start"] + case["image"])
    found = []
    prompt = Prompt(
        visual,
        torch.ones_like(visual),
        (length(case),),
        ((case["image"],),),
        (case["text"],),
        found.extend,
    )
    embeds = embeds[None]
    hooks.expect(embeds, prompt, hooks.plan(method))
    with torch.no_grad():
        output = model(inputs_embeds=embeds)
    return found, int(output.logits[0, -1].argmax()), output.past_key_values


def columns_kept(case, levels):
    """Of each level behind a drop, the original visual tokens."""
    return {
        str(level.layer): (level.columns[level.visual & ~level.merged] - case["start"]).tolist()
        for level in levels[1:]
    }


def lengths(case, cache):
    return [cache.get_seq_length(layer) for layer in range(case["layers"])]


@pytest.mark.parametrize("case", cases("fastv"), ids=case_id)
def test_fastv_keeps_what_the_released_codes_keep(case):
    method = FastV(layer=case["k"], ratio=case["rank"] / case["image"])
    levels, following, cache = run(case, method)
    assert columns_kept(case, levels) == case["kept"]
    assert following == case["next"]
    less = case["image"] - case["rank"]
    wanted = [length(case) - less * (layer >= case["k"]) for layer in range(case["layers"])]
    assert lengths(case, cache) == wanted


@pytest.mark.parametrize("case", cases("pyramiddrop"), ids=case_id)
def test_pyramiddrop_keeps_what_the_released_code_keeps(case):
    method = PyramidDrop(layers=tuple(case["layer_list"]), ratios=tuple(case["ratios"]))
    levels, following, cache = run(case, method)
    assert columns_kept(case, levels) == case["kept"]
    assert following == case["next"]
    assert lengths(case, cache) == case["cache_lengths"]


@pytest.mark.parametrize("case", cases("sparsevlm"), ids=case_id)
def test_sparsevlm_keeps_what_the_released_code_keeps(case):
    counts = tuple(len(case["kept"][stage]) for stage in ("3", "7", "16"))
    method = SparseVLM(version=case["version"], layers=(3, 7, 16), tokens=counts)
    levels, following, cache = run(case, method)
    assert following == case["next"]
    assert lengths(case, cache) == case["cache_lengths"]
    kept, before = {}, tokens_of(levels[0])
    for level, count in zip(levels[1:], counts, strict=True):
        tokens = tokens_of(level)
        kept[str(level.layer)] = [before.index(token) for token in tokens[:count]]
        before = tokens
    assert kept == case["kept"]


def tokens_of(level):
    """(column, whether merged) of each visual token: those that stayed, then the merged."""
    return list(
        zip(level.columns[level.visual].tolist(), level.merged[level.visual].tolist(), strict=True)
    )
