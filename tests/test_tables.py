"""The papers' figures, and measured ones beside them."""

import csv
import dataclasses
import io
import json
import os

import pytest
from evaluation import lmms_result, stock_result

from llava_hvp.cli import main
from llava_hvp.errors import EvaluationError, OptionError
from llava_hvp.evaluation.compare import compare
from llava_hvp.evaluation.measured import read_results
from llava_hvp.evaluation.model_args import model_args, pruning_of
from llava_hvp.evaluation.plan import IMAGES, check_checkpoint, is_done, plan
from llava_hvp.evaluation.published import TABLES, average, get_table
from llava_hvp.evaluation.rendering import comparison
from llava_hvp.runtime import PruningConfig


def test_hiprunes_averages_come_out_of_its_rows():
    table = get_table("hiprune-1")
    unpruned = table.unpruned.values
    averages = [round(average(row.values, unpruned), 1) for row in table.own]
    assert averages == [100.0, 99.3, 97.5, 92.7] == [row.average for row in table.own]
    unlike = {
        row.label: round(average(row.values, unpruned) - row.average, 1)
        for row in table.rows
        if abs(average(row.values, unpruned) - row.average) > 0.08
    }
    # As printed, and the table says so of the one that is far off.
    assert unlike == {"FastV 64 tokens": 0.6, "PyramidDrop 64 tokens": -0.1}
    assert any("77.3" in note and "76.7" in note for note in table.notes)


@pytest.mark.parametrize("name", TABLES)
def test_every_figure_has_a_column_and_every_row_a_method_that_exists(name):
    table = get_table(name)
    columns = {column.benchmark for column in table.columns}
    for row in table.rows:
        assert set(row.values) <= columns
        assert (row.method is None) == (row.label == "unpruned")
        if row.pruning is not None:
            assert row.pruning.name == row.method
        else:
            assert row.is_unpruned or "inside the language model" in row.remark
    assert [row for row in table.rows if row.is_unpruned] == [
        row for row in (table.unpruned,) if row
    ]
    assert all(c.task in IMAGES for c in table.columns if c.harness == "lmms-eval")


def test_hivtps_settings_are_those_of_the_paper():
    rows = {row.label: row for row in get_table("hivtp-1").rows}
    assert rows["HIVTP r_max 50%"].pruning == PruningConfig.of("hivtp", r_max=0.5)
    assert rows["HIVTP r_max 50%"].values["mme"] == 1495.37
    ablations = {row.label: row for row in get_table("hivtp-3").rows}
    # The figure that cannot be read is not there, rather than made up.
    assert set(ablations["r=1, no regions"].values) == {"pope", "ai2d"}
    assert ablations["k=50, no windows"].pruning == PruningConfig.of("hivtp", k=50, window=None)


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


def test_rows_of_prior_methods_say_who_made_them_and_stand_with_their_budget():
    table = get_table("hivtp-1")
    assert [row.label for row in table.rows[1:7]] == [
        *("HIVTP r_max 75%", "FoPru 75%", "VisionZip 75%", "PruMerge 75%", "HiRED 75%"),
        "HIVTP r_max 50%",
    ]
    assert {row.origin for row in table.rows if row.method not in (None, "hivtp")} == {
        "HIVTP's authors ran it"
    }
    assert len(table.rows) == len(get_table("hivtp-2").rows) == 5 + 4 * 4
    hired = next(row for row in table.rows if row.label == "HiRED 25%")
    assert hired.pruning == PruningConfig.of("hired", r_max=0.25)
    assert (hired.values["mme"], hired.ttft_ms) == (1436.28, 77)
    rows = {row.label: row for row in get_table("hiprune-1").rows}
    assert len(rows) == 4 + 3 * 5
    # A dagger in HiPrune's table says that its authors ran it; without one it does not say.
    assert rows["HiRED 64 tokens"].origin == rows["SparseVLM 64 tokens"].origin
    assert rows["HiRED 64 tokens"].origin == "HiPrune's authors ran it"
    assert "does not say" in rows["VisionZip 64 tokens"].origin
    assert set(rows["VisionZip 64 tokens"].values) == set(rows["unpruned"].values) - {
        *("mmbench_cn", "vizwiz"),
    }
    assert "206.5, 145.4 and 82.3" in rows["SparseVLM 192 tokens"].remark


