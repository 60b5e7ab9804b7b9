"""What works with the README's install alone, and what is said where an extra is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchdata import WRITERS
from evaluation import environment

from llava_hvp.accuracy.scores import VariantScore
from llava_hvp.accuracy.tables import render
from llava_hvp.cli import main
from llava_hvp.cli.extras import HOST, NEEDED, is_there
from llava_hvp.errors import OptionError
from llava_hvp.evaluation.benchmarks import get_benchmark
from llava_hvp.evaluation.data import find_data
from llava_hvp.shapes import checkpoint
from llava_hvp.tables import MARKDOWN, TERMINAL, aligned, text_table

ROOT = Path(__file__).parent.parent
# What our extras bring, apart from `host`, and tabulate, which accuracy once could not do without.
EXTRAS = [needed.module for needed in NEEDED if needed.extra != HOST] + ["tabulate", "sklearn"]
WITHOUT = "import sys; sys.modules |= dict.fromkeys({modules!r}); import llava_hvp.cli as cli; "


def call(line, cwd, without=EXTRAS):
    """Type a line of `llava-hvp` where some modules cannot be imported."""
    code = WITHOUT.format(modules=list(without)) + f"sys.exit(cli.main({line.split()!r}))"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )


def test_accuracy_works_with_the_readmes_install(tmp_path):
    result = call("accuracy --questions 6 --methods hivtp --r-max 0.5 --out results", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "hivtp" in result.stdout
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == [
        "llava-shapes.json",
        "llava-shapes.md",
    ]
    told = "matplotlib is missing, so there will be no plot: pip install 'llava-hvp[plots]'"
    assert f"llava-hvp: {told}" in result.stderr.splitlines()


def test_bench_works_with_the_readmes_install(tmp_path):
    line = "bench --geometry llava-1.5-tiny --methods random --r-max 0.5 --rounds 2 --new-tokens 2"
    result = call(f"{line} --device cpu --out results", tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(p.suffix for p in (tmp_path / "results").iterdir()) == [".json", ".md"]
    assert "matplotlib is missing" in result.stderr


def test_a_papers_table_needs_nothing(tmp_path):
    result = call("table --against hivtp-1 --format markdown", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| published " in result.stdout


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("table --against hivtp-1 --plot x.png", "matplotlib is missing: pip install 'llava-hvp[p"),
        ("show {model} --load-4bit --html k.html", "bitsandbytes is missing: pip install 'llava-"),
        ("show {lora} --html k.html", "peft is missing, which LoRA checkpoints need: pip install "),
        ("bench --geometry llava-1.5-tiny --load-8bit", "bitsandbytes is missing: pip install '"),
    ],
)
def test_a_command_that_needs_more_says_so_before_it_starts(tmp_path, line, told):
    picture = f"--image-file {ROOT / 'docs' / 'shapes.png'} --device cpu --model-path"
    model = f"{picture} {checkpoint(tmp_path)}"
    lora = f"{picture} llava-lora --model-base {tmp_path / 'llava-shapes'}"
    result = call(line.format(model=model, lora=lora), tmp_path)
    assert result.returncode == 2, result.stderr
    (said,) = [x for x in result.stderr.splitlines() if x.startswith("llava-hvp: error: ")]
    assert told in said
    assert result.stdout == ""


@pytest.mark.parametrize("module", ["pandas", "openpyxl"])
def test_what_mmbench_writes_at_its_end_is_looked_for_at_its_start(tmp_path, monkeypatch, module):
    WRITERS["mmbench"](tmp_path)
    find_data(get_benchmark("mmbench"), tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OptionError, match=rf"^{module} is missing, which MMBench needs: pip inst"):
        find_data(get_benchmark("mmbench"), tmp_path)


def test_the_doctor_lists_what_each_command_lacks(tmp_path):
    result = call("doctor", tmp_path)
    assert result.returncode == 0, result.stdout
    assert "no problems found" in result.stdout
    for words in (
        "matplotlib   missing, for plots of llava-hvp accuracy, bench and table: pip install 'lla",
        "fastapi      missing, for LLaVA's controller and model_worker: pip install 'llava-hvp[wo",
        "openpyxl     missing, for LLaVA's model_vqa_mmbench and llava-hvp eval mmbench: pip inst",
        "bitsandbytes missing, for --load-4bit and --load-8bit: pip install 'llava-hvp[quantized]'",
    ):
        assert f"\n{words}" in result.stdout
    assert len(result.stdout.splitlines()) <= 25


def test_the_doctor_finds_a_problem_where_llava_loads_nothing(tmp_path):
    result = call("doctor", tmp_path, without=["sentencepiece"])
    assert result.returncode == 1
    assert "PROBLEM      sentencepiece is missing, for every LLaVA checkpoint" in result.stdout
    assert "mend it:  pip install 'llava-hvp[host]'" in result.stdout
    assert result.stdout.count("PROBLEM") == 1


def test_every_extra_that_the_doctor_names_is_one_and_brings_that():
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("[tool.")[0]
    brought = dict(line.split(" = ") for line in extras.splitlines() if " = [" in line)
    for needed in NEEDED:
        assert f'"{needed.distribution}' in brought[needed.extra], needed
    assert not is_there("no_such.module")


# --- tables without tabulate ---


@pytest.mark.parametrize("name", ["llava-shapes", "llava-shapes-next", "llava-shapes-detail"])
def test_a_committed_table_is_what_its_numbers_give(name):
    base = ROOT / "docs" / "results" / "accuracy" / name
    facts = json.loads(base.with_suffix(".json").read_text())
    scores = [VariantScore(**row) for row in facts.pop("rows")]
    assert render(facts, scores, MARKDOWN) == base.with_suffix(".md").read_text()


def test_a_table_for_a_terminal_and_for_markdown():
    rows = [{"a": "1", "bcd": ""}, {"a": "12345", "bcd": "± 2"}]
    assert text_table(rows, TERMINAL).splitlines() == [
        "a      bcd",
        "-----  -----",
        "1",
        "12345  ± 2",
    ]
    assert text_table(rows, MARKDOWN).splitlines() == [
        "| a     | bcd   |",
        "|-------|-------|",
        "| 1     |       |",
        "| 12345 | ± 2   |",
    ]
    assert text_table([], MARKDOWN) == ""


def test_headings_may_be_the_same():
    assert aligned(("a", "x", "x"), [("1", "2", "3")], TERMINAL).splitlines() == [
        "a    x    x",
        "---  ---  ---",
        "1    2    3",
    ]
    assert aligned(("a", "x", "x"), [], TERMINAL) == ""


def test_the_tables_of_the_command_line_are_these(capsys):
    assert main(["table", "--against", "hivtp-1"]) == 0
    assert "\n-----" in capsys.readouterr().out
