"""Budgets that training goes through in turns, and a pruned model that goes on by another one."""

import pytest
import torch

from llava_hvp import HIVTP, get_method, prune
from llava_hvp.config import Request
from llava_hvp.errors import OptionError
from llava_hvp.hook.audit import PruningAudit
from llava_hvp.hook.budgets import turn
from llava_hvp.runtime import PruningConfig

BUDGETS = (1, 0.5, 0.25)


def test_each_has_its_turn_in_every_round():
    seeds = {seed: [turn(BUDGETS, step, seed) for step in range(30)] for seed in (0, 1)}
    for drawn in seeds.values():
        rounds = [tuple(drawn[at : at + 3]) for at in range(0, 30, 3)]
        assert {tuple(sorted(each)) for each in rounds} == {(0.25, 0.5, 1)}
        assert len(set(rounds)) > 1
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize("name", ["hivtp", "visionzip", "hiprune++"])
def test_a_model_goes_on_by_another_budget(name, own, photos):
    bundle = own("llava-1.5-llama")
    ids, pixels = bundle.ids("What is this?"), bundle.pixels(photos[0])

    def embeds():
        return bundle.embeds(ids, pixels, None)[0]

    expected = {}
    for r_max in BUDGETS:
        with prune(bundle.model, get_method(name, r_max=r_max), tokenizer=bundle.tokenizer):
            expected[r_max] = embeds()
    # It keeps all at first, and reads no scores.
    with prune(bundle.model, get_method(name, r_max=1), tokenizer=bundle.tokenizer) as pruned:
        for r_max in (1, *reversed(BUDGETS), *BUDGETS):
            pruned.take_budget(r_max)
            assert torch.equal(embeds(), expected[r_max])
            assert pruned.method == get_method(name, r_max=r_max)
        with pytest.raises(OptionError, match="r_max=2"):
            pruned.take_budget(2)


def test_a_training_without_steps_of_a_trainer_is_refused(own, photos, monkeypatch):
    """Or it would have the smallest budget all the time."""
    monkeypatch.setattr("atexit.register", lambda *args: None)
    bundle, pruning = own("llava-1.5-llama"), PruningConfig(HIVTP(r_max=0.25))
    request = Request(pruning, train=True, train_r_max=(1, 0.25))
    account = PruningAudit("", request, pruning, {"llava": "1"})
    assert account.record()["given"][-2:] == ["--train-r-max", "1,0.25"]
    bundle.model.train()
    ids, pixels = bundle.ids("What is this?"), bundle.pixels(photos[0])
    with prune(bundle.model, pruning.method) as pruned:
        account.watch(pruned)
        with pytest.raises(OptionError, match=r"--train-r-max 1,0\.25: .* give --r-max"):
            bundle.model(ids, images=pixels, labels=ids)
        account.take_budget(1)
        bundle.model(ids, images=pixels, labels=ids)
        assert pruned.last[0].kept_of_stock == 1
