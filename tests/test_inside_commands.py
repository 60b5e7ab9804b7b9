"""Methods inside the language model through the real commands, and none that forgets them."""

import argparse
import ast
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from benchdata import write_pope
from evaluation import GREEDY, PYTHON, call, read_answers, run_all, write_data
from PIL import Image

import llava_hvp
from llava_hvp import HIVTP, FastV, cli
from llava_hvp.checkpoints.variants import Variant
from llava_hvp.cli import main
from llava_hvp.config import Request, to_flags
from llava_hvp.hook.audit import record_path
from llava_hvp.pruning.report import ImageReport
from llava_hvp.runtime import PruningConfig
from llava_hvp.shapes import checkpoint

PACKAGE = Path(llava_hvp.__file__).parent
PICTURE = PACKAGE.parent / "docs" / "shapes.png"
LAYERS, PATCHES = 5, 144  # of the shipped checkpoint
ALONE = "--prune-method fastv --r-max 0.4"
BOTH = "--prune-method hivtp --r-max 0.5 --prune-inside fastv --inside-opt ratio=0.25"
MINE = '''
from dataclasses import dataclass
from llava_hvp import LanguageMethod
from llava_hvp.methods.language import Stage

@dataclass(frozen=True, kw_only=True)
class Thirds(LanguageMethod):
    """A third after each of two layers."""
    name, summary = "thirds", "a third, and a third of that"
    def stages(self, depth):
        return Stage(1), Stage(3)
    def keeps(self, visual, depth, images=1):
        return visual // 3, visual // 9
'''


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The shipped LLaVA, of five layers."""
    return checkpoint(tmp_path_factory.mktemp("shapes"), "llava-shapes").resolve()


@pytest.fixture
def folder(tmp_path):
    """Where somebody works, with a method of their own."""
    write_data(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def stock_line(path):
    """LLaVA's own eval command."""
    return (
        f"{PYTHON} -m llava.eval.model_vqa_loader --question-file questions.jsonl "
        f"--image-folder images {GREEDY} --max_new_tokens 4 --model-path {path} "
        "--answers-file out/answers.jsonl"
    )


def record_of(folder, result):
    assert result.returncode == 0, result.stderr
    assert len(read_answers(folder / "out" / "answers.jsonl")) == 3
    return json.loads(record_path(folder / "out" / "answers.jsonl").read_text())


def test_llavas_own_command_prunes_inside_and_its_record_says_so(folder, shapes):
    result = call(f"{stock_line(shapes)} {ALONE} --device cpu", folder)
    record = record_of(folder, result)
    kept = (2 * PATCHES - PATCHES) // 4  # 0.4 x 5 layers of 144, of which the first sees all
    assert (record["method"], record["options"]["r_max"]) == ("fastv", 0.4)
    assert record["given"] == ["--prune-method", "fastv", "--r-max", "0.4"]
    counts = record["counts"]
    assert counts["layer_tokens"] == [3 * PATCHES, *[3 * kept] * 4]
    assert counts["kept_tokens"] == counts["stock_tokens"] == 3 * PATCHES
    assert counts["mean_average_of_stock"] == pytest.approx(0.4)
    assert (
        f"3 images, kept 40.0% of stock's visual tokens on average over 5 layers, 144 -> {kept} "
        "after layer 1, and sent 100.0% of all patches (means)"
    ) in result.stderr
    assert "pruning on: fastv r_max=0.4 (" in result.stderr


def test_the_launcher_carries_both_and_finds_methods_of_ones_own(folder, shapes):
    line = stock_line(shapes).replace("questions.jsonl", f"{folder}/questions.jsonl")
    line = line.replace(" images ", f" {folder}/images ").replace(" out/", f" {folder}/out/")
    flags = "--prune-method hivtp --num-tokens 72 --prune-inside mine:Thirds"
    run = f"llava-hvp run {flags} --device cpu -- bash -c {shlex.quote(f'cd / && {line}')}"
    result = call(run, folder)
    record = record_of(folder, result)
    assert record["method"] == "hivtp+mine:Thirds"
    assert record["given"][:4] == ["--prune-method", "hivtp", "--prune-inside", "mine:Thirds"]
    sent = record["counts"]["kept_tokens"]
    first, *rest = record["counts"]["layer_tokens"]
    assert sent == first <= 3 * 72
    assert all(tokens < first for tokens in rest)
    assert rest[0] == rest[1] > rest[2] == rest[3]
    assert "pruning on: hivtp+thirds num_tokens=72 inside_r_max=0.5 (" in result.stderr


