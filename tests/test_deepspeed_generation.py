"""Generation in two ranks under DeepSpeed, weights partitioned or sharded, against one process."""

import pytest
import torch
from conftest import load
from ranks import opened, run_ranks

from llava_hvp import HIVTP, HiPrunePlus, get_method, prune
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.llava.compat.device import bridge_deepspeed_to_cpu

deepspeed = pytest.importorskip("deepspeed")

QUESTIONS = ("What is this?", "Is there a cat in the picture, and what does it look like?", "Why?")
# Which photo each question is about; both ranks go through as many, one of them meets one again.
PHOTOS = ((0, 1, 2), (3, 1, 1))
METHODS = {
    "hivtp": HIVTP(r_max=0.25),
    "hiprune++": HiPrunePlus(r_max=0.25),
    "hiprune++ llm": HiPrunePlus(r_max=0.25, text="llm"),
    "mmtok": get_method("mmtok", r_max=0.25),
}


def answers(bundle, photos, which, method, **settings):
    """(ids, kept patches) of each question, one after the other."""
    found = []
    with prune(bundle.model, method, tokenizer=bundle.tokenizer) as pruned:
        pruned.reuse = True
        for question, index in zip(QUESTIONS, which, strict=True):
            photo = photos[index]
            with torch.no_grad():
                ids = bundle.generate(
                    bundle.ids(question), bundle.pixels(photo), [photo.size], **settings
                )
            found.append((ids.tolist(), pruned.last[0].selection.keep.tolist()))
    return found


def partitioned(path):
    """A LLaVA whose weights two ranks hold a half of each, by ZeRO-3; what has to stay alive."""
    from transformers.integrations import HfDeepSpeedConfig

    config = {
        "train_micro_batch_size_per_gpu": 1,
        # Or nothing of so small a model would be partitioned.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    bridge_deepspeed_to_cpu(trains=True)
    alive = HfDeepSpeedConfig(config)
    bundle = opened(path)
    engine = deepspeed.initialize(model=bundle.model, config=config)[0]
    bundle.model = engine.module
    assert all(weight.numel() == 0 for weight in bundle.model.parameters())
    return bundle, (engine, alive)


def sharded(path, policy):
    """A LLaVA whose layers two ranks hold a half of each, by AutoTP."""
    bridge_deepspeed_to_cpu(trains=True)
    bundle = load(path)
    engine = deepspeed.init_inference(
        bundle.model,
        tensor_parallel={"tp_size": 2},
        dtype=torch.float32,
        replace_with_kernel_inject=False,
        injection_policy=policy,
    )
    bundle.model = engine.module
    return bundle


def same(ranks, expected):
    assert [rank.code for rank in ranks] == [0, 0], "\n".join(rank.said for rank in ranks)
    assert [rank.gave for rank in ranks] == expected


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llava-1.5-llama", "hivtp"),
        ("llava-1.5-llama", "hiprune++"),
        ("llava-1.5-llama", "hiprune++ llm"),
        ("llava-next-llama", "hivtp"),
        ("llava-next-llama", "mmtok"),
    ],
)
def test_partitioned_weights_keep_and_answer_the_same(kind, name, checkpoints, photos):
    method = METHODS[name]
    alone = opened(checkpoints(kind))
    expected = [answers(alone, photos, which, method) for which in PHOTOS]

    def body(rank):
        bundle, _alive = partitioned(checkpoints(kind))
        return answers(bundle, photos, PHOTOS[rank], method, synced_gpus=True)

    same(run_ranks(body), expected)


@pytest.mark.parametrize("kind", ["llava-1.5-llama", "llava-next-llama"])
def test_sharded_layers_keep_and_answer_the_same(kind, loaded, checkpoints, photos):
    """Of the language model alone, as the error of a sharded tower says."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    policy = {LlamaDecoderLayer: ("self_attn.o_proj", "mlp.down_proj")}
    expected = answers(loaded(kind), photos, PHOTOS[0], METHODS["hivtp"])

    def body(rank):
        bundle = sharded(checkpoints(kind), policy)
        half = bundle.model.get_model().layers[0].self_attn.q_proj.weight.shape[0]
        assert half * 2 == bundle.model.config.hidden_size
        return answers(bundle, photos, PHOTOS[0], METHODS["hivtp"])

    same(run_ranks(body), [expected] * 2)


def test_a_tower_that_deepspeed_shards_is_refused(checkpoints, photos):
    def body(rank):
        bundle = sharded(checkpoints("llava-1.5-llama"), None)
        with pytest.raises(UnsupportedModelError, match="injection_policy="):
            answers(bundle, photos, PHOTOS[0], METHODS["hivtp"])

    same(run_ranks(body), [None, None])
