"""`tiling="672"`: every picture as 2 x 2 tiles and the base tile, while pruned and no longer."""

import copy
import io
import json
import pickle

import pytest
import torch
from conftest import load
from llava.mm_utils import process_images
from PIL import Image

import llava_hvp
from llava_hvp import HIVTP, Runtime, Uniform, VisPruner, prune, unprune
from llava_hvp.errors import LlavaHvpError, OptionError, PrunedStateError, UnsupportedModelError

TILED = Runtime(tiling="672")
RELEASED = [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]]
ONE = [[224, 224]]  # of a tower of 112
SHAPES = ((640, 427), (100, 100), (1000, 300), (300, 1000), (40, 500))


def picture(size):
    noise = torch.randint(0, 256, (7, 5, 3), generator=torch.Generator().manual_seed(size[0]))
    return Image.fromarray(noise.byte().numpy()).resize(size)


PICTURES = [picture(size) for size in SHAPES]


def inputs(bundle, *images):
    return bundle.ids("What?", len(images)), bundle.pixels(*images), [i.size for i in images]


def saved(config, folder):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ["llava-next-llama", "llava-next-mistral-unfrozen"])
def test_every_picture_is_two_by_two_and_pruned_as_such(name, loaded):
    bundle = loaded(name)
    stock = bundle.model.config
    with prune(bundle.model, HIVTP(r_max=0.5), runtime=TILED) as pruned:
        assert bundle.model.config.image_grid_pinpoints == ONE
        for image in PICTURES:
            bundle.embeds(*inputs(bundle, image))
            (report,) = pruned.last
            assert report.tiles == 5
            assert report.kept_of_patches <= 0.5
    assert bundle.model.config is stock
    assert stock.image_grid_pinpoints == RELEASED
    assert [len(bundle.pixels(image)[0]) for image in PICTURES[1:4]] == [3, 4, 4]