def test_training_is_refused_before_anything_is_loaded(folder):
    line = f"{PYTHON} -m llava.train.train_mem --model_name_or_path x {BOTH} --prune-train"
    result = call(line, folder)
    assert result.returncode == 2
    assert "--prune-train: fastv prunes inside the language model" in result.stderr


# --- our own commands ---


def test_show_bench_and_accuracy_take_three_combinations_at_one_budget(folder, shapes):
    picture = f"--model-path {shapes} --image-file {PICTURE} --device cpu"
    methods = "--methods none,hivtp,fastv,hivtp+fastv --device cpu"
    grid, page, timed, asked = run_all(
        folder,
        [
            f"show {picture} --methods hivtp,fastv,hivtp+fastv --r-max 0.4,0.25 -o grid.png",
            f"show {picture} {BOTH} --prompt 'Which digits?' --new-tokens 2 --html page.html",
            f"bench --geometry llava-1.5-tiny {methods} --r-max 0.64 --rounds 2 --new-tokens 2 "
            "--out timed",
            f"accuracy {methods} --r-max 0.25 --questions 4 --out marks",
        ],
    )
    for code, _, said in (grid, page, timed, asked):
        assert code == 0, said
    assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")
    html = (folder / "page.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    (shown,) = json.loads(data)["methods"]
    assert shown["name"] == "hivtp+fastv"
    labels = [budget["label"].rpartition(", ")[2] for budget in shown["budgets"]]
    assert labels == ["sent", "after layer 1"]
    sent, left = (budget["kept"] for budget in shown["budgets"])
    assert left == round(sent / 4)
    assert shown["budgets"][0]["answer"] == shown["budgets"][1]["answer"] != ""
    (file,) = (folder / "timed").glob("*.json")
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["none", "hivtp", "fastv", "hivtp+fastv"]
    assert rows["fastv"]["options"] == "r_max=0.64"
    assert rows["hivtp+fastv"]["options"] == "r_max=0.8 inside_r_max=0.8"
    for name in ("fastv", "hivtp+fastv"):
        assert 0.55 * 64 < rows[name]["average_tokens"] <= 0.64 * 64
        assert rows[name]["layer_tokens"][0] > rows[name]["layer_tokens"][1]
        assert rows[name]["to_floor"]
        assert rows[name]["selection"] is None
    (file,) = (folder / "marks").glob("*.json")
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["none", "hivtp", "fastv", "hivtp+fastv"]
    assert {name: row["kept_tokens"] for name, row in rows.items()} == {
        "none": None,
        "hivtp": pytest.approx(36, abs=1),
        "fastv": 36,
        "hivtp+fastv": pytest.approx(36, abs=1),
    }
    for name in ("hivtp", "fastv", "hivtp+fastv"):
        assert rows[name]["kept_of_patches"] == pytest.approx(0.25, abs=0.01)


def test_eval_keeps_both_apart_from_one_and_reads_its_results_again(folder, shapes):
    shutil.copytree(shapes, folder / "llava-v1.5-tiny")
    write_pope(folder / "data", 2)
    line = (
        "eval pope --model-path llava-v1.5-tiny --data data --device cpu --max_new_tokens 2 "
        "--out results "
    )
    mine = "--prune-method mine:Thirds"
    both, alone, table = run_all(folder, [line + BOTH, line + mine, "table results"])
    assert both[0] == alone[0] == table[0] == 0, both[2] + alone[2] + table[2]
    found = {p.parts[-3]: json.loads(p.read_text()) for p in folder.rglob("result.json")}
    name = "hivtp+fastv-r_max-0.5-inside_ratio-0.25"
    assert set(found) == {name, "thirds-r_max-0.5"}
    result = found[name]
    assert result["method"] == "hivtp+fastv"
    sent, average = result["kept_tokens"], result["average_tokens"]
    assert sent < PATCHES
    assert average == pytest.approx((sent + 4 * round(sent / 4)) / LAYERS, abs=0.5)
    assert result["average_of_stock"] == pytest.approx(average / PATCHES)
    assert f"on average over layers {average:.1f} of 144 tokens kept" in both[1]
    assert "hivtp+fastv r_max=0.5 inside_ratio=0.25" in table[1]
    assert "thirds r_max=0.5" in table[1]
    (folder / "mine.py").write_text(f"{MINE}# another rule\n")
    ((code, _, said),) = run_all(folder, [line + mine])
    assert code == 2
    assert "holds answers of other settings: method_sha256 was" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bench --geometry llava-1.5-7b --methods fastv --r-max 0.05", "fastv: r_max=0.05"),
        ("accuracy --methods fastv --r-max 0.11", "fastv: r_max=0.11 cannot be met"),
        ("accuracy --methods hivtp+fastv --r-max 0.02", "fastv: r_max=0.14"),
        ("show --model-path {shapes} --image-file x.png --prune-method fastv "
         "--prune-opt layer=5 -o o.png", "fastv: layer"),
        ("eval pope --model-path {shapes} --prune-method fastv --r-max 0.1 --data {shapes}",
         "fastv: r_max=0.1 cannot be met"),
        ("show --model-path {shapes} --image-file x.png --methods hivtp --prune-inside fastv "
         "-o o.png", "--prune-inside 'fastv' without --prune-method"),
        ("show --model-path {shapes} --image-file x.png --methods hivtp --inside-r-max 0.5 "
         "-o o.png", "--inside-r-max without --prune-method"),
        ("bench --geometry llava-1.5-7b --methods hivtp+fastw", "unknown method 'hivtp.fastw'"),
        ("accuracy --methods fastv+hivtp", "give it second"),
    ],
)  # fmt: skip
def test_what_no_layer_can_meet_is_refused_before_anything_is_loaded(line, message, shapes, capsys):
    on_cpu = "" if line.startswith("accuracy --methods fastv+") else " --device cpu"
    assert main(shlex.split(line.format(shapes=shapes) + on_cpu)) == 2
    assert re.search(message, capsys.readouterr().err)


