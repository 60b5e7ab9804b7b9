"""The papers' figures, and measured ones beside them."""

import csv
import io
import json
import os

import pytest

from llava_hvp.cli import main
from llava_hvp.errors import EvaluationError, OptionError
from llava_hvp.evaluation.compare import compare
from llava_hvp.evaluation.measured import read_results
from llava_hvp.evaluation.plan import IMAGES, plan
from llava_hvp.evaluation.published import TABLES, average, get_table
from llava_hvp.lmms.arguments import method_of, model_args
from llava_hvp.methods import get_method


def test_hiprunes_averages_come_out_of_its_rows():
    table = get_table("hiprune-1")
    unpruned = table.unpruned.values
    averages = [round(average(row.values, unpruned), 1) for row in table.rows]
    assert averages == [100.0, 99.3, 97.5, 92.7] == [row.average for row in table.rows]


@pytest.mark.parametrize("name", TABLES)
def test_every_figure_has_a_column_and_every_row_a_method_that_exists(name):
    table = get_table(name)
    columns = {column.benchmark for column in table.columns}
    for row in table.rows:
        assert set(row.values) <= columns
        assert row.method is not None or row.label == "unpruned"
    assert all(c.task in IMAGES for c in table.columns if c.harness == "lmms-eval")


def test_hivtps_settings_are_those_of_the_paper():
    rows = {row.label: row for row in get_table("hivtp-1").rows}
    assert rows["HIVTP r_max 50%"].method == get_method("hivtp", r_max=0.5)
    assert rows["HIVTP r_max 50%"].values["mme"] == 1495.37
    ablations = {row.label: row for row in get_table("hivtp-3").rows}
    # The figure that cannot be read is not there, rather than made up.
    assert set(ablations["r=1, no regions"].values) == {"pope", "ai2d"}
    assert ablations["k=50, no windows"].method == get_method("hivtp", k=50, window=None)


def stock_result(folder, benchmark, metrics, method=None, model="llava-v1.5-7b", **more):
    """A results file of `llava-hvp eval`."""
    path = folder / model / (method or "unpruned") / benchmark / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "kind": "llava-hvp result",
        "benchmark": benchmark,
        "harness": "llava.eval",
        "metric": next(iter(metrics)),
        "metrics": metrics,
        "model": model,
        "method": method or "unpruned",
        "options": {"num_tokens": 192, "layers": None} if method else None,
        "settings": {"without_ocr": False},
        "kept_tokens": 192.0 if method else 576.0,
        "kept_of_stock": 0.3,
        "kept_of_patches": 0.3,
        "ttft_ms": 90.0,
        "tokens_per_second": 20.0,
    } | more
    if method:
        content["options"].pop("layers")
    path.write_text(json.dumps(content))
    return path


def lmms_result(folder, task, metrics, extra="", throughput=None):
    """A results file of lmms-eval."""
    path = folder / "lmms" / task / f"2026_{len(extra)}_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "results": {task: {"alias": task, **{f"{n},none": v for n, v in metrics.items()}}},
        "config": {"model": "llava_hvp", "model_args": f"pretrained=a/llava-v1.5-7b{extra}"},
        "throughput": throughput or {},
    }
    path.write_text(json.dumps(content))


