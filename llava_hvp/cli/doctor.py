"""`llava-hvp doctor`: what is installed, whether the hook is awake, and how to mend what is not."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llava_hvp
from llava_hvp import config
from llava_hvp.cli import operators
from llava_hvp.cli.extras import HOST, NEEDED, install
from llava_hvp.cli.interpreter import hook_in
from llava_hvp.cli.parser import add_command
from llava_hvp.errors import LlavaHvpError
from llava_hvp.lazy import torch
from llava_hvp.version import version_of


@dataclass
class Findings:
    """Lines to print, and problems with the command that mends each."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def note(self, name: str, text: str) -> None:
        """Note a fact that is no problem."""
        self.lines.append((name, text))

    def problem(self, text: str, remedy: str) -> None:
        """Something that is wrong, and what to type."""
        self.problems.append((text, remedy))


EXAMPLES = ("llava-hvp doctor",)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "doctor",
        "check this environment, with remedies",
        "Run it first when something is wrong.",
        EXAMPLES,
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Check; there are no settings."""
    return run()


def run() -> int:
    """Print the findings; 1 if something is wrong."""
    findings = Findings()
    findings.note("llava-hvp", f"{llava_hvp.__version__} at {Path(llava_hvp.__file__).parent}")
    findings.note("python", f"{platform.python_version()} at {sys.executable}")
    _llava(findings)
    cuda = torch.cuda.is_available()
    findings.note(
        "torch",
        f"{torch.__version__}, "
        + (f"CUDA: {torch.cuda.get_device_name()}" if cuda else "no CUDA: give --device cpu"),
    )
    _needed(findings)
    _deepspeed(findings)
    _hook(findings)
    _variables(findings)
    for name, text in findings.lines:
        print(f"{name:<13}{text}")
    for text, remedy in findings.problems:
        print(f"PROBLEM      {text}\n   mend it:  {remedy}")
    if not findings.problems:
        print("no problems found")
    return 1 if findings.problems else 0


def _llava(findings: Findings) -> None:
    """LLaVA and transformers: there, of a known version, and importable."""
    findings.note("transformers", version_of("transformers") or "missing")
    try:
        from llava_hvp.hosts.llava.compat import gaps, versions
    except LlavaHvpError as error:
        findings.note("llava", version_of("llava-torch") or version_of("llava") or "missing")
        findings.problem(str(error), _remedy(error))
        return
    findings.note("llava", versions.found_versions()["llava"])
    found = gaps.bridged_here()
    for gap in found or ["nothing"]:
        findings.note("bridged", gap)


def _remedy(error: BaseException) -> str:
    cause = error.__cause__
    text = str(error)
    if "no module `llava`" in text:
        return "pip install --no-deps llava-torch==1.2.2.post1"
    if text.startswith("found transformers"):
        return "pip install transformers==4.57.6"
    if "No module named" in text or isinstance(cause, ModuleNotFoundError):
        return "pip install 'llava-hvp[host]'"
    return "pip install --no-deps --force-reinstall llava-torch==1.2.2.post1"


def _needed(findings: Findings) -> None:
    """What every command needs, in a line, and what some need."""
    host = {each: each.version for each in NEEDED if each.extra == HOST}
    there = [f"{each.distribution} {version}" for each, version in host.items() if version]
    findings.note(HOST, ", ".join(there))
    for each in (each for each, version in host.items() if version is None):
        findings.problem(f"{each.distribution} is missing, for {each.uses}", install(HOST))
    for each in (each for each in NEEDED if each.extra != HOST):
        missing = f"missing, for {each.uses}: {install(each.extra)}"
        findings.note(each.distribution, each.version or missing)


def _deepspeed(findings: Findings) -> None:
    """Where it would run, what it would compile first, and what would make it wait for ever."""
    if version_of("deepspeed") is None:
        return
    compiles = "; ".join(f"{name} for {uses}" for name, uses in operators.uncompiled().items())
    findings.note("ranks on", f"{operators.accelerator()}, to compile at first: {compiles or '-'}")
    for lock in operators.stale_locks():
        findings.problem(
            f"a compilation of {lock.parent.name} was killed, and who needs it waits for ever",
            f"rm {shlex.quote(str(lock))}",
        )


def _hook(findings: Findings) -> None:
    """The startup hook here, and in the `python` that shell scripts would run."""
    here = hook_in((sys.executable,))
    awake = not sys.flags.no_site and here is not None and here[0]
    reinstall = "pip install --force-reinstall --no-deps llava-hvp"
    spec = importlib.util.find_spec("llava_hvp_startup")
    pth = None if spec is None or spec.origin is None else Path(spec.origin).parent
    if pth is None or not (pth / "llava_hvp.pth").exists():
        findings.note("hook", "not installed")
        findings.problem("the startup hook is missing: flags on LLaVA's commands fail", reinstall)
    elif not awake:
        findings.note("hook", f"{pth / 'llava_hvp.pth'}, which this Python does not read")
        findings.problem("the startup hook did not run (python -S?)", reinstall)
    else:
        findings.note("hook", f"{pth / 'llava_hvp.pth'}, runs at every start of this Python")
    on_path = hook_in()
    if on_path is None:
        findings.note("on PATH", "no `python`")
    elif not on_path[0]:
        findings.problem(
            f"`python` on PATH is {on_path[1]}, which has no hook: shell scripts run unpruned",
            f"export PATH={Path(sys.executable).parent}:$PATH",
        )


def _variables(findings: Findings) -> None:
    """Our variables of the environment."""
    if config.switched_off(os.environ):
        name = config.DISABLE_VARIABLE
        findings.problem(f"{name} is set: nothing is pruned", f"unset {name}")
    try:
        request = config.from_environment(os.environ)
    except LlavaHvpError as error:
        findings.problem(str(error), f"unset {config.VARIABLE} {config.DEVICE_VARIABLE}")
        return
    asked = "not set" if request.pruning is None else f"asks for {request.pruning}"
    findings.note(config.VARIABLE, asked)
