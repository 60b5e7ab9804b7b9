"""`tiling=672` as it is typed, with a method and with `none`: all see the same 2 x 2 tiles."""

import json
import shlex
import shutil

import pytest
import torch
from benchdata import WRITERS
from evaluation import COMMANDS, PICTURES, call, python_line, read_answers, write_data
from PIL import Image

from llava_hvp import HIVTP, Runtime
from llava_hvp.accuracy.exam import examine
from llava_hvp.checkpoints.opening import open_checkpoint
from llava_hvp.checkpoints.variants import Variant, variants
from llava_hvp.checkpoints.viewer import Viewer
from llava_hvp.cli import main
from llava_hvp.errors import OptionError
from llava_hvp.evaluation.measured import read_results
from llava_hvp.evaluation.model_args import model_args, pruning_of
from llava_hvp.evaluation.published import has_stock_attention, with_stock_attention
from llava_hvp.methods.unpruned import Unpruned
from llava_hvp.runtime import PruningConfig
from llava_hvp.shapes.exams import exam

NAMES = ("chunk0", "science")
TILED = "--prune-opt tiling=672"
FIVE = 5 * 64  # patches
TALL = (100, 380)  # which stock cuts into 1 x 3, so that the tilings differ


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoints):
    """A folder with data, a LLaVA-NeXT, and the same with 2 x 2 as its only grid."""
    folder = write_data(tmp_path_factory.mktemp("tiling") / "data")
    for name in PICTURES:
        Image.open(folder / "images" / name).resize(TALL).save(folder / "images" / name)
    ends = {"eos_token_id": [2, *range(4, 512, 4)], "bos_token_id": 1, "pad_token_id": 0}
    for name in ("llava-next-tiny", "llava-next-2x2"):
        made = shutil.copytree(checkpoints("llava-next-llama"), folder / name)
        (made / "generation_config.json").write_text(json.dumps(ends))
    path = folder / "llava-next-2x2" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"image_grid_pinpoints": [[224] * 2]})
    )
    return folder


def launched(place, flags, checkpoint="llava-next-tiny"):
    """Answers of LLaVA's eval scripts behind the launcher, and their records."""
    out = place / ("-".join(flags.split()) + checkpoint)
    lines = [python_line(name, place / checkpoint, out) for name in NAMES]
    (place / "script.sh").write_text("\n".join(lines))
    result = call(f"llava-hvp run --device cpu {flags} -- bash script.sh", place)
    assert result.returncode == 0, result.stderr
    answers = {
        name: [{**r, "model_id": ""} for r in read_answers(out / f"{name}.jsonl")] for name in NAMES
    }
    records = {name: json.loads((out / f"{name}.jsonl.hvp.json").read_text()) for name in NAMES}
    return answers, records, result.stderr


def test_none_is_llava_with_that_grid_on_llavas_own_scripts(place):
    answers, records, said = launched(place, f"--prune-method none --r-max 0.5 {TILED}")
    expected, stock, _ = launched(place, "--prune-method none", "llava-next-2x2")
    assert answers == expected
    for name in NAMES:
        mine, theirs = records[name], stock[name]
        assert mine["counts"]["kept_tokens"] == theirs["counts"]["kept_tokens"]
        assert (mine["method"], mine["tiling"], theirs["tiling"]) == ("none", "672", "stock")
        assert mine["options"]["tiling"] == "672"
        assert mine["given"] == ["--prune-method", "none", "--prune-opt", "tiling=672"]
    off = "pruning off (none tiling=672): every visual token is kept"
    assert said.count(off) == len(NAMES)


def test_a_method_prunes_five_tiles_of_every_picture(place):
    flags = f"--prune-method random --num-tokens 50 {TILED} --prune-opt patch_merge=spatial"
    _, records, said = launched(place, flags)
    for name in NAMES:
        counts = records[name]["counts"]
        assert counts["images"] == COMMANDS[name].images
        assert counts["stock_tokens"] == FIVE * counts["images"]
        assert counts["kept_tokens"] == 50 * counts["images"]
        assert records[name]["tiling"] == "672"
    assert "pruning on: random num_tokens=50 tiling=672 patch_merge=spatial" in said


