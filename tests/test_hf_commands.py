"""`show`, `bench` and `accuracy` on transformers' own classes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import needs_release

import llava_hvp
from llava_hvp.bench.clock import Clock
from llava_hvp.bench.phases import Bench
from llava_hvp.bench.subject import HOSTS, of_geometry
from llava_hvp.bench.workload import make_workload, pattern
from llava_hvp.checkpoints.geometry import get_geometry
from llava_hvp.checkpoints.synthetic import build_model
from llava_hvp.checkpoints.synthetic_hf import build_hf_model
from llava_hvp.checkpoints.variants import variants
from llava_hvp.cli import main

pytestmark = needs_release
PACKAGE = Path(llava_hvp.__file__).parent
PICTURE = PACKAGE.parent / "docs" / "shapes.png"
# LLaVA cannot be imported, as where it was never installed.
ALONE = """
import json, shlex, sys
sys.modules["llava"] = None
from llava_hvp.cli import main
codes = [main(shlex.split(line)) for line in json.loads(sys.argv[1])]
with open("codes.json", "w") as file:
    json.dump([codes, sorted(m for m in sys.modules if m.startswith(("llava.", "lmms")))], file)
"""


def run_alone(folder, lines):
    """(exit codes, what they said) of lines of ours in one process without LLaVA."""
    shell = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(lines)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
    )
    assert shell.returncode == 0, shell.stderr
    codes, of_llava = json.loads((folder / "codes.json").read_text())
    assert not of_llava
    return codes, shell.stderr


def test_they_need_no_llava(hf, checkpoints, tmp_path):
    path, llavas = hf("llava-1.5-llama").path, checkpoints("llava-1.5-llama")
    shown = f"--image-file {PICTURE} --prune-method hivtp --device cpu"
    inside = "--prune-inside fastv --inside-r-max 0.75"
    counted = "--methods hiprune++,fastv --r-max 0.75 --device cpu"
    asked = f"{counted} --questions 2 --pictures plain"
    timed = f"{counted} --rounds 2 --new-tokens 2"
    codes, said = run_alone(
        tmp_path,
        [
            f"show --model-path {path} {shown} -o kept.png --html kept.html",
            f"show --model-path {path} {shown} {inside} --html inside.html",
            f"accuracy --model-path {path} {asked} --out marks",
            f"bench --model-path {path} {timed} --image-size 200x120 --out timed",
            "bench --geometry llava-1.5-tiny --host transformers --rounds 2 --new-tokens 2 "
            "--methods hivtp --r-max 0.5 --device cpu --out built",
            f"show --model-path {llavas} {shown} -o other.png",
            "bench --geometry llava-1.5-tiny --methods hivtp --device cpu",
        ],
    )
    assert codes == [0, 0, 0, 0, 0, 2, 2], said
    assert "no module `llava`" in said
    assert "pip install" in said
    assert (tmp_path / "kept.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "other.png").exists()
    (found,) = (tmp_path / "built").glob("llava-1.5-tiny-transformers-cpu.json")
    assert {row["host"] for row in json.loads(found.read_text())["rows"]} == {"transformers"}
    names = ["none", "hiprune++", "fastv"]
    for file in ("marks", "timed"):
        (found,) = (tmp_path / file).glob("*.json")
        assert [row["method"] for row in json.loads(found.read_text())["rows"]] == names


# --- random weights on both hosts ---

CPU = torch.device("cpu")
COUNTED = ["method", "options", "batch", "tiles", "kept_tokens", "stock_tokens", "layer_tokens"]


def test_both_hosts_are_measured_side_by_side_with_the_same_weights(tmp_path, capsys):
    flags = "--geometry llava-next-tiny --host llava,transformers --image-size 200x120 --batch 2"
    flags += " --methods hivtp,hiprune++,hivtp+fastv --r-max 0.64 --rounds 2 --new-tokens 2"
    assert main(["bench", *flags.split(), "--device", "cpu", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("llava-next-tiny-llava-transformers-cpu.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["host"] for row in rows] == list(HOSTS) * 4
    for llavas, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert [llavas[n] for n in COUNTED] == [theirs[n] for n in COUNTED]
        assert llavas["flops"] == theirs["flops"]
    for row in rows:
        none = next(r for r in rows if (r["host"], r["method"]) == (row["host"], "none"))
        peaks = row["peak_bytes"]["prefill"] / none["peak_bytes"]["prefill"]
        assert row["peak_to_none"]["prefill"] == pytest.approx(peaks)
    printed = capsys.readouterr().out
    assert "host" in printed
    assert "hivtp r_max=0.64 on " in printed or "Pruning loses nowhere" in printed


@pytest.mark.parametrize("name", ["llava-1.5-tiny", "llava-next-tiny"])
def test_hosts_that_share_weights_make_the_same_of_them(name):
    given = {"tower_dtype": None, "bits": None, "text_tokens": 20, "seed": 0}
    subjects = of_geometry(name, HOSTS, "cpu", torch.float32, **given)
    picture, made = pattern((200, 120), 0), []
    for what in subjects:
        work = make_workload(what.checkpoint, [picture], what.prompt, new_tokens=3)
        bench = Bench(what.checkpoint, what.geometry.vision, work, Clock(CPU))
        rows = []
        for variant in variants(["hivtp"], [{"r_max": 0.5}]):
            with what.checkpoint.pruned_by(variant), torch.inference_mode():
                prepared = bench.prepare()
                rows += [prepared["inputs_embeds"], what.checkpoint.model(**prepared).logits]
        made.append(rows)
    for mine, other in zip(*made, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert made[0][0].shape[1] > made[0][2].shape[1]
    layers = [what.checkpoint.model.get_decoder().layers for what in subjects]
    assert layers[0] is layers[1]


@pytest.mark.parametrize("name", ["llava-1.5-tiny", "llava-next-tiny"])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_a_quantised_model_has_all_but_its_logits_so(name, shared):
    import bitsandbytes as bnb

    geometry = get_geometry(name)
    llavas = build_model(geometry, "cpu", torch.float16, bits=4) if shared else None
    model = build_hf_model(geometry, "cpu", torch.float16, bits=4, llavas=llavas)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert [m for m in linear if not isinstance(m, bnb.nn.Linear4bit)] == [model.lm_head]
    assert len(linear) == 7 * geometry.language.layers + 6 * geometry.vision.layers + 3
    if shared and name == "llava-1.5-tiny":  # LLaVA keeps its own tower as it was
        assert llavas.get_vision_tower().dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--geometry llava-1.5-tiny --host vllm", "--host vllm: give one or both of llava,tr"),
        ("--geometry llava-1.5-tiny --host llava,llava", "--host llava,llava: give one or both"),
        ("--model-path x --host transformers", "--host transformers goes with --geometry"),
        (
            "--geometry llava-1.5-tiny --host transformers --tower-dtype float16",
            "--tower-dtype float16: --host transformers has the tower in float32",
        ),
    ],
)
def test_a_host_that_cannot_be_is_said(flags, message, capsys):
    assert main(["bench", *flags.split(), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_eval_refuses_what_llavas_scripts_cannot_load(hf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = hf("llava-1.5-llama").path
    assert main(["eval", "pope", "--model-path", str(path), "--device", "cpu"]) == 2
    assert "llava-hvp convert" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