def test_of_all_methods_accuracy_leaves_out_what_cannot_be_had(capsys):
    command = importlib.import_module("llava_hvp.cli.accuracy")
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    args = parser.parse_args(["accuracy", "--r-max", "0.5,0.11", "--device", "cpu"])
    chosen = [str(variant) for variant in command.parse(args).variants]
    assert "fastv r_max=0.5" in chosen
    assert "fastv r_max=0.11" not in chosen
    assert "hivtp r_max=0.11" in chosen
    assert "fastv r_max=0.11 is left out: fastv: r_max=0.11" in capsys.readouterr().err


def test_the_methods_are_listed_by_where_they_prune(capsys):
    assert main(["methods"]) == 0
    tower, inside = capsys.readouterr().out.split("inside the language model; alone, or behind")
    assert "\nhivtp: " in tower
    assert "\nfastv: " not in tower
    assert "\nfastv: " in inside
    assert "    --prune-opt ratio=None" in inside


def test_doctor_says_what_the_variable_asks_for(monkeypatch, capsys):
    monkeypatch.setenv("LLAVA_HVP", BOTH)
    main(["doctor"])
    assert "asks for hivtp+fastv r_max=0.5 inside_ratio=0.25" in capsys.readouterr().out


# --- what a picture shows ---


def in_stages(kept=(40, 10), sent=64):
    """A report of 8 x 8 patches, all sent, with stages that keep the first so many."""
    mask = torch.ones(1, 64, dtype=torch.bool)
    stages = tuple((torch.arange(64) < count)[None] for count in kept)
    return ImageReport(
        "fastv", 1, 64, sent, mask, (8, 8), None, llava_hvp.Selection.from_roles({"kept": mask}),
        layer_tokens=(64, 40, 40, 10), stages=stages, stage_layers=(1, 3),
    )  # fmt: skip


def test_every_stage_is_drawn_with_its_count(shapes):
    from llava_hvp.checkpoints.viewer import Viewer

    viewer, image = Viewer.load(str(shapes), None, "cpu", bits=None), Image.open(PICTURE)
    image = image.convert("RGB")
    ids = viewer.prompt("Which digits?")
    report = viewer.look(PruningConfig.checked(FastV(r_max=0.4)), image, ids)
    (mask,) = report.stages
    assert report.stage_layers == (1,)
    assert report.layer_tokens == (PATCHES, *[int(mask.sum())] * 4)
    sheet = report.overlay(image, scale=1, original=False)
    side = sheet.width // 12 if sheet.width < 200 else 14
    for place, kept in enumerate(mask[0].tolist()):
        row, column = divmod(place, 12)
        box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
        colours = torch.frombuffer(bytearray(sheet.crop(box).tobytes()), dtype=torch.uint8)
        is_grey = bool((colours.view(-1, 3) == colours.view(-1, 3)[:, :1]).all())
        assert is_grey == (not kept)
    both = viewer.look(PruningConfig(HIVTP(r_max=0.5), inside=FastV(r_max=0.4)), image, ids)
    assert (
        both.overlay(image, scale=1, original=False).height > sheet.height + 12 * side
    )  # sent, and a stage
    assert both.method == "hivtp+fastv"
    assert "averaged over layers" in repr(both)
    assert report._repr_png_().startswith(b"\x89PNG")


