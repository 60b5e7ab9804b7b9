"""How a method is run travels with it, on every way from what was asked to the model."""

import dataclasses

import pytest
import torch
from conftest import load

import llava_hvp
from llava_hvp import HIVTP, Method, Runtime, prune
from llava_hvp.bench import measure
from llava_hvp.checkpoints.variants import Variant
from llava_hvp.errors import LlavaHvpError, OptionError, UnsupportedModelError
from llava_hvp.methods import OF_RUNTIME
from llava_hvp.runtime import PruningConfig, options_of

SPATIAL = Runtime(patch_merge="spatial")


def test_the_methods_know_the_names_of_the_options_that_are_not_theirs():
    assert tuple(field.name for field in dataclasses.fields(Runtime)) == OF_RUNTIME
    assert set(OF_RUNTIME) <= set(options_of(HIVTP))
    assert not set(OF_RUNTIME) & {field.name for field in dataclasses.fields(HIVTP)}


def test_options_are_told_apart_and_listed_together():
    pruning = PruningConfig.of("hivtp", num_tokens=9, regions=3, newline="all")
    assert pruning == PruningConfig(HIVTP(num_tokens=9, regions=3), Runtime(newline="all"))
    assert list(pruning.given) == ["num_tokens", "newline", "regions"]
    assert pruning.options == dataclasses.asdict(pruning.method) | dataclasses.asdict(
        pruning.runtime
    )
    assert PruningConfig.of("hivtp", **pruning.options) == pruning
    with pytest.raises(OptionError, match=r"unknown option 'newlines'.*patch_merge.*regions"):
        PruningConfig.of("hivtp", newlines="all")


def test_a_pruned_model_says_how_it_runs(loaded, photos):
    bundle, photo = loaded("llava-next-llama"), photos[0]
    with prune(bundle.model, HIVTP(r_max=0.5)) as pruned:
        assert pruned.runtime == Runtime()
    with prune(bundle.model, HIVTP(r_max=0.5), runtime=SPATIAL) as pruned:
        assert pruned.runtime == SPATIAL
        bundle.embeds(bundle.ids("x"), bundle.pixels(photo), [photo.size])
        assert pruned.last[0].stock_tokens == 5 * 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elsewhere(Method):
    where = "language model"


@pytest.mark.parametrize(
    ("method", "runtime", "error", "message"),
    [
        (HIVTP(), "stock", OptionError, "runtime='stock' is no Runtime"),
        (HIVTP(), HIVTP(), OptionError, "is no Runtime"),
        (7, None, UnsupportedModelError, "7 is no Method"),
        (HIVTP, None, UnsupportedModelError, "is no Method"),
        (Elsewhere(), None, UnsupportedModelError, "Elsewhere prunes at 'language model'.*tower"),
    ],
)
def test_what_cannot_prune_a_tower_is_refused(method, runtime, error, message, loaded):
    model = loaded("llava-1.5-llama").model
    with pytest.raises(error, match=message):
        prune(model, method, runtime=runtime)
    with pytest.raises(error, match=message):
        llava_hvp.install(method, runtime=runtime)
    assert "llava_hvp" not in vars(model)
    with pytest.raises(LlavaHvpError, match="nothing to undo"):
        llava_hvp.uninstall()


def test_what_is_loaded_after_install_is_pruned_until_uninstall(checkpoints, photos):
    path, built = checkpoints("llava-next-llama"), []
    llava_hvp.install(HIVTP(r_max=0.25), runtime=SPATIAL, on_model=built.append)
    try:
        pruned = load(path)
        with pytest.raises(LlavaHvpError, match="installed already"):
            llava_hvp.install(HIVTP())
    finally:
        llava_hvp.uninstall()
    stock = load(path)
    (pruning,) = built
    assert (pruning.method, pruning.runtime) == (HIVTP(r_max=0.25), SPATIAL)
    arguments = stock.ids("x"), stock.pixels(photos[0]), [photos[0].size]
    sent = stock.embeds(*arguments)[0].shape[1]
    assert pruned.embeds(*arguments)[0].shape[1] < sent
    assert pruning.last[0].stock_tokens == 5 * 64
    llava_hvp.unprune(pruned.model)
    assert torch.equal(pruned.embeds(*arguments)[0], stock.embeds(*arguments)[0])


def test_a_variant_and_its_floor_are_run_alike():
    seen, floor = [], HIVTP(r_max=0.1)

    def look(bench, variant):
        return measure.Measurements(variant, 1, 1, 1, 1), floor if variant.pruning else None

    def take(turn, *, counted):
        seen.append((turn.is_floor, turn.variant.pruning and turn.variant.pruning.runtime))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_look", look)
        patch.setattr(measure, "_take", take)
        measure.measure([None], [Variant(), Variant(PruningConfig(HIVTP(), SPATIAL))], 2)
    assert set(seen) == {(False, None), (False, SPATIAL), (True, SPATIAL)}
