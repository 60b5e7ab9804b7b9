"""Every method of the registry in a training step of two ranks by ZeRO-3, against one process."""

import pytest
import torch
from ranks import opened, run_ranks

from llava_hvp import get_method, list_methods, prune
from llava_hvp.hosts.llava.compat.device import bridge_deepspeed_to_cpu
from llava_hvp.methods.base import VisionMethod

deepspeed = pytest.importorskip("deepspeed")

# Plain steps: Adam's go by signs, and of a gradient near zero rounding decides.
RATE, CLIPPED = 0.05, 1.0
OWN = [
    name
    for name in list_methods(VisionMethod)
    if type(get_method(name)).__module__.startswith("llava_hvp.")
]
QUESTION = "What is this?"


def sample(bundle, photo):
    """What LLaVA's trainer gives a model of one picture."""
    ids = bundle.ids(QUESTION)
    labels = ids.clone()
    labels[:, :-3] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "images": bundle.pixels(photo),
        "image_sizes": [photo.size],
    }


def kept(pruning):
    return pruning.last[0].selection.keep.tolist()


def alone(bundle, photos):
    """Losses and kept patches of each rank's picture, method after method, in one process."""
    model, found = bundle.model, [{}, {}]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE)
    for name in OWN:
        with prune(model, get_method(name, r_max=0.25), tokenizer=bundle.tokenizer) as pruning:
            for rank, photo in enumerate(photos):
                loss = model(**sample(bundle, photo)).loss
                (loss / len(photos)).backward()
                found[rank][name] = (loss.item(), kept(pruning))
        torch.nn.utils.clip_grad_norm_(trained, CLIPPED)
        optimizer.step()
        optimizer.zero_grad()
    return found


def partitioned(path):
    """The bundle, and the engine that trains its model; weights are taken apart by ZeRO-3."""
    from transformers.integrations import HfDeepSpeedConfig

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": CLIPPED,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    bridge_deepspeed_to_cpu(trains=True)
    alive = HfDeepSpeedConfig(config)
    bundle = opened(path, trains=True)
    trained = [weight for weight in bundle.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE)
    engine = deepspeed.initialize(model=bundle.model, optimizer=optimizer, config=config)[0]
    return bundle, engine, alive


@pytest.mark.parametrize("kind", ["llava-1.5-llama", "llava-next-llama"])
def test_every_method_loses_and_keeps_as_in_one_process(kind, checkpoints, photos):
    pictures = photos[:2]
    expected = alone(opened(checkpoints(kind), trains=True), pictures)

    def body(rank):
        bundle, engine, _alive = partitioned(checkpoints(kind))
        found = {}
        for name in OWN:
            method = get_method(name, r_max=0.25)
            with prune(engine.module, method, tokenizer=bundle.tokenizer) as pruning:
                loss = engine(**sample(bundle, pictures[rank])).loss
                engine.backward(loss)
                engine.step()
                found[name] = (loss.item(), kept(pruning))
        return found

    for rank, told in enumerate(run_ranks(body)):
        assert told.code == 0, told.said
        for name in OWN:
            (loss, patches), (wanted, wanted_patches) = told.gave[name], expected[rank][name]
            assert loss == pytest.approx(wanted, abs=5e-3), name
            assert patches == wanted_patches, name
    losses = [loss for loss, _ in expected[0].values()]
    assert losses[-1] < losses[0]  # the steps were taken
