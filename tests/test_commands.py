"""The commands' shape: a parse that yields frozen settings, and a run that takes nothing else."""

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from evaluation import environment

import llava_hvp.cli as cli
from llava_hvp.cli import main
from llava_hvp.version import installed, version_of

WITH_SETTINGS = (
    "accuracy",
    "bench",
    "convert",
    "demo_app",
    "evaluate",
    "reproduce",
    "run",
    "shapes",
    "show",
    "table",
    "tune",
)
WITHOUT = ("doctor", "methods")


def test_every_command_is_in_one_of_the_two_lists():
    found = {p.stem for p in Path(cli.__file__).parent.glob("*.py") if "def add(" in p.read_text()}
    assert found == {*WITH_SETTINGS, *WITHOUT}


def test_help_and_lists_come_without_torch():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for name in (*WITH_SETTINGS, *WITHOUT):
        importlib.import_module(f"llava_hvp.cli.{name}").add(commands)
    lines = [
        ["methods"],
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in commands.choices),
    ]
    code = f"""
import contextlib, io, json, sys
from llava_hvp.cli import main
loaded = {{}}
for line in {lines!r}:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(line)
    heavy = [name for name in ("torch", "transformers", "llava", "numpy") if name in sys.modules]
    loaded[" ".join(line)] = [len(said.getvalue()) > 4, heavy]
print(json.dumps(loaded))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert json.loads(result.stdout) == {" ".join(line): [True, []] for line in lines}


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_a_command_parses_into_frozen_settings_and_runs_those(name):
    command = importlib.import_module(f"llava_hvp.cli.{name}")
    kind = inspect.signature(command.parse, eval_str=True).return_annotation
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    (taken,) = inspect.signature(command.run, eval_str=True).parameters.values()
    assert taken.annotation is kind


@pytest.mark.parametrize("name", WITHOUT)
def test_a_command_without_settings_runs_on_nothing(name):
    assert not inspect.signature(importlib.import_module(f"llava_hvp.cli.{name}").run).parameters


def test_no_namespace_is_written_to():
    for path in Path(cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            written = {ast.unparse(t) for t in targets if ast.unparse(t).startswith("args.")}
            # The command line's own two parts, put side by side before any command sees them.
            assert written <= {"args.unknown"}, path


@pytest.mark.parametrize("name", ["show", "bench"])
def test_parsing_leaves_the_namespace_as_it_is(name, checkpoints, tmp_path):
    """Parsed twice, the settings are the same."""
    command = importlib.import_module(f"llava_hvp.cli.{name}")
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    given = [name, "--model-path", str(checkpoints("llava-1.5-llama")), "--device", "cpu"]
    if name == "show":
        given += ["--image-file", "x.png", "--html", str(tmp_path / "page.html")]
    args = parser.parse_args(given)
    before = dict(vars(args))
    first = command.parse(args)
    assert vars(args) == before
    assert command.parse(args) == first
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.device = "cuda"


@pytest.mark.parametrize("command", ["bench --geometry llava-1.5-tiny", "accuracy"])
def test_a_budget_is_refused_by_the_method_that_cannot_have_it(command, capsys):
    assert main([*command.split(), "--methods", "hivtp", "--num-tokens", "0"]) == 2
    assert "num_tokens=0" in capsys.readouterr().err


def test_versions_are_of_what_is_installed():
    assert installed("torch", "no-such-distribution") == {"torch": version("torch")}
    assert version_of("no-such-distribution") is None
    with pytest.raises(PackageNotFoundError):
        version("no-such-distribution")
