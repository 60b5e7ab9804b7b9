"""transformers' own LLaVA, pruned, in training: labels, and gradients of every part."""

import pytest
import torch
from hf_models import KINDS, QUESTIONS, ask, needs_release, sized

from llava_hvp import HIVTP, get_method, prune

pytestmark = needs_release
METHOD = HIVTP(r_max=0.25)


def test_labels_line_up_with_the_pruned_sequence(bundle, photos):
    inputs = ask(bundle, photos, side="right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = ids.masked_fill((mask == 0) | (ids == bundle.model.config.image_token_id), -100)
    with prune(bundle.model, METHOD) as pruned, torch.no_grad():
        output = bundle.model(**inputs, labels=labels)
        kept, stock = (
            [getattr(r, n) for r in pruned.last] for n in ("kept_tokens", "stock_tokens")
        )
    total, count = 0.0, 0
    for row in range(2):
        real = labels[row][mask[row].bool()]
        visual = (ids[row][mask[row].bool()] == bundle.model.config.image_token_id).nonzero()[:, 0]
        gone = set(visual[kept[row] :].tolist())
        short = [int(n) for place, n in enumerate(real) if place not in gone]
        assert len(short) == len(real) - stock[row] + kept[row]
        for place, label in enumerate(short[1:]):
            if label != -100:
                total -= float(output.logits[row, place].log_softmax(-1)[label])
                count += 1
    assert float(output.loss) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", ["hivtp", "visionzip", "prumerge", "cdpruner"])
def test_a_trained_tower_gets_its_gradient(name, bundle, photos, checkpoints):
    own, inputs = bundle.own(), ask(bundle, photos, side="right")
    clip = checkpoints(KINDS[0]).parent / "clip-112"
    with prune(own.model.train(), get_method(name, r_max=0.25), clip_text=clip):
        own.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        tower = own.model.model.vision_tower
        gradients = {n: p.grad for n, p in tower.named_parameters() if "layers.22.mlp" in n}
        assert gradients
        assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
        # A step along the gradient, and the loss is smaller: it is the gradient of this loss.
        first = own.model(**inputs, labels=inputs["input_ids"]).loss
        with torch.no_grad():
            for parameter in own.model.model.multi_modal_projector.parameters():
                parameter -= 1e-3 * parameter.grad
        assert own.model(**inputs, labels=inputs["input_ids"]).loss < first
    own.model.zero_grad()
    own.model.requires_grad_(False)
    own.model.model.multi_modal_projector.requires_grad_(True)
    with prune(own.model, get_method(name, r_max=0.25), clip_text=clip):
        own.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in tower.parameters())
    assert all(p.grad.any() for p in own.model.model.multi_modal_projector.parameters())


def test_a_step_of_the_trainer(hf, photos, tmp_path):
    from transformers import Trainer, TrainingArguments

    own = hf(KINDS[1]).own()
    pictures = sized(photos)[:2]
    rows = [
        (f"USER: <image>\n{q} ASSISTANT: Yes.", p)
        for q, p in zip(QUESTIONS[:2], pictures, strict=True)
    ]

    def collate(chosen):
        inputs = own.inputs([text for text, _ in chosen], [p for _, p in chosen], "right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return {**inputs, "labels": labels}

    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        save_strategy="no",
        learning_rate=1e-3,
    )
    before = {n: p.detach().clone() for n, p in own.model.named_parameters()}
    with prune(own.model, METHOD) as pruned:
        trainer = Trainer(own.model, arguments, train_dataset=rows, data_collator=collate)
        assert trainer.train().training_loss > 0
        assert len(pruned.last) == 2
        assert all(report.kept_tokens < report.stock_tokens for report in pruned.last)
    moved = {n for n, p in own.model.named_parameters() if not torch.equal(p, before[n])}
    for part in ("vision_tower", "multi_modal_projector", "language_model", "image_newline"):
        assert any(part in name for name in moved), part


def test_gradient_checkpointing(hf, photos):
    own = hf(KINDS[1]).own()
    inputs = ask(own, photos, side="right")

    def gradients():
        own.model.zero_grad()
        own.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [p.grad.clone() for p in own.model.parameters() if p.grad is not None]

    with prune(own.model.train(), METHOD):
        plain = gradients()
        own.model.gradient_checkpointing_enable({"use_reentrant": False})
        again = gradients()
    assert len(plain) == len(again)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
