"""`show`, `bench` and `accuracy` on transformers' own classes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hf_models import needs_release

import llava_hvp

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
            f"show --model-path {llavas} {shown} -o other.png",
        ],
    )
    assert codes == [0, 0, 0, 0, 2], said
    assert "no module `llava`" in said
    assert "pip install" in said
    assert (tmp_path / "kept.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "other.png").exists()
    names = ["none", "hiprune++", "fastv"]
    for file in ("marks", "timed"):
        (found,) = (tmp_path / file).glob("*.json")
        assert [row["method"] for row in json.loads(found.read_text())["rows"]] == names