def test_a_prior_methods_row_is_set_beside_what_was_measured_of_it(tmp_path, capsys):
    stock_result(tmp_path, "mmbench", {"circular_accuracy": 64.0})
    stock_result(tmp_path, "mmbench", {"circular_accuracy": 62.0}, "visionzip")
    found = compare(get_table("hiprune-1"), read_results(tmp_path))
    lines = {line.row.label: line for line in found.lines}
    line = lines["VisionZip 192 tokens"]
    assert line.cells["mmbench"].difference == pytest.approx(62.0 - 63.0)
    assert (line.average.published, line.published_averaged) == (97.7, 7)
    assert [name for name, line in lines.items() if line.is_measured] == [
        "unpruned",
        "VisionZip 192 tokens",
    ]
    # Unpruned results are not of a method that prunes inside the language model.
    assert lines["FastV 192 tokens"].cells["mmbench"].measured is None
    assert found.unused == []

    assert main(["table", str(tmp_path), "--against", "hiprune-1"]) == 0
    text = capsys.readouterr().out
    rows = text.splitlines()
    at = next(n for n, row in enumerate(rows) if row.startswith("VisionZip 192 tokens [d]"))
    assert "97.7 of 7" in rows[at]
    assert rows[at + 1].split()[0] == "measured"
    assert "-1.00" in rows[at + 2]
    assert "[d] VisionZip: HiPrune's table does not say who ran it." in text
    assert "Prior methods as HiPrune, Table 1 has them, which need not be what" in text
    assert "[c] SparseVLM: HiPrune's authors ran it; prunes inside the language model: 192" in text
    assert sum(row.split()[:1] == ["measured"] for row in rows) == 2  # nothing is left blank
    assert main(["table", str(tmp_path), "--against", "hiprune-1", "--format", "csv"]) == 0
    cells = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {c["origin"] for c in cells if c["setting"] == "HiPrune 192 tokens"} == {
        "HiPrune, Table 1"
    }
    assert {c["origin"] for c in cells if c["setting"] == "HiRED 192 tokens"} == {
        "HiPrune's authors ran it"
    }


def test_a_table_of_prior_methods_alone_runs_none_by_itself(tmp_path, capsys):
    line = ["reproduce", "eadp-1", "--model-path", "m", "--data", str(tmp_path), "--dry-run"]
    assert main([*line, "--only", "gqa"]) == 2
    assert "eadp-1 has rows of prior methods only: give --prior" in capsys.readouterr().err
    assert main(["table", "--against", "eadp-1"]) == 0
    assert "are by a harness not stated, likely llava.eval: VQAv2" in capsys.readouterr().out
    assert main([*line, "--only", "gqa", "--prior"]) == 0
    listed = capsys.readouterr().out
    assert "# 3 commands" in listed
    assert "--prune-method cdpruner --num-tokens 64" in listed


def test_rows_of_prior_methods_run_only_when_asked_for(tmp_path, capsys):
    line = ["reproduce", "hiprune-1", "--model-path", "m", "--data", str(tmp_path), "--dry-run"]
    assert main([*line, "--only", "pope"]) == 0
    listed = capsys.readouterr().out
    assert "# 4 commands" in listed
    assert "visionzip" not in listed
    assert main([*line, "--only", "pope", "--prior", "--as-released"]) == 0
    listed = capsys.readouterr().out
    assert "# 19 commands" in listed
    assert "prune_method=visionzip,num_tokens=64,tower_attention=stock --tasks pope" in listed
    assert "prune_method=hired,num_tokens=64,tower_attention=stock --tasks pope" in listed
    assert listed.count("variant=code") == 3  # HiPrune's own rows


OTHER = (
    "Measured with {model}, which is not llava-v1.5-7b by its name: these are figures of two "
    "models, so there are no differences"
)