def test_with_every_patch_kept_it_is_llava_with_that_grid(own):
    bundle = own("llava-next-llama")
    with prune(bundle.model, Uniform(r_max=1), runtime=TILED) as pruned:
        ours = [bundle.embeds(*inputs(bundle, image))[0] for image in PICTURES]
        batch = bundle.generate(*inputs(bundle, *PICTURES))
        assert [report.tiles for report in pruned.last] == [5] * len(PICTURES)
        counts = [report.stock_tokens for report in pruned.last]
    bundle.model.config.image_grid_pinpoints = ONE
    stock = [bundle.embeds(*inputs(bundle, image))[0] for image in PICTURES]
    for mine, theirs in zip(ours, stock, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(batch, bundle.generate(*inputs(bundle, *PICTURES)))
    text = bundle.ids("What?").shape[1] - 1
    assert counts == [embeds.shape[1] - text for embeds in stock]


def test_packed_without_unpad_and_newlines_it_is_five_times_576(loaded):
    bundle = loaded("llava-next-336")
    runtime = Runtime(tiling="672", patch_merge="spatial")
    with prune(bundle.model, VisPruner(num_tokens=640), runtime=runtime) as pruned:
        assert bundle.model.config.image_grid_pinpoints == [[672, 672]]
        bundle.embeds(*inputs(bundle, PICTURES[2]))
        assert (pruned.last[0].stock_tokens, pruned.last[0].kept_tokens) == (2880, 640)


def test_a_model_of_the_stock_loader_has_it_from_the_first_picture_on(checkpoints):
    llava_hvp.install(HIVTP(r_max=0.5), runtime=TILED)
    try:
        bundle = load(checkpoints("llava-next-llama"))
    finally:
        llava_hvp.uninstall()
    pruning = bundle.model.llava_hvp
    bundle.embeds(*inputs(bundle, PICTURES[3]))
    assert pruning.last[0].tiles == 5
    unprune(bundle.model)
    assert vars(bundle.model)["config"] is bundle.model.model.config
    assert bundle.model.config.image_grid_pinpoints == RELEASED


# --- what is refused ---


def test_a_model_of_one_tile_is_refused_and_stays_as_it_was(loaded, checkpoints):
    bundle = loaded("llava-1.5-llama")
    with pytest.raises(UnsupportedModelError, match=r"tiling='672'.*'pad'.*LLaVA-NeXT"):
        prune(bundle.model, HIVTP(), runtime=TILED)
    assert type(bundle.model.get_vision_tower()).__name__ == "CLIPVisionTower"
    llava_hvp.install(HIVTP(), runtime=TILED)
    try:
        with pytest.raises(UnsupportedModelError, match="LLaVA-NeXT"):
            load(checkpoints("llava-1.5-llama"))
    finally:
        llava_hvp.uninstall()


@pytest.mark.parametrize("value", [336, "336", "2x2", None, True])
def test_another_tiling_is_refused(value):
    with pytest.raises(OptionError, match=r"tiling=.*stock.*672"):
        Runtime(tiling=value)
    assert Runtime(tiling=672) == TILED


@pytest.mark.parametrize("image", PICTURES[1:4], ids=lambda image: str(image.size))
def test_pictures_cut_by_another_grid_are_refused(image, loaded):
    bundle = loaded("llava-next-llama")
    before = inputs(bundle, image)
    with prune(bundle.model, HIVTP(), runtime=TILED):
        with pytest.raises(UnsupportedModelError, match=r"an image of \d tiles.*5 of every image"):
            bundle.embeds(*before)
        with pytest.raises(UnsupportedModelError, match="an image of 1 tile,"):
            bundle.embeds(before[0], before[1][:, 0], before[2])
        with pytest.raises(UnsupportedModelError, match=r"an image of \d tiles"):
            bundle.embeds(before[0], list(before[1]), before[2])
        after = inputs(bundle, image)
    with prune(bundle.model, HIVTP()), pytest.raises(UnsupportedModelError, match="but 4 came"):
        bundle.embeds(*after)


def test_flat_tiles_are_counted_too(own):
    bundle = own("llava-next-llama")
    bundle.model.config.mm_patch_merge_type = "flat"
    before = inputs(bundle, PICTURES[1])
    with prune(bundle.model, HIVTP(r_max=0.5), runtime=TILED) as pruned:
        with pytest.raises(UnsupportedModelError, match="3 tiles"):
            bundle.embeds(*before)
        bundle.embeds(*inputs(bundle, PICTURES[1]))
        assert pruned.last[0].stock_tokens == 5 * 64


def test_another_config_or_grid_meanwhile_is_refused(own):
    bundle = own("llava-next-llama")
    stock = bundle.model.config
    with prune(bundle.model, HIVTP(), runtime=TILED):
        arguments = inputs(bundle, PICTURES[0])
        with pytest.raises(PrunedStateError, match="unprune"):
            bundle.model.config.image_grid_pinpoints = RELEASED
        bundle.model.config = stock
        with pytest.raises(UnsupportedModelError, match="another config now"):
            bundle.embeds(*arguments)
    assert bundle.model.config is stock


# --- what is shared, saved and copied ---


def test_a_model_that_shares_the_config_is_not_disturbed(own):
    bundle, other = own("llava-next-llama"), own("llava-next-llama")
    stock = bundle.model.config
    other.model.config = stock
    arguments = inputs(other, PICTURES[3])
    expected = other.embeds(*arguments)[0]
    with prune(bundle.model, HIVTP(), runtime=TILED):
        again = inputs(other, PICTURES[3])
        assert torch.equal(arguments[1], again[1])
        assert torch.equal(other.embeds(*again)[0], expected)
        with prune(other.model, HIVTP()) as pruned:
            other.embeds(*again)
            assert pruned.last[0].tiles == 4
        with prune(other.model, HIVTP(), runtime=TILED) as pruned:
            other.embeds(*inputs(other, PICTURES[3]))
            assert pruned.last[0].tiles == 5
        assert bundle.model.config.image_grid_pinpoints == ONE
    assert bundle.model.config is other.model.config is stock


def test_what_is_set_on_the_config_meanwhile_is_set(own):
    bundle = own("llava-next-llama")
    stock = bundle.model.config
    with prune(bundle.model, HIVTP(), runtime=TILED):
        assert isinstance(bundle.model.config, type(stock))
        bundle.model.config.tokenizer_padding_side = "left"
        bundle.model.config.use_cache = False
        assert bundle.model.model.config.use_cache is False
        del bundle.model.config.tokenizer_padding_side
        bundle.model.config.tokenizer_padding_side = "left"
    assert (stock.tokenizer_padding_side, stock.use_cache) == ("left", False)


def test_a_saved_config_is_the_stock_one(own, tmp_path):
    bundle = own("llava-next-llama")
    bundle.model.save_pretrained(tmp_path / "stock")
    expected = (tmp_path / "stock" / "config.json").read_text()
    assert json.loads(expected)["image_grid_pinpoints"] == RELEASED
    with prune(bundle.model, HIVTP(), runtime=TILED):
        bundle.model.save_pretrained(tmp_path / "pruned")
        config = bundle.model.config
        alone = saved(config, tmp_path / "config")
        assert config.to_dict() == config.stock_config.to_dict()
    assert (tmp_path / "pruned" / "config.json").read_text() == expected
    assert alone["image_grid_pinpoints"] == RELEASED


def test_a_copy_and_a_pickle_of_the_model_tile_alike(checkpoints):
    # Loaded anew: transformers 5 leaves hooks that cannot be pickled once a stock tower has run.
    bundle = load(checkpoints("llava-next-llama"))
    model, stock = bundle.model, bundle.model.config
    with prune(model, HIVTP(r_max=0.5), runtime=TILED) as pruned:
        arguments = inputs(bundle, PICTURES[3])
        expected = bundle.embeds(*arguments)[0]
        file = io.BytesIO()
        torch.save(model, file)
        others = [
            copy.deepcopy(model),
            copy.deepcopy(pruned).model,
            pickle.loads(pickle.dumps(model)),
            torch.load(io.BytesIO(file.getvalue()), weights_only=False),
        ]
    assert model.config is stock
    for bundle.model in others:
        again = inputs(bundle, PICTURES[3])
        assert torch.equal(again[1], arguments[1])
        assert torch.equal(bundle.embeds(*again)[0], expected)
        unprune(bundle.model)
        assert type(bundle.model.config) is type(stock)
        assert bundle.model.config is bundle.model.model.config is not stock
        assert bundle.model.config.image_grid_pinpoints == RELEASED


def test_a_config_by_itself_is_copied_as_the_stock_one_and_pickled_as_it_is(own):
    bundle = own("llava-next-llama")
    stock = bundle.model.config
    with prune(bundle.model, HIVTP(), runtime=TILED):
        config = bundle.model.config
        for copied in (copy.copy(config), copy.deepcopy(config)):
            assert type(copied) is type(stock)
            assert copied.image_grid_pinpoints == RELEASED
            copied.tokenizer_padding_side = "mine"
        assert stock.tokenizer_padding_side != "mine"
        # As for the processes of a loader, which cut the pictures of LLaVA's model_vqa_loader.
        sent = pickle.loads(pickle.dumps(config))
        assert process_images(PICTURES[3:4], bundle.processor, sent).shape[1] == 5
        other = type(bundle.model)(copy.deepcopy(config))
    assert other.config.image_grid_pinpoints == RELEASED


def test_an_error_while_pruning_gives_the_config_back(loaded, monkeypatch):
    from llava_hvp.pruning.pruning import Pruning

    bundle = loaded("llava-next-llama")
    stock = bundle.model.config

    def fails(pruning):
        raise LlavaHvpError("no text")

    monkeypatch.setattr(Pruning, "load_text", fails)
    with pytest.raises(LlavaHvpError, match="no text"):
        prune(bundle.model, HIVTP(), runtime=TILED)
    assert bundle.model.config is stock