def test_a_model_of_one_tile_ends_with_one_line(place, checkpoints):
    line = python_line("vqa", checkpoints("llava-1.5-llama"), place / "never")
    result = call(f"{line} --device cpu --prune-method none {TILED}", place)
    assert result.returncode == 1
    assert "error: tiling='672' on a model with image_aspect_ratio='pad'" in result.stderr
    assert not list((place / "never").glob("*.hvp.json"))


def test_eval_keeps_the_tilings_apart_and_results_name_them(place):
    WRITERS["pope"](place / "data")
    for folder in (place / "data").rglob("*.jpg"):
        Image.open(folder).resize(TALL).save(folder)
    common = "eval pope --model-path llava-next-tiny --data data --device cpu --max_new_tokens 4"
    flags = {
        "unpruned": "",
        "none-tiling-672-patch_merge-spatial": f"{TILED} --prune-opt patch_merge=spatial",
    }
    for options in flags.values():
        result = call(f"llava-hvp {common} --prune-method none {options}", place)
        assert result.returncode == 0, result.stderr
    found = {r.path.parts[-3]: r for r in read_results(place / "results")}
    assert found.keys() == flags.keys()
    contents = {name: json.loads(r.path.read_text()) for name, r in found.items()}
    assert [contents[name]["tiling"] for name in flags] == ["stock", "672"]
    assert [contents[name]["settings"]["tiling"] for name in flags] == ["stock", "672"]
    stock, tiled = (contents[name]["stock_tokens"] for name in flags)
    assert stock < tiled == FIVE
    assert all(each["kept_of_stock"] == 1 for each in contents.values())
    assert found["unpruned"].pruning is None
    mine = found["none-tiling-672-patch_merge-spatial"].pruning
    assert mine == PruningConfig(Unpruned(), Runtime(tiling="672", patch_merge="spatial"))
    assert not mine.prunes


# --- commands that compare by themselves ---


@pytest.fixture
def tall(photos, tmp_path):
    photos[3].resize(TALL).save(tmp_path / "tall.png")
    return tmp_path / "tall.png"


