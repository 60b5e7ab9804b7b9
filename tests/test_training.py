"""The training forward: labels, loss, gradients, the token count of inference."""

import pytest
import torch

from llava_hvp import HIVTP, HiPrunePlus, prune


@pytest.mark.parametrize("kind", ["llava-1.5-mistral", "llava-next-llama"])
@pytest.mark.parametrize("method", [HIVTP(r_max=0.5), HiPrunePlus(r_max=0.4, text="llm")])
def test_forward_with_labels(kind, method, own, photos):
    bundle = own(kind)
    ids = bundle.ids("What is this?")
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100
    batch = torch.cat([ids, ids])
    images = bundle.pixels(photos[0], photos[2])
    sizes = [photos[0].size, photos[2].size]
    bundle.model.train()
    bundle.model.requires_grad_(True)
    with prune(bundle.model, method) as pruned:
        output = bundle.model(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            labels=torch.cat([labels, labels]),
            images=images,
            image_sizes=sizes,
        )
        output.loss.backward()
        training = [r.kept_tokens for r in pruned.last]
        bundle.model.eval()
        bundle.embeds(batch, images, sizes)
        assert [r.kept_tokens for r in pruned.last] == training
    assert torch.isfinite(output.loss)
    assert output.logits.shape[1] == ids.shape[1] - 1 + max(training)
    projector = bundle.model.get_model().mm_projector
    gradients = [p.grad for p in projector.parameters()]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
    if bundle.is_next:
        assert bundle.model.get_model().image_newline.grad.abs().max() > 0


def test_labels_line_up_with_the_pruned_sequence(loaded, photos):
    bundle = loaded("llava-1.5-llama")
    ids = bundle.ids("What is this?")
    with prune(bundle.model, HIVTP(r_max=0.5)) as pruned:
        embeds, _, _, labels = bundle.embeds(
            ids, bundle.pixels(photos[0]), None, labels=ids.clone()
        )
    kept = pruned.last[0].kept_tokens
    at = int((ids[0] == -200).nonzero())
    assert embeds.shape[1] == labels.shape[1] == ids.shape[1] - 1 + kept
    assert torch.equal(labels[0, :at], ids[0, :at])
    assert (labels[0, at : at + kept] == -100).all()
    assert torch.equal(labels[0, at + kept :], ids[0, at + 1 :])


def test_a_step_moves_the_projector_and_not_the_tower(own, photos):
    bundle = own("llava-1.5-llama")
    projector = bundle.model.get_model().mm_projector
    bundle.model.requires_grad_(False)
    projector.requires_grad_(True)
    before = [p.clone() for p in projector.parameters()]
    tower = bundle.model.get_vision_tower()
    tower_before = [p.clone() for p in tower.parameters()]
    ids = bundle.ids("What is this?")
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
    with prune(bundle.model, HIVTP(r_max=0.25)):
        bundle.model(
            input_ids=ids, labels=ids.clamp(min=-100), images=bundle.pixels(photos[0])
        ).loss.backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, projector.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tower_before, tower.parameters(), strict=True))