def test_measured_beside_published_with_the_harness_it_came_from(tmp_path, capsys):
    stock_result(tmp_path, "mmbench", {"circular_accuracy": 65.0})
    stock_result(tmp_path, "mmbench", {"circular_accuracy": 62.4}, "hiprune")
    stock_result(tmp_path, "gqa", {"accuracy": 60.0})
    lmms_result(tmp_path, "pope", {"pope_f1_score": 0.86, "pope_f1_score_stderr": 0.1})
    hiprune = ",prune_method=hiprune,num_tokens=192"
    speed = {"avg_kept_tokens": 190.0, "avg_ttft_ms": 50.0}
    lmms_result(tmp_path, "pope", {"pope_f1_score": 0.85}, hiprune, speed)
    lmms_result(tmp_path, "mme", {"mme_perception_score": 1500, "mme_cognition_score": 300})
    # lmms-eval's figure is the published one's; the stock script's, though newer, is a stopgap.
    newer = stock_result(tmp_path, "pope", {"f1": 80.0, "accuracy": 81.0})
    os.utime(newer, (2e9, 2e9))
    found = compare(get_table("hiprune-1"), read_results(tmp_path))
    unpruned, most = found.lines[:2]
    assert unpruned.cells["mmbench"].measured == 65.0
    assert unpruned.cells["mmbench"].difference == pytest.approx(0.3)
    assert unpruned.cells["pope"].measured == pytest.approx(86.0)
    assert unpruned.cells["pope"].harness == "lmms-eval"
    assert unpruned.cells["gqa"].measured == 60.0
    assert unpruned.cells["mme"].measured == 1800
    assert found.other_harness == ["GQA"]
    assert [r.benchmark for r in found.unused] == ["pope"]
    assert most.cells["pope"].difference == pytest.approx(85 - 86.1)
    assert most.average.measured == pytest.approx(100 * (62.4 / 65 + 85 / 86) / 2)
    assert most.averaged == 2
    assert most.kept_tokens.measured == pytest.approx((192 + 190) / 2)
    assert most.ttft_ms.measured == pytest.approx((90 + 50) / 2)

    out = tmp_path / "plot.png"
    assert main(["table", str(tmp_path), "--against", "hiprune-1", "--plot", str(out)]) == 0
    text = capsys.readouterr().out
    assert "99.3" in text
    assert "of 2" in text
    assert "another harness than published" in text
    assert out.read_bytes().startswith(b"\x89PNG")
    assert main(["table", str(tmp_path), "--against", "hiprune-1", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    (cell,) = [r for r in rows if r["setting"] == "unpruned" and r["figure"] == "MMBench"]
    assert (cell["published"], cell["measured"]) == ("64.7", "65.0")
    assert main(["table", str(tmp_path), "--format", "markdown"]) == 0
    assert "| hiprune num_tokens=192 | mmbench" in capsys.readouterr().out


def test_runs_of_none_are_the_unpruned_row(tmp_path):
    lmms_result(tmp_path, "pope", {"pope_f1_score": 0.86}, ",prune_method=none,r_max=0.5")
    (result,) = read_results(tmp_path)
    assert result.method is None
    unpruned = compare(get_table("hiprune-1"), [result]).lines[0]
    assert unpruned.cells["pope"].measured == pytest.approx(86.0)


def test_textvqa_without_ocr_tokens_stands_beside_lmms_eval_only(tmp_path):
    stock_result(tmp_path, "textvqa", {"accuracy": 46.0}, settings={"without_ocr": True})
    results = read_results(tmp_path)
    assert compare(get_table("hiprune-1"), results).lines[0].cells["textvqa"].measured is None
    assert compare(get_table("hivtp-1"), results).lines[0].cells["textvqa"].measured == 46.0


def test_two_models_in_a_folder_are_refused_until_one_is_named(tmp_path, capsys):
    paths = [
        stock_result(tmp_path, "gqa", {"accuracy": 60.0}, model=model) for model in ("one", "two")
    ]
    before = [path.read_bytes() for path in paths]
    assert main(["table", str(tmp_path)]) == 2
    assert "results of 2 models, one, two: give --model one" in capsys.readouterr().err
    assert main(["table", str(tmp_path), "--model", "two"]) == 0
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no such folder"),
        (["."], "has no results"),
        ([".", "--against", "hivtp-9"], "unknown table 'hivtp-9': give one of hivtp-1"),
        ([".", "--format", "pdf"], "--format pdf"),
        ([], "give a folder of results"),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["table", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_damaged_results_file_is_named(tmp_path):
    path = stock_result(tmp_path, "gqa", {"accuracy": 60.0})
    path.write_text(path.read_text()[:50])
    with pytest.raises(EvaluationError, match=r"cannot read .*result\.json"):
        read_results(tmp_path)


def test_each_step_of_a_table_runs_through_its_harness(tmp_path, capsys):
    steps = plan(
        get_table("hiprune-1"),
        model_path="liuhaotian/llava-v1.5-7b",
        data=tmp_path,
        out=tmp_path / "out",
        gpus=("0", "1"),
        device=None,
    )
    assert len(steps) == 4 * 9
    by_name = {(s.row.label, s.column.benchmark): s for s in steps}
    text = str(by_name["HiPrune 64 tokens", "textvqa"])
    assert "llava_hvp eval textvqa" in text
    assert "--ocr --prune-method hiprune --num-tokens 64" in text
    text = str(by_name["HiPrune 64 tokens", "gqa"])
    assert "CUDA_VISIBLE_DEVICES=0,1 " in text
    assert "--num_processes 2 -m lmms_eval --model llava_hvp" in text
    assert "prune_method=hiprune,num_tokens=64 --tasks gqa" in text
    line = ["reproduce", "hivtp-3", "--model-path", "m", "--data", str(tmp_path), "--dry-run"]
    assert main([*line, "--only", "pope"]) == 0
    listed = capsys.readouterr().out
    assert "8 commands, about 72000 images" in listed
    assert "layers=20+21+22+23" in listed
    assert main([*line, "--only", "gqa"]) == 2
    assert "hivtp-3 has ai2d, mme, pope" in capsys.readouterr().err


@pytest.mark.parametrize("name", TABLES)
def test_model_args_and_methods_are_two_ways_to_write_the_same(name):
    for row in get_table(name).rows:
        pairs = dict(pair.split("=", 1) for pair in model_args("p", row.method).split(","))
        assert pairs.pop("pretrained") == "p"
        assert method_of(pairs.pop("prune_method", None), pairs_typed(pairs)) == row.method


def pairs_typed(pairs):
    """As lmms-eval reads them: numbers are numbers."""
    typed = {}
    for key, value in pairs.items():
        try:
            typed[key] = json.loads(value)
        except ValueError:
            typed[key] = value
    return typed


def test_options_without_a_method_are_refused():
    with pytest.raises(OptionError, match="unknown argument 'r_max'"):
        method_of(None, {"r_max": 0.5})
    with pytest.raises(OptionError, match="unknown option 'rmax'"):
        method_of("hivtp", {"rmax": 0.5})