@pytest.fixture
def plotted(monkeypatch):
    """The figures that were saved."""
    from matplotlib.figure import Figure

    figures, stock = [], Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def against(folder, form, capsys):
    plot = folder / "plot.png"
    line = ["table", str(folder), "--against", "hiprune-1", "--format", form, "--plot", str(plot)]
    assert main(line) == 0
    return capsys.readouterr()


@pytest.mark.parametrize("model", ["llava-shapes", "my-llava-v1.5-7b", "llava-v1.5-7b-finetuned"])
def test_another_model_is_shown_with_a_mark_and_without_a_difference(
    model, tmp_path, capsys, plotted
):
    for method in (None, "hiprune"):
        stock_result(tmp_path, "mmbench", {"circular_accuracy": 60.0}, method, model)
    found = compare(get_table("hiprune-1"), read_results(tmp_path))
    cells = [each for line in found.lines for each in (*line.cells.values(), line.kept_tokens)]
    cells += [line.average for line in found.lines]
    assert sum(cell.measured is not None for cell in cells) == 6
    assert all(cell.difference is None for cell in cells)
    for form in ("terminal", "markdown"):
        lines = against(tmp_path, form, capsys).out.splitlines()
        assert f"* {OTHER.format(model=model)}." in lines
        assert sum("measured*" in line and "60.00" in line for line in lines) == 2
        assert not any("difference " in line or "-4.70" in line for line in lines)
    said = against(tmp_path, "csv", capsys)
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert {row["difference"] for row in rows} == {""}
    assert {row["measured"] for row in rows if row["figure"] == "MMBench"} == {"60.0", ""}
    assert {row["measured_model"] for row in rows} == {model}
    assert {row["published_model"] for row in rows} == {"llava-v1.5-7b"}
    assert said.err == f"llava-hvp: {OTHER.format(model=model)}\n"
    assert len(plotted) == 3
    for figure in plotted:
        assert figure.get_suptitle().endswith(f"\n* {OTHER.format(model=model)}")
        assert [t.get_text() for t in figure.legends[0].texts][1] == "measured*"


@pytest.mark.parametrize("model", ["llava-v1.5-7b", "LLaVA-v1.5-7B"])
def test_the_tables_own_model_is_not_marked(model, tmp_path, capsys, plotted):
    stock_result(tmp_path, "mmbench", {"circular_accuracy": 60.0}, model=model)
    lines = against(tmp_path, "terminal", capsys).out.splitlines()
    assert not any("*" in line or "two models" in line for line in lines)
    assert any("difference" in line and "-4.70" in line for line in lines)
    said = against(tmp_path, "csv", capsys)
    assert said.err == ""
    (row,) = [r for r in csv.DictReader(io.StringIO(said.out)) if r["measured"] == "60.0"]
    assert float(row["difference"]) == pytest.approx(-4.7)
    assert "two models" not in plotted[0].get_suptitle()
    assert main(["table", "--against", "hiprune-1"]) == 0
    assert "two models" not in capsys.readouterr().out


def test_runs_of_none_are_the_unpruned_row(tmp_path):
    lmms_result(tmp_path, "pope", {"pope_f1_score": 0.86}, ",prune_method=none,r_max=0.5")
    (result,) = read_results(tmp_path)
    assert result.pruning is None
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
    pruned = "prune_method=hiprune,num_tokens=64,tower_attention=stock"
    assert f"{pruned} --tasks gqa" in text
    text = str(by_name["unpruned", "gqa"])
    assert "prune" not in text.partition("--tasks")[0].partition("--model_args")[2]
    line = ["reproduce", "hivtp-3", "--model-path", "m", "--data", str(tmp_path), "--dry-run"]
    assert main([*line, "--only", "pope"]) == 0
    listed = capsys.readouterr().out
    assert "8 commands, about 72000 images" in listed
    assert "layers=20+21+22+23" in listed
    assert main([*line, "--only", "gqa"]) == 2
    assert "hivtp-3 has ai2d, mme, pope" in capsys.readouterr().err


