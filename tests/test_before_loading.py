"""Layers that no tower of a checkpoint has are refused before its weights are read."""

import json

import huggingface_hub
import pytest
import torch
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

from llava_hvp import HIVTP, HiPrune
from llava_hvp.checkpoints.before_loading import check_before_loading
from llava_hvp.cli import main
from llava_hvp.errors import LayerError, OptionError
from llava_hvp.hosts.llava import builder
from llava_hvp.runtime import PruningConfig

VISION = {"num_hidden_layers": 12, "image_size": 96, "patch_size": 16}


def write(folder, **content):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def checkpoint(tmp_path):
    """A function: configs of a model and of its tower, which has 12 layers of 6 x 6 patches."""

    def make(select=-2, tower=None, **vision):
        tower = tower or write(tmp_path / "clip", **(vision or {"vision_config": VISION}))
        return write(tmp_path / "llava", mm_vision_tower=tower, mm_vision_select_layer=select)

    return make


def test_the_depth_is_read_from_the_towers_config(checkpoint):
    for path in (checkpoint(), checkpoint(**VISION), checkpoint(select=11)):
        check_before_loading(
            path,
            [None, PruningConfig(HIVTP(layers=(1, 11))), PruningConfig(HiPrune(object_layer=11))],
        )
        with pytest.raises(LayerError, match="layer 13 of an encoder of 12: give 1 to 11"):
            check_before_loading(path, [None, PruningConfig(HIVTP(layers=(13,)))])
        with pytest.raises(LayerError, match="layer 12 lies past layer 11"):
            check_before_loading(path, [PruningConfig(HiPrune(object_layer=12))])


def test_windows_that_do_not_fit_the_grid_are_refused_too(checkpoint):
    with pytest.raises(OptionError, match="cuts 6 x 6 patches into 36 windows"):
        check_before_loading(checkpoint(), [PruningConfig(HIVTP(r_max=0.5, window=1))])


def test_a_tower_of_the_hub_is_looked_for_in_the_cache_only(checkpoint, tmp_path, monkeypatch):
    path = checkpoint(tower="someone/clip")
    check_before_loading(
        path, [PruningConfig(HIVTP(layers=(99,)))]
    )  # it is not here: nothing is known
    write(tmp_path / "cached", vision_config=VISION)
    cached = {("someone/clip", "config.json"): str(tmp_path / "cached/config.json")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *x: cached.get(x))
    with pytest.raises(LayerError, match="layer 99 of an encoder of 12"):
        check_before_loading(path, [PruningConfig(HIVTP(layers=(99,)))])


@pytest.mark.parametrize(
    "vision",
    [
        {"num_hidden_layers": "12"},
        {"vision_config": {}},
        {"vision_config": 3},
        VISION | {"patch_size": 0},
    ],
)
def test_where_the_files_do_not_tell_nothing_is_refused(vision, checkpoint, tmp_path):
    for path in (checkpoint(**vision), "nowhere at all", str(tmp_path), "../x", ""):
        assert check_before_loading(path, [PruningConfig(HIVTP(layers=(99,)))]) is None, path
    (tmp_path / "llava/config.json").write_text("[1, 2")
    assert (
        check_before_loading(str(tmp_path / "llava"), [PruningConfig(HIVTP(layers=(99,)))]) is None
    )


@pytest.mark.parametrize(
    "command",
    [
        "eval pope --device cpu --prune-method hivtp --prune-opt layers=99",
        "show --image-file photo.png --device cpu --methods hivtp --prune-opt layers=99 -o o.png",
        "bench --device cpu --methods hivtp --prune-opt layers=99",
    ],
    ids=lambda line: line.split()[0],
)
def test_our_commands_refuse_them_before_they_load(
    command, checkpoint, photos, tmp_path, monkeypatch, capsys
):
    from llava.model import builder as loader

    monkeypatch.chdir(tmp_path)
    for name in ("LLAVA_HVP", "LLAVA_HVP_DEVICE", "LLAVA_HVP_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    photos[0].save(tmp_path / "photo.png")
    loads = []
    monkeypatch.setattr(loader, "load_pretrained_model", lambda *a, **k: loads.append(a))
    assert main([*command.split(), "--model-path", checkpoint()]) == 2
    error = capsys.readouterr().err
    assert error == "llava-hvp: error: hivtp: layers: layer 99 of an encoder of 12: give 1 to 11\n"
    assert not loads
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (HIVTP(layers=(99,)), "layer 99 of an encoder of 24"),
        (HIVTP(r_max=0.5, window=1), "cuts 8 x 8 patches into 64 windows"),
    ],
    ids=["layers", "window"],
)
def test_llavas_loader_refuses_them_before_the_towers_weights(
    method, message, checkpoints, monkeypatch
):
    """The tower is built with the model, whose weights come after; its own come last."""
    from llava.model.builder import load_pretrained_model

    path, loads = checkpoints("llava-1.5-llama"), []
    monkeypatch.setattr(CLIPVisionTower, "load_model", lambda *a, **k: loads.append(a))
    builder.install(method)
    try:
        with pytest.raises(OptionError, match=message):
            load_pretrained_model(str(path), None, path.name, device="cpu", device_map="cpu")
    finally:
        builder.uninstall()
    assert not loads
    assert torch.get_default_dtype() == torch.float32
