"""The protocol of every row of a table, measured or published."""

import csv
import dataclasses
import io

import pytest
from evaluation import lmms_result, stock_result

from llava_hvp.cli import main
from llava_hvp.evaluation.compare import compare
from llava_hvp.evaluation.measured import read_results
from llava_hvp.evaluation.published import TABLES, get_table
from llava_hvp.evaluation.rendering import comparison
from llava_hvp.runtime import PruningConfig

NEXT = "llava-v1.6-vicuna-7b"


def pruned(**options):
    """What a results file says of HiPrune with these options."""
    return {"options": {"num_tokens": 640, **options}}


def test_every_measured_row_names_its_protocol(tmp_path, capsys):
    facts = {"model_dtype": "float16", "vision_tower_dtype": "float16"}
    facts["vision_tower_attention"] = "eager"
    stock_result(tmp_path, "gqa", {"accuracy": 60.0}, model=NEXT, **facts)
    stock_result(tmp_path, "pope", {"f1": 60.0}, "hiprune", NEXT, **pruned(newline="all"), **facts)
    spatial = pruned(patch_merge="spatial", newline="rows")
    stock_result(tmp_path, "mme", {"perception": 1400.0}, "hiprune", NEXT, **spatial, **facts)
    line = ["table", str(tmp_path), "--format"]
    assert main([*line, "csv"]) == 0
    rows = {r["benchmark"]: r for r in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    named = ("tiling", "packing", "tokens of", "model dtype", "vision tower", "MME")
    assert {name: tuple(row[key] for key in named) for name, row in rows.items()} == {
        "gqa": ("stock", "stock", "image", "float16", "float16 eager", ""),
        "pope": ("stock", "stock, newline=all", "image", "float16", "float16 eager", ""),
        "mme": ("stock", "spatial", "image", "float16", "float16 eager", "perception"),
    }
    assert rows["pope"]["tokens"] == "192.0"
    assert main([*line, "terminal"]) == 0
    text = capsys.readouterr().out
    table, legend = text.split("\n\nProtocols:\n")
    assert {row.split()[-1] for row in table.splitlines()[2:]} == {"A", "B", "C"}
    assert len(legend.splitlines()) == 3
    (described,) = (row for row in legend.splitlines() if "spatial" in row)
    assert described[3:] == (
        "tiling stock; packing spatial; tokens of an image; model float16; "
        "vision tower float16 eager; MME perception."
    )


def test_a_llava_1_5_has_one_tile_and_what_no_result_says_is_not_stated(tmp_path):
    stock_result(tmp_path, "gqa", {"accuracy": 60.0})
    (result,) = read_results(tmp_path)
    assert str(result.protocol) == (
        "one tile an image; tokens of an image; not stated: dtype, vision tower"
    )


def test_lmms_evals_results_name_their_protocol(tmp_path):
    speed = {"avg_model bfloat16": 1.0, "avg_vision tower float32 sdpa": 1.0}
    scores = {"mme_cognition_score": 300.0, "mme_perception_score": 1500.0}
    lmms_result(tmp_path, "mme", scores, ",prune_method=hivtp,r_max=0.5", speed)
    (result,) = read_results(tmp_path)
    assert (result.protocol.dtype, result.protocol.tower) == ("bfloat16", "float32 sdpa")
    assert (result.metric, result.protocol.mme) == ("mme_cognition_score", "cognition")
    # Beside a paper's figure it is what the paper counts.
    (line,) = (each for each in compare(get_table("hivtp-1"), [result]).lines if each.is_measured)
    assert [p.mme for p in line.protocols] == ["perception"]
    assert get_table("hiprune-1").protocol.mme == "perception + cognition"


def test_figures_of_unlike_protocols_are_marked_where_both_are_known(tmp_path):
    for benchmark, newline in (("gqa", "rows"), ("mmbench", "all")):
        options = {"r_max": 0.5, "patch_merge": "stock", "newline": newline}
        facts = {"options": options, "model_dtype": "float16"}
        stock_result(
            tmp_path,
            benchmark,
            {"circular_accuracy": 60.0, "accuracy": 60.0},
            "hivtp",
            NEXT,
            **facts,
        )
    table, results = get_table("hivtp-2"), read_results(tmp_path)
    stated = dataclasses.replace(table.protocol, tiling="672", packing="stock, newline=all")
    rows = tuple(
        dataclasses.replace(row, pruning=PruningConfig.of("hivtp", r_max=0.5, newline="all"))
        if row.label == "HIVTP r_max 50%"
        else row
        for row in table.rows
    )
    for protocol, unlike in ((table.protocol, []), (stated, ["tiling"])):
        found = compare(dataclasses.replace(table, protocol=protocol, rows=rows), results)
        (line,) = (each for each in found.lines if each.is_measured)
        assert line.unlike(protocol) == unlike
        text = comparison(found, "terminal")
        assert ("unlike tiling " in text) == bool(unlike)
        (shown,) = (row for row in text.splitlines() if row.split()[:1] == ["measured"])
        assert shown.split()[1] == "B"
    assert (
        "A  tiling 672; packing stock, newline=all; tokens of an image; MME perception; not" in text
    )
    # What a source does not state is unlike nothing.
    assert "not stated: dtype, vision tower." in text
    cells = list(csv.DictReader(io.StringIO(comparison(found, "csv"))))
    assert {c["unlike"] for c in cells if c["setting"] == "HIVTP r_max 50%"} == {"tiling"}


@pytest.mark.parametrize("name", TABLES)
def test_every_published_row_names_its_protocol(name):
    text = comparison(compare(get_table(name), []), "terminal")
    rows = [row for row in text.splitlines() if " published " in row]
    assert len(rows) == len(get_table(name).rows)
    assert all(row.split(" published ")[1].split()[0] == "A" for row in rows)
    (legend,) = (row for row in text.splitlines() if row.startswith("A  "))
    assert "not stated: " in legend
    is_next = "next" in get_table(name).model.lower()
    assert ("one tile" in legend) == (not is_next)


def test_fastervlms_tiling_is_none_that_stock_llava_has(tmp_path):
    """Its figures of LLaVA-NeXT stand beside ours with a mark, those of LLaVA-1.5 without."""
    options = {"r_max": 0.25, "patch_merge": "spatial", "tower_attention": "stock"}
    stock_result(tmp_path, "gqa", {"accuracy": 60.0}, "fastervlm", NEXT, options=options)
    stock_result(tmp_path, "gqa", {"accuracy": 62.0}, model=NEXT)
    found = compare(get_table("fastervlm-next"), read_results(tmp_path))
    lines = {line.row.label: line.unlike(found.table.protocol) for line in found.lines}
    assert {label: unlike for label, unlike in lines.items() if unlike} == {
        "unpruned": ["tiling", "packing"],
        "FasterVLM 720 tokens": ["tiling"],
    }
    text = comparison(found, "markdown")
    assert (
        "A  tiling least padding; packing spatial; tokens of an image; MME perception; not" in text
    )
    assert get_table("fastervlm-1.5").protocol.tiling == "one tile"


def test_fastervlms_rows_are_those_of_its_page():
    table = get_table("fastervlm-1.5")
    rows = {row.label: row for row in table.rows}
    assert rows["FasterVLM 58 tokens"].pruning == PruningConfig.of("fastervlm", r_max=0.1)
    values = (71.92, 54.91, 53.01, 68.91, 55.28, 75.85, 1348.63, 60.57, 54.90)
    assert tuple(rows["FasterVLM 58 tokens"].values.values()) == values
    assert (rows["FasterVLM 58 tokens"].average, rows["FastV 58 tokens"].average) == (94.24, 87.97)
    assert rows["SparseVLM 144 tokens"].origin
    assert not rows["SparseVLM 144 tokens"].can_run
    assert len(table.own) == len(get_table("fastervlm-next").own) == 1 + 5
