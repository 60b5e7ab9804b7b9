"""`llava-hvp bench --fit`: bytes worked out from shapes are those that torch reports."""

import json
import re
from pathlib import Path

import pytest
import torch

from llava_hvp.bench import subject
from llava_hvp.bench.clock import Clock
from llava_hvp.bench.memory import Layout, memory, most, visual_tokens, weights
from llava_hvp.bench.phases import Bench
from llava_hvp.bench.workload import make_workload, pattern
from llava_hvp.checkpoints.geometry import Language, LlavaGeometry, Vision, get_geometry
from llava_hvp.checkpoints.variants import Variant, variants
from llava_hvp.cli import main
from llava_hvp.cli.fit import bytes_of
from llava_hvp.errors import OptionError
from llava_hvp.runtime import PruningConfig

ROOT = Path(__file__).parent.parent
TEXT = 49
# In a decoder as wide as a 7B's beside its vocabulary the MLP takes more than the logits.
VISION = Vision(hidden=64, layers=12, heads=4, mlp=256, image=112, select=11)
LANGUAGE = Language(hidden=64, layers=6, heads=4, kv_heads=2, mlp=512, vocab=1000)


def stored(model):
    """Bytes of all weights and buffers, and of what unpacks the quantised ones."""
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        state = getattr(tensor, "quant_state", None)
        nested = getattr(state, "state2", None)
        parts = [tensor, *(getattr(state, n, None) for n in ("absmax", "code", "offset"))]
        parts += [getattr(nested, n, None) for n in ("absmax", "code")]
        total += sum(part.numel() * part.element_size() for part in parts if part is not None)
    return total


@pytest.mark.parametrize(
    ("name", "tiles", "bits"),
    [
        ("llava-wide", 1, None),
        ("llava-next-wide", 5, None),
        ("llava-next-wide", 5, 4),
    ],
)
def test_what_is_worked_out_is_what_the_allocator_reports(name, tiles, bits, monkeypatch):
    geometry = LlavaGeometry(name, VISION, LANGUAGE, tiles)
    monkeypatch.setattr(subject, "get_geometry", lambda _: geometry)
    dtype = torch.float32 if bits is None else torch.float16
    (what,) = subject.of_geometry(
        name, ["llava"], "cpu", dtype, tower_dtype=None, bits=bits, text_tokens=TEXT, seed=0
    )
    layout = Layout(dtype.itemsize, dtype.itemsize, bits is not None, "cpu")
    assert weights(geometry, layout) == pytest.approx(stored(what.checkpoint.model), rel=0.01)
    batch = 2
    work = make_workload(
        what.checkpoint,
        [pattern((640, 640), seed) for seed in range(batch)],  # a picture of all tiles
        what.prompt,
        new_tokens=2,
    )
    bench = Bench(what.checkpoint, VISION, work, Clock(torch.device("cpu")))
    chosen = [Variant(), *variants(["hivtp", "fastv"], [{"r_max": 0.5}])[1:]]
    bench.generate(2)  # a kernel's first call has memory of its own
    for variant in chosen[: 2 if bits else 3]:
        with what.checkpoint.pruned_by(variant):
            tokens = bench.prepare()["inputs_embeds"].shape[1] - TEXT
            measured = bench.clock.peak_bytes(lambda: bench.generate(2))
        said = memory(geometry, variant, layout, batch=batch, text_tokens=TEXT, new_tokens=2)
        assert visual_tokens(geometry, variant.pruning)[0] == tokens
        assert said.total - said.weights - said.inputs == pytest.approx(measured, rel=0.1), variant


def test_the_committed_peaks_are_worked_out_too():
    """Of the real tower before a Llama of 160 M."""
    file = ROOT / "docs" / "results" / "cpu" / "llava-1.5-160m-cpu.json"
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) > 4
    for row in rows:
        options = dict(part.split("=") for part in row["options"].split())
        given = {name: float(value) for name, value in options.items()}
        pruning = None if row["method"] == "none" else PruningConfig.of(row["method"], **given)
        said = memory(
            get_geometry("llava-1.5-160m"),
            Variant(pruning),
            Layout(4, 4, device="cpu"),
            batch=1,
            text_tokens=TEXT,
            new_tokens=2,
        )
        for phase, bytes_ in (("encode", said.encode), ("prefill", said.prefill)):
            measured = row["peak_bytes"]["answer" if phase == "prefill" else phase]
            assert bytes_ == pytest.approx(measured, rel=0.1), (row["method"], phase)


def test_what_fits_is_the_most_that_fits():
    assert [most(lambda n: n <= 37), most(lambda n: False), most(lambda n: True, 5)] == [37, 0, 5]


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("512 MB", 512 * 10**6), ("1.5GiB", 3 * 2**29)],
)
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["8", "8G", "0GB", "GB", "-8GB", "8gb", "lots"])
def test_a_size_that_is_none_is_refused_with_both_units(text):
    with pytest.raises(OptionError, match=rf"--fit '{text}': give a size as 8GB .* or 8GiB"):
        bytes_of(text)


def test_the_command_prints_a_row_a_method_and_writes_it(capsys, tmp_path):
    line = "bench --fit 8GB --geometry llava-1.5-7b,llava-next-7b --load-4bit --methods hivtp"
    assert main([*line.split(), "--r-max", "0.25", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "8.00 GB (7.45 GiB), of which 0.8 GB are left to CUDA itself" in said
    rows = json.loads((tmp_path / "fit-llava-1.5-7b-llava-next-7b-4bit.json").read_text())["rows"]
    for none, hivtp in rows.values():
        assert none["total"] > hivtp["total"] > hivtp["weights"]
        assert hivtp["batch_that_fits"] > none["batch_that_fits"] > 0
    # 7B parameters at half a byte, 32,000 words twice in float16, and a tower in float32.
    assert 4.9e9 < rows["llava-1.5-7b"][0]["weights"] < 5.3e9


def test_a_model_that_does_not_fit_is_said_and_the_exit_code_too(capsys):
    assert main(["bench", "--fit", "8GB", "--geometry", "llava-1.5-7b", "--methods", "none"]) == 1
    assert "llava-1.5-7b does not fit, pruned or not: quantise it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--model-path x", "--fit and --model-path exclude each other"),
        ("--host transformers", "--fit and --host exclude each other"),
        ("", "--fit is worked out from shapes: give --geometry"),
        ("--geometry llava-2", "unknown geometry 'llava-2': give one of llava-1.5-7b"),
        ("--geometry llava-1.5-7b --batch 0", "--batch 0: give numbers"),
        ("--geometry llava-1.5-7b --methods fastv --r-max 0.01", "fastv: r_max=0.01"),
        ("--geometry llava-1.5-7b --load-8bit", "--fit knows 4 bit only"),
    ],
)
def test_what_cannot_be_worked_out_is_refused(flags, told, capsys):
    assert main(["bench", "--fit", "8GB", *flags.split()]) == 2
    assert re.search(told, capsys.readouterr().err)