def test_lmms_results_of_a_checkpoint_that_has_changed_are_refused(tmp_path):
    checkpoint, out = tmp_path / "llava-v1.5-7b", tmp_path / "out"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    given = {"model_path": str(checkpoint), "out": out}
    arguments = given | {"data": tmp_path, "gpus": ("0",), "device": "cpu"}
    (step,) = plan(get_table("hiprune-1"), only=["gqa"], **arguments)[:1]
    check_checkpoint(step, **given)
    check_checkpoint(step, **given)
    folder = out / "lmms-eval" / "llava-v1.5-7b" / "unpruned"
    (folder / "2026_results.json").write_text("{}")
    check_checkpoint(step, **given)
    (checkpoint / "model.safetensors").write_bytes(b"WEIGHTS")
    with pytest.raises(EvaluationError, match=r"may not be this checkpoint's: model.safetensors"):
        check_checkpoint(step, **given)
    (folder / "checkpoint.json").unlink()
    with pytest.raises(EvaluationError, match="they are from a release that knew a checkpoint by"):
        check_checkpoint(step, **given)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_reproduced_with_the_towers_own_attention(name, tmp_path):
    """The released codes' own: another rounds otherwise, and keeps other patches in half."""
    given = {"model_path": "m", "data": tmp_path, "out": tmp_path, "gpus": ("0",)}
    steps = plan(get_table(name), **given, device=None, prior=True)
    for step in steps:
        command = " ".join(step.command)
        assert (step.row.pruning is None) == ("tower_attention=stock" not in command), command
    given = {step.row.pruning for step in steps if step.row.pruning is not None}
    assert {pruning.runtime.tower_attention for pruning in given} == {"stock"}


def test_a_result_by_another_attention_does_not_pass_for_a_step_of_a_table(tmp_path):
    """But it stands beside the published figures, and the table says so; its own comes first."""
    pruned, speed = ",prune_method=hiprune,num_tokens=192", {"avg_vision tower float16 sdpa": 1.0}
    lmms_result(tmp_path, "pope", {"pope_f1_score": 0.80}, pruned, speed)
    table = get_table("hiprune-1")
    arguments = {"model_path": "a/llava-v1.5-7b", "data": tmp_path, "out": tmp_path}
    steps = plan(table, **arguments, gpus=("0",), device=None, only=["pope"])
    (step,) = (s for s in steps if s.row.label == "HiPrune 192 tokens")
    assert not is_done(step, tmp_path, "a/llava-v1.5-7b")
    found = compare(table, read_results(tmp_path))
    assert found.lines[1].cells["pope"].measured == pytest.approx(80)
    assert ([p.tower for p in found.lines[1].protocols], found.fused) == (
        ["float16 sdpa"],
        ["pope"],
    )
    text = comparison(found, "terminal")
    assert "vision tower float16 sdpa" in text
    assert "keeps other patches in half precision: pope." in text

    stock, speed = f"{pruned},tower_attention=stock", {"avg_vision tower float16 eager": 1.0}
    lmms_result(tmp_path, "pope", {"pope_f1_score": 0.85}, stock, speed)
    older = min(tmp_path.rglob("*_results.json"), key=lambda p: len(p.read_text()))
    os.utime(older, (2e9, 2e9))  # newest, and of the other attention
    assert is_done(step, tmp_path, "a/llava-v1.5-7b")
    found = compare(table, read_results(tmp_path))
    assert found.lines[1].cells["pope"].measured == pytest.approx(85)
    assert ([p.tower for p in found.lines[1].protocols], found.fused) == (["float16 eager"], [])
    assert "keeps other patches" not in comparison(found, "terminal")