@pytest.mark.parametrize("name", ["none", "hivtp"])
def test_show_draws_what_the_tiled_model_sees(name, checkpoints, tall, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = str(checkpoints("llava-next-llama"))
    flags = f"show --model-path {path} --image-file {tall} --device cpu --prune-method {name}"
    assert main([*shlex.split(flags), "-o", "stock.png"]) == 0
    assert main([*shlex.split(flags), *TILED.split(), "-o", "kept.png"]) == 0
    assert main([*shlex.split(flags), *TILED.split(), "--html", "kept.html", "--r-max", "0.5"]) == 0
    drawn, stock = Image.open("kept.png"), Image.open("stock.png")
    # 1 + 2 tiles side by side, where stock's mosaic is 1 tile across.
    assert drawn.width > stock.width
    assert "fitted into 224 x 224 for the mosaic" in (tmp_path / "kept.html").read_text()


def test_a_picture_of_none_has_what_a_tiled_model_sends(checkpoints, tall):
    viewer = Viewer.load(str(checkpoints("llava-next-llama")), None, "cpu", bits=None, tiling="672")
    image, ids = Image.open(tall).convert("RGB"), viewer.prompt("?")
    none, pruned = variants(["hivtp"], [{"r_max": 0.5}], ["tiling=672", "patch_merge=spatial"])
    reports = [viewer.look(each, image, ids) for each in (none, pruned)]
    assert [report.tiles for report in reports] == [5, 5]
    assert [report.stock_tokens for report in reports] == [FIVE, FIVE]
    assert (reports[0].method, reports[0].kept_tokens) == ("none", FIVE)
    assert len(viewer.view.pixels(image)) == 5
    assert "image_grid_pinpoints" in vars(viewer.model.config)


def test_bench_measures_all_on_the_same_tiles(tmp_path):
    flags = (
        "bench --geometry llava-next-tiny --methods random --r-max 0.5 --image-size 100x380 "
        f"--rounds 2 --new-tokens 2 {TILED} --out {tmp_path}"
    )
    assert main(shlex.split(flags)) == 0
    none, random = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert (none["method"], none["options"]) == ("none", "tiling=672")
    assert none["tiles"] == random["tiles"] == 5
    assert none["stock_tokens"] == none["kept_tokens"] == random["stock_tokens"]


def test_an_exam_cuts_the_pictures_of_each_variant_by_its_tiling(checkpoints):
    opened = open_checkpoint(str(checkpoints("llava-next-llama")), "cpu", conv_mode="vicuna_v1")
    stock = opened.model.config
    sent = []
    generate = opened.model.generate
    opened.model.generate = lambda ids, **given: (
        sent.append(given["images"]) or generate(ids, **given)
    )
    chosen = [
        *variants(["random"], [{"num_tokens": 50}], ["tiling=672"]),
        Variant(PruningConfig(HIVTP(r_max=0.5))),
    ]
    marks = examine(opened, list(exam("detail", 2)), chosen, batch=1)
    assert {str(m.variant): m.images for m in marks} == {
        "none tiling=672": 2,
        "random num_tokens=50 tiling=672": 2,
        "hivtp r_max=0.5": 2,
    }
    # Each variant once more to warm up; stock cuts these pictures into 2 x 1.
    assert [images.shape[1] for images in sent] == [5, 5, 5, 5, 3, 3, 5, 5, 3]
    assert opened.model.config is stock


# --- none, with options of a Runtime ---


@pytest.mark.parametrize(
    ("options", "runtime"),
    [
        (["tiling=672"], Runtime(tiling="672")),
        (["patch_merge=spatial", "tower_dtype=model"], Runtime(patch_merge="spatial")),
        (["newline=none", "window=2"], Runtime(newline="none")),
        (["tower_attention=stock", "newline=all"], None),
    ],
)
def test_none_has_the_protocol_of_its_neighbours(options, runtime):
    none = variants(["hivtp"], [{}], options)[0]
    assert none.pruning == (None if runtime is None else PruningConfig(Unpruned(), runtime))
    assert not none.prunes
    assert none.name == "none"


@pytest.mark.parametrize("name", ["none", "hivtp"])
def test_lmms_arguments_carry_the_tiling(name):
    given = {"num_tokens": 50, "tiling": 672, "patch_merge": "spatial"}  # as lmms-eval reads them
    pruning = pruning_of(name, given)
    assert pruning.runtime == Runtime(tiling="672", patch_merge="spatial")
    text = model_args("x", pruning)
    assert text.endswith(",tiling=672,patch_merge=spatial")
    assert f",prune_method={name}," in text
    with pytest.raises(OptionError, match="tiling='336'"):
        pruning_of(name, {"tiling": "336"})


def test_reproducing_a_row_of_none_is_one_run_with_that_of_eval():
    none = PruningConfig.of("none", tiling="672")
    assert with_stock_attention(none) == none
    assert has_stock_attention(none)


@torch.no_grad()
def test_none_keeps_all_of_a_packing_too(loaded, photos):
    from llava_hvp import prune

    bundle, photo = loaded("llava-next-llama"), photos[0].resize(TALL)
    runtime = Runtime(tiling="672", patch_merge="spatial")
    with prune(bundle.model, Unpruned(), runtime=runtime) as pruned:
        bundle.embeds(bundle.ids("x"), bundle.pixels(photo), [photo.size])
        (report,) = pruned.last
    assert (report.method, report.kept_tokens, report.stock_tokens) == ("none", FIVE, FIVE)
