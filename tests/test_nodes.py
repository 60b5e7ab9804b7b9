"""`llava-hvp run` on commands that start several nodes, without any: what each would be told."""

import os
import time
from pathlib import Path
from unittest import mock

import pytest
from evaluation import call

from llava_hvp.cli import doctor, operators
from llava_hvp.cli.nodes import sent_along, starts_one_of_several

RUN = "llava-hvp run --prune-method hivtp --r-max 0.25 --prune-train --"


def test_deepspeed_sends_our_variables_and_the_users_own(tmp_path, monkeypatch):
    home, here, folder = tmp_path / "home", tmp_path / "here", tmp_path / "reports"
    for path in (home, here, folder):
        path.mkdir()
    (home / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\n")
    (here / ".deepspeed_env").write_text("HF_HOME=/data")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    environ = {"LLAVA_HVP": "--prune-method hivtp", "LLAVA_HVP_DEVICE": "cpu", "OTHER": "x"}
    file = sent_along(environ, folder)["DS_ENV_FILE"]
    lines = Path(file).read_text().splitlines()
    assert sorted(lines[:2]) == ["HF_HOME=/data", "NCCL_DEBUG=INFO"]
    assert lines[2:] == ["LLAVA_HVP=--prune-method hivtp", "LLAVA_HVP_DEVICE=cpu"]
    # A file of the user's that another variable names, and one that is in it already.
    own = tmp_path / "own"
    own.write_text("A=1\n")
    again = sent_along({**environ, "DS_ENV_FILE": str(own)}, folder)["DS_ENV_FILE"]
    assert Path(again).read_text().splitlines() == ["A=1", *lines[2:]]


def test_a_script_of_the_users_meets_the_file_too(tmp_path):
    done = call(f"{RUN} bash -c 'cat $DS_ENV_FILE'", tmp_path)
    assert done.stdout.startswith("LLAVA_HVP=--prune-method hivtp --r-max 0.25 --prune-train ")


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        ("torchrun --nnodes 2 train.py", True),
        ("torchrun --nnodes=1:4 train.py", True),
        ("python -m torch.distributed.run --nnodes=2 train.py", True),
        ("accelerate launch --num-machines 2 train.py", True),
        ("/venv/bin/deepspeed --hostfile h --no_ssh --node_rank 1 train.py", True),
        ("torchrun --nproc_per_node 2 train.py", False),
        ("torchrun --nnodes 1 train.py", False),
        ("accelerate launch --num_processes 2 train.py", False),
        ("deepspeed --hostfile h train.py", False),
        ("bash finetune.sh --nnodes 2", False),
    ],
)
def test_a_command_for_one_node_of_several_is_known(command, is_one):
    assert starts_one_of_several(command.split()) is is_one


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """A folder of compiled operators, with none."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return tmp_path


def test_what_deepspeed_would_compile_is_known(builds):
    assert set(operators.uncompiled()) == {"deepspeed_shm_comm", "cpu_adam"}
    built = builds / "py311_cpu" / "cpu_adam"
    built.mkdir(parents=True)
    (built / "cpu_adam.so").touch()
    assert set(operators.uncompiled()) == {"deepspeed_shm_comm"}


def test_a_lock_that_a_killed_compilation_left_is_found(builds, capsys):
    folder = builds / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    lock = folder / "lock"
    lock.touch()
    assert operators.stale_locks() == []  # it may be at work
    long_ago = time.time() - 3600
    for path in (lock, folder):
        os.utime(path, (long_ago, long_ago))
    assert operators.stale_locks() == [lock]
    findings = doctor.Findings()
    with mock.patch.object(doctor, "version_of", return_value="0.19.8"):
        doctor._deepspeed(findings)
    assert findings.problems[0][1] == f"rm {lock}"
    (folder / "shm.o").touch()
    assert operators.stale_locks() == []


def test_who_starts_one_of_several_nodes_is_told(tmp_path):
    (tmp_path / "torchrun").write_text("#!/bin/sh\n")
    (tmp_path / "torchrun").chmod(0o755)
    done = call(f"PATH={tmp_path}:$PATH; {RUN} torchrun --nnodes 2 train.py", tmp_path)
    assert "give the same `llava-hvp run` on each" in done.stderr