def test_captions_have_the_counts_of_each_stage():
    from llava_hvp.show.frame import counts_of
    from llava_hvp.show.inside import caption, last_of, shown_of, totals

    report = in_stages()
    assert [caption(*one) for one in shown_of(report)] == [
        "after layer 1: 40 tokens, 40 patches",
        "after layer 3: 10 tokens, 10 patches",
    ]
    assert totals(report) == (
        "38.5 of 64 tokens on average over 4 layers (60.2%), 64 tokens sent, "
        "64 of 64 patches (100.0%)"
    )
    assert counts_of(last_of(report)) == {"kept": 10, "pruned": 54}
    pruned_before = in_stages(sent=60)
    assert [name for name, _ in shown_of(pruned_before)] == [
        "sent",
        "after layer 1",
        "after layer 3",
    ]


# --- nothing forgets the second method ---

# Who reads the vision side of a configuration alone, and why that is right there.
VISION_ALONE = {
    "runtime": "it is the configuration",
    "hosts/llava/tower": "it is the tower",
    "hosts/hf/tower": "it is the tower",
    "hosts/hf/qwen/tower": "it is the tower",
    "hosts/hf/qwen/images": "what the tower sends; a method inside is refused there",
    "pruning/packing": "what the tower sends",
    "checkpoints/viewer": "what is read of the tower",
    "checkpoints/variants": "what is read of the tower",
    "checkpoints/before_loading": "the tower's layers; the language model's are checked beside",
    "bench/measure": "the floor of a method at the tower",
    "bench/memory": "what the tower sends; what is left inside is worked out below",
    "given": "handed on with the method inside",
    "pruning/pruning": "the tower's; `inside` stands beside",
    "accuracy/choice": "the choice at the tower",
}
PUTS_ON = ("attach", "install", "prune")
OTHER_INSTALLS = ("cli/doctor", "cli/extras")  # by pip, in words


def trees():
    for file in sorted(PACKAGE.rglob("*.py")):
        yield str(file.relative_to(PACKAGE).with_suffix("")), ast.parse(file.read_text())


def test_only_the_tower_reads_the_method_at_the_tower_alone():
    found = set()
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "method":
                owner = ast.unparse(node.value)
                if owner.rpartition(".")[2] in (
                    "pruning",
                    "chosen",
                    "config",
                    "variant",
                    "request",
                ):
                    found.add(name)
    assert found <= set(VISION_ALONE), sorted(found - set(VISION_ALONE))
    assert not hasattr(Variant(), "method")
    assert not hasattr(Request(), "method")


def test_whatever_puts_methods_on_a_model_hands_on_both():
    found = 0
    for name, tree in trees():
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            called = ast.unparse(node.func)
            if called.rpartition(".")[2] not in PUTS_ON or name in OTHER_INSTALLS:
                continue
            unpacked = [ast.unparse(k.value) for k in node.keywords if k.arg is None]
            given = {ast.unparse(argument).rpartition(".")[2] for argument in node.args}
            given |= {k.arg for k in node.keywords} | {u.rpartition(".")[2] for u in unpacked}
            assert given & {"inside", "arguments", "given", "pruning"}, (
                f"{name}: {ast.unparse(node)}"
            )
            found += 1
    assert found >= 5


@pytest.mark.parametrize(
    "name",
    [
        *("bench", "bench_settings", "show", "show_settings", "show_drawing"),
        *("accuracy", "run", "evaluate"),
    ],
)
def test_every_command_that_prunes_hands_on_the_whole_configuration(name):
    text = Path(cli.__file__).with_name(f"{name}.py").read_text()
    assert not re.search(r"pruning\.method\b", text)


def test_the_whole_of_a_configuration_is_in_what_is_put_on_a_model():
    whole = PruningConfig(HIVTP(), inside=FastV())
    assert PruningConfig.checked(**whole.arguments) == whole
    alone = PruningConfig.checked(FastV())
    assert PruningConfig.checked(**alone.arguments) == alone
    assert to_flags(Request(alone)) == ["--prune-method", "fastv", "--r-max", "0.5"]
