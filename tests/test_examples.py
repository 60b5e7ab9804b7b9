"""What README and the page of commands give to copy, run as it stands: commands and Python."""

import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from benchdata import WRITERS
from evaluation import call
from PIL import Image

import llava_hvp
from llava_hvp import cli
from llava_hvp.cli import main

ROOT = Path(llava_hvp.__file__).parent.parent
PAGES = {"README": ROOT / "README.md", "commands": ROOT / "docs" / "commands.md"}


def blocks(page, language):
    """The fenced blocks of a page in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page].read_text(), re.M | re.S)


def commands(page):
    """Every line to copy but pip's, each once: a second time writes what is there already."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if not line.startswith("pip ")))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as a user's, with the picture that a checkout has."""
    folder = tmp_path_factory.mktemp("copied")
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "photo.png", folder / "docs")
    assert type_in(folder, "llava-hvp shapes shapes")[0] == 0
    return folder


def type_in(folder, line):
    """Exit code and what was printed; ours in this process, but those that start others."""
    words = shlex.split(line)
    if words[0] != "llava-hvp" or words[1] == "run":
        shell = call(line, folder)
        return shell.returncode, shell.stdout + shell.stderr
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        patch.chdir(folder)
        # As in an environment that was activated: doctor looks which Python a script would find.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        code = main(words[1:])
    return code, said.getvalue()


def shorter(line):
    """The same with fewer questions: how many is all that is not as typed."""
    return f"{line} --questions 6" if "accuracy --quick" in line else line


def test_the_pages_have_commands_to_copy():
    (install,) = re.findall(r"^pip install .*", "".join(blocks("README", "bash")), re.MULTILINE)
    assert "--no-deps llava-torch==" in install
    assert len(commands("README")) >= 5
    assert len(commands("commands")) >= 15


def test_the_readmes_lines_run(place):
    for line in commands("README"):
        code, said = type_in(place, shorter(line))
        assert code == 0, f"{line}\n{said}"
        if "llava.eval.run_llava" in line:
            assert re.search(r"^Red$", said, re.M), said
            assert re.search(r"kept (49|50)\.\d% of stock's visual tokens", said), said
    assert Image.open(place / "kept.png").width > 1000
    assert '"name":"hiprune"' in (place / "page.html").read_text()
    assert (place / "results" / "quick" / "llava-shapes.md").exists()
    shutil.rmtree(place / "results")


def test_the_readmes_python_runs(place, monkeypatch, capsys):
    """After its own commands, in the order of the page."""
    monkeypatch.chdir(place)
    if not (place / "shapes-hf").exists():
        assert type_in(place, "llava-hvp convert shapes/llava-shapes shapes-hf")[0] == 0
    found = blocks("README", "python")
    assert len(found) == 2
    for number, code in enumerate(found):
        exec(compile(code, f"README, {number}", "exec"), {})
        said = capsys.readouterr().out
        assert re.search(r"\bRed\b", said), said
        assert re.search(r"\b7[12] of 144 tokens", said), said


def test_every_line_of_the_commands_page_runs(place):
    WRITERS["pope"](place / "playground" / "data" / "eval")
    for line in commands("commands"):
        if line == "llava-hvp demo-app":  # which serves until it is stopped: test_demo_app.py
            continue
        if "shapes-hf" in line and not line.startswith("llava-hvp show"):
            shutil.rmtree(place / shlex.split(line)[-1], ignore_errors=True)
        code, said = type_in(place, shorter(line))
        assert code == 0, f"{line}\n{said}"
    for name in ("kept.png", "layers.png", "page.html", "llava-shapes-again/config.json"):
        assert (place / name).exists(), name
    assert list((place / "results").rglob("result.json"))


def every_command():
    for path in sorted(Path(cli.__file__).parent.glob("*.py")):
        if "def add(commands" in path.read_text():
            yield importlib.import_module(f"llava_hvp.cli.{path.stem}")


@pytest.mark.parametrize("command", every_command(), ids=lambda c: c.__name__.rsplit(".")[-1])
def test_help_has_examples_that_the_page_has_too(command, capsys):
    copied = commands("commands")
    assert command.EXAMPLES
    assert set(command.EXAMPLES) <= set(copied)
    name = shlex.split(command.EXAMPLES[0])[1]
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    said = capsys.readouterr().out
    for example in command.EXAMPLES:
        assert example.startswith(f"llava-hvp {name} ") or example == f"llava-hvp {name}"
        assert f"  {example}\n" in said


def test_the_demo_says_in_some_lines_what_it_comes_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--questions", "4", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "demo.py"), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert 8 <= len(said) <= 15
    assert sum("kept by hivtp" in line for line in said) == 4
    (summary,) = (line for line in said if line.startswith("so: "))
    shares = [int(n) for n in re.findall(r"(\d+) %", summary)]
    # Four questions of each of two: eighths.
    assert len(shares) == 3
    assert all(abs(share / 12.5 - round(share / 12.5)) < 0.05 for share in shares)
    assert said[-1].startswith("next, try: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "llava-shapes-next.png",
        "llava-shapes.png",
    ]