def test_how_the_tower_ran_is_listed(tmp_path, capsys):
    tower = {"vision_tower_dtype": "bfloat16", "vision_tower_attention": "eager"}
    stock_result(tmp_path, "gqa", {"accuracy": 60.0}, "hiprune", **tower)
    stock_result(tmp_path, "mmbench", {"circular_accuracy": 60.0})  # of an older release
    assert main(["table", str(tmp_path), "--format", "csv"]) == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert {r["benchmark"]: r["vision tower"] for r in rows} == {
        "gqa": "bfloat16 eager",
        "mmbench": "",
    }


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("hivtp-1", "layers", (7, 8, 9)), ("hiprune-1", "variant", "code")],
)
def test_rows_as_released_have_the_same_figures_and_the_released_rule(name, option, value):
    table = get_table(name)
    beside, instead = table.released(beside=True), table.released(beside=False)
    assert [row for row in beside.rows if row in table.rows] == list(table.rows)
    assert len(beside.own) == 2 * len(table.own) - 1
    assert [row.label for row in instead.own] == [
        "unpruned",
        *(f"{row.label}, as released" for row in table.own[1:]),
    ]
    prior = [row for row in table.rows if row.origin]
    assert prior == [row for row in instead.rows if row.origin]
    for row, own in zip(instead.own[1:], table.own[1:], strict=True):
        assert getattr(row.pruning.method, option) == value != getattr(own.pruning.method, option)
        assert (
            dataclasses.replace(row.pruning.method, **{option: getattr(own.pruning.method, option)})
            == own.pruning.method
        )
        assert (row.values, row.kept_tokens) == (own.values, own.kept_tokens)


def test_the_commands_run_and_show_rows_as_released(tmp_path, capsys):
    line = ["reproduce", "hivtp-1", "--model-path", "m", "--data", str(tmp_path), "--dry-run"]
    assert main([*line, "--only", "pope"]) == 0
    assert "layers=7+8+9" not in capsys.readouterr().out
    assert main([*line, "--only", "pope", "--as-released"]) == 0
    listed = capsys.readouterr().out
    assert "5 commands" in listed
    assert listed.count("r_max=0.5,tower_attention=stock,layers=7+8+9 ") == 1
    line[1] = "hiprune-1"
    assert main([*line, "--only", "mmbench", "--as-released"]) == 0
    listed = capsys.readouterr().out
    released = "--num-tokens 64 --prune-opt tower_attention=stock --prune-opt variant=code"
    assert listed.count(released) == 1

    released = {"num_tokens": 64, "variant": "code", "tower_attention": "stock", "layers": None}
    stock_result(tmp_path, "mmbench", {"circular_accuracy": 60.0}, "hiprune", options=released)
    against = ["table", str(tmp_path), "--against", "hiprune-1"]
    assert main(against) == 0
    text = capsys.readouterr().out
    assert "as released" not in text
    assert "in no figure of this table: mmbench (hiprune num_tokens=64 tower" in text
    out = tmp_path / "plot.png"
    assert main([*against, "--as-released", "--format", "csv", "--plot", str(out)]) == 0
    rows = [r for r in csv.DictReader(io.StringIO(capsys.readouterr().out)) if r["measured"]]
    (cell,) = (r for r in rows if r["figure"] == "MMBench")
    assert cell["setting"] == "HiPrune 64 tokens, as released"
    assert (cell["published"], cell["measured"]) == ("59.5", "60.0")
    assert out.read_bytes().startswith(b"\x89PNG")

    assert main(["table", "--against", "hivtp-3", "--as-released"]) == 2
    assert "hivtp-3 has no rows as released: hivtp-1, hiprune-1 have" in capsys.readouterr().err
    assert main(["table", str(tmp_path), "--as-released"]) == 2
    assert "--as-released goes with --against NAME" in capsys.readouterr().err


@pytest.mark.parametrize("name", TABLES)
def test_model_args_and_methods_are_two_ways_to_write_the_same(name):
    for row in get_table(name).rows:
        if not row.can_run:
            continue
        pairs = dict(pair.split("=", 1) for pair in model_args("p", row.pruning).split(","))
        assert pairs.pop("pretrained") == "p"
        assert pruning_of(pairs.pop("prune_method", None), pairs_typed(pairs)) == row.pruning


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
        pruning_of(None, {"r_max": 0.5})
    with pytest.raises(OptionError, match="unknown option 'rmax'"):
        pruning_of("hivtp", {"rmax": 0.5})
