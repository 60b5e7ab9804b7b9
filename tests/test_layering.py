"""Arrows go one way: methods know torch, the encoder transformers, the host LLaVA."""

import argparse
import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import llava_hvp
from llava_hvp.config import add_flags

PACKAGE = Path(llava_hvp.__file__).parent
HOSTS = {"llava", "transformers"}


def hosts_loaded_by(statement):
    """Which hosts a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint([m for m in {sorted(HOSTS)} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin"},
    )
    return set(ast.literal_eval(result.stdout.splitlines()[-1]))


def test_importing_the_package_loads_no_host():
    names = ", ".join(llava_hvp.__all__)
    assert (
        hosts_loaded_by(f"from llava_hvp import {names}\nget_method('hivtp', r_max=0.5)") == set()
    )


def test_the_check_sees_a_host_that_is_loaded():
    assert hosts_loaded_by("import llava_hvp.hosts.llava") == HOSTS


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("select.py", {"transformers", "llava", "llava_hvp"}),
        (
            "methods",
            {
                "transformers",
                "llava",
                "llava_hvp.encoder",
                "llava_hvp.hosts.llava",
                "llava_hvp.cli",
            },
        ),
        ("encoder", {"llava", "llava_hvp.hosts.llava", "llava_hvp.cli"}),
        (
            "host",
            {
                *(
                    "llava_hvp.cli",
                    "llava_hvp.hook.process",
                    "llava_hvp.config",
                    "llava_hvp.hook.audit",
                ),
                *("llava_hvp.methods.hivtp", "llava_hvp.methods.hiprune"),
            },
        ),
        ("checkpoint.py", {"transformers", "llava", "llava_hvp.hosts.llava", "llava_hvp.cli"}),
        ("config.py", {"transformers", "llava", "llava_hvp.hosts.llava", "llava_hvp.hook.process"}),
        ("account.py", {"llava", "llava_hvp.cli", "llava_hvp.hook.process"}),
        ("session.py", {"llava", "llava_hvp.cli"}),
        ("cli", {"llava"}),
        ("report.py", {"PIL", "transformers", "llava", "llava_hvp.hosts.llava", "llava_hvp.cli"}),
        ("show", {"transformers", "llava", "llava_hvp.hosts.llava", "llava_hvp.cli"}),
        (
            "evaluation",
            {"llava", "transformers", "lmms_eval", "llava_hvp.cli", "llava_hvp.hook.process"},
        ),
        ("shapes", {"torch", "transformers", "llava", "llava_hvp.hosts.llava", "llava_hvp.cli"}),
        ("accuracy", {"transformers", "llava", "llava_hvp.cli", "llava_hvp.hook.process"}),
        ("bench", {"transformers", "llava", "llava_hvp.cli", "llava_hvp.hook.process"}),
        ("lmms", {"llava", "transformers", "llava_hvp.cli"}),
        ("testing", {"llava", "llava_hvp.hosts.llava", "llava_hvp.encoder", "llava_hvp.methods"}),
    ],
)
def test_no_import_against_the_arrows(part, forbidden):
    path = PACKAGE / part
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for module in imports(file):
            bad = [f for f in forbidden if module == f or module.startswith(f + ".")]
            assert not bad, f"{file.relative_to(PACKAGE)} imports {module}"


@pytest.mark.parametrize("part", ["methods", "select.py", "encoder", "host"])
def test_no_size_of_one_tower_is_written_into_the_code(part):
    path = PACKAGE / part
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        numbers = {
            node.value
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, int)
        }
        assert not numbers & {576, 577, 335, 336, 2880}, file


def test_the_readme_names_every_flag():
    readme = (PACKAGE.parent / "README.md").read_text()
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser, device=True)
    for flag in parser._option_string_actions:
        assert flag in readme


def test_the_readme_names_every_method_and_option():
    readme = (PACKAGE.parent / "README.md").read_text()
    base = {field.name for field in dataclasses.fields(llava_hvp.Method)}
    for name in llava_hvp.list_methods():
        method = llava_hvp.get_method(name)
        if not type(method).__module__.startswith("llava_hvp."):
            continue  # a method of another test
        assert f"| `{name}` |" in readme
        for field in dataclasses.fields(method):
            assert f"`{field.name}`" in readme, f"{name}: {field.name}"
    assert all(f"`{option}`" in readme for option in base)
