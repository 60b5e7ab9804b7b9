"""`llava-hvp run`: what passes through, what it adds, what it cannot see and says so."""

import json
import os
import signal
import subprocess
import sys

import pytest
from evaluation import call, environment

from llava_hvp.cli import main
from llava_hvp.cli.interpreter import python_of
from llava_hvp.cli.run import read_reports, tell
from llava_hvp.pruning.record import added, summary

RUN = "llava-hvp run --prune-method hivtp --r-max 0.5 --"


@pytest.mark.parametrize("code", [0, 1, 7, 127])
def test_the_exit_code_passes_through(tmp_path, code):
    assert call(f"{RUN} bash -c 'exit {code}'", tmp_path).returncode == code


def test_children_and_their_children_inherit_the_request(tmp_path):
    line = f"{RUN} bash -c \"bash -c 'echo \\$LLAVA_HVP' one && cat\""
    result = subprocess.run(
        ["bash", "-c", line],
        input="and stdin\n",
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
        check=True,
    )
    assert result.stdout.startswith("--prune-method hivtp --r-max 0.5 --prune-reports ")
    assert result.stdout.endswith("and stdin\n")


def test_arguments_arrive_as_they_were(tmp_path):
    line = f"{RUN} {sys.executable} -c 'import sys; print(sys.argv[1:])' 'a b' -- --r-max '*'"
    assert call(line, tmp_path).stdout == "['a b', '--', '--r-max', '*']\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_pass_through(tmp_path, name):
    script = f"trap 'echo got {name}; exit 9' {name[3:]}; echo ready; while :; do sleep 0.1; done"
    launcher = subprocess.Popen(
        [*RUN.split(), "bash", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=tmp_path,
    )
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(getattr(signal, name))
    assert launcher.communicate(timeout=30)[0] == f"got {name}\n"
    assert launcher.returncode == 9


def test_a_command_that_dies_of_a_signal_takes_the_launcher_with_it(tmp_path):
    result = subprocess.run(
        [*RUN.split(), "bash", "-c", "kill -TERM $$"], env=environment(), check=False
    )
    assert result.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--prune-method hivtpp -- true", 2, "unknown method 'hivtpp'"),
        ("--prune-method hivtp --r-max 2 -- true", 2, "r_max=2.0"),
        ("--prune-method hivtp --prune-opt a=1 -- true", 2, "unknown option 'a'"),
        ("-- true", 2, "--prune-method is missing"),
        ("--prune-method hivtp", 2, "no command to run"),
        ("--prune-method hivtp true", 2, "unrecognized arguments: true"),
        ("--prune-method hivtp -- no-such-command", 127, "no command 'no-such-command'"),
        ("--prune-method hivtp -- /", 126, "cannot run '/'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(capsys, arguments, code, message):
    try:
        found = main(["run", *arguments.split()])
    except SystemExit as exit:  # argparse's own
        found = exit.code
    assert found == code
    assert message in capsys.readouterr().err


def test_switched_off_it_refuses(monkeypatch, capsys):
    monkeypatch.setenv("LLAVA_HVP_DISABLE", "1")
    assert main(["run", "--prune-method", "hivtp", "--", "true"]) == 2
    assert "unset it" in capsys.readouterr().err


def test_a_command_in_which_nothing_was_pruned_is_warned_of(capfd):
    assert main(["run", "--prune-method", "hivtp", "--", "true"]) == 0
    assert "warning: no process of this command pruned an image" in capfd.readouterr().err
    assert main(["run", "--prune-method", "hivtp", "--", "false"]) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "python"),
    [
        ("python -m x -S", "python"),
        ("/a/python3.11 -u -X utf8 -S s.py -S", "/a/python3.11 -u -X utf8 -S"),
        ("bash -S", ""),
    ],
)
def test_the_python_of_a_command_is_told_from_its_arguments(command, python):
    assert python_of(command.split()) == python.split()


def test_a_python_without_the_hook_is_refused_before_it_runs(tmp_path):
    result = call(f"{RUN} python -S -c 'print(1)'", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "python -S" in result.stderr
    assert "runs no startup hook of ours" in result.stderr


COUNTS = {
    "images": 2,
    "kept_tokens": 50,
    "stock_tokens": 100,
    "mean_kept_of_stock": 0.5,
    "mean_kept_of_patches": 0.5,
}
NOTHING = {"images": 0, "kept_tokens": 0, "stock_tokens": 0} | dict.fromkeys(
    ("mean_kept_of_stock", "mean_kept_of_patches")
)


def report(state="done", counts=COUNTS, pid=None, serves=False, reason=None):
    # The newest process that has ended: its number is nobody's yet.
    gone = subprocess.Popen(["true"])
    gone.wait()
    return {
        "state": state,
        "counts": counts,
        "pid": pid or gone.pid,
        "serves": serves,
        "reason": reason,
        "command": "llava.eval.model_vqa",
    }


@pytest.mark.parametrize(
    ("reports", "lost"),
    [
        ([report()], False),
        ([report(), report("failed", reason="OSError")], True),
        ([report("started", NOTHING)], True),
        ([report("started", NOTHING, pid=os.getpid())], False),
        ([report("started", NOTHING, serves=True)], False),
    ],
    ids=["done", "one failed", "killed", "still running", "a server, killed"],
)
def test_a_process_that_came_to_grief_fails_the_run(reports, lost, capsys):
    assert tell(reports, 0) is lost
    assert ("did not finish pruned" in capsys.readouterr().err) is lost


def test_several_processes_are_summed_up(tmp_path, capsys):
    other = COUNTS | {"images": 6, "mean_kept_of_stock": 0.1}
    for index, counts in enumerate((COUNTS, other)):
        (tmp_path / f"{index}.json").write_text(json.dumps(report(counts=counts)))
    reports = read_reports(tmp_path)
    assert not tell(reports, 0)
    assert "2 processes, 8 images, kept 20.0% of stock's" in capsys.readouterr().err
    assert added([COUNTS, other])["stock_tokens"] == 200
    chat = COUNTS | {"images": 1, "reused": 2}
    assert added([COUNTS, chat, chat])["reused"] == 4
    assert summary(added([COUNTS, chat])).startswith("3 images, sent 5 times, kept 50.0%")


def test_what_entered_the_layers_is_summed_up_as_well():
    one = COUNTS | {"layer_tokens": [50, 10], "mean_average_of_stock": 0.3}
    two = COUNTS | {"images": 6, "layer_tokens": [150, 30], "mean_average_of_stock": 0.1}
    total = added([one, two])
    assert total["layer_tokens"] == [200, 40]
    assert total["mean_average_of_stock"] == pytest.approx(0.15)
    assert "kept 15.0% of stock's visual tokens on average over 2 layers, 25 -> 5" in summary(total)
    assert "layer_tokens" not in added([COUNTS, COUNTS])


def test_methods_are_listed_with_their_options(capsys):
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    for text in ("hivtp: ", "--prune-opt window=auto", "hiprune++: ", "--prune-opt beta=0.1"):
        assert text in listed
    # What a docstring says of an option, one of the method that it builds on too.
    said = " ".join(listed.split())
    assert said.count("the share of the budget for anchors with their buffers") == 2
    assert "blocks along each side (paper: r); 1 switches the region division off --prune" in said


@pytest.mark.parametrize("switched_off", [False, True])
def test_the_doctor_finds_what_is_wrong(tmp_path, switched_off):
    environ = {"LLAVA_HVP_DISABLE": "1"} if switched_off else {}
    result = call("llava-hvp doctor", tmp_path, **environ)
    assert result.returncode == switched_off, result.stdout
    assert len(result.stdout.splitlines()) <= 26
    for name in ("llava ", "transformers ", "torch ", "hook ", "bitsandbytes "):
        assert f"\n{name}" in result.stdout
    assert ("mend it:  unset LLAVA_HVP_DISABLE" in result.stdout) is switched_off


def test_the_doctor_sees_another_python_on_the_path(tmp_path):
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    other.chmod(0o755)
    doctor = f"{sys.executable} -c 'from llava_hvp.cli import main; main([\"doctor\"])'"
    result = call(f"PATH={tmp_path}:$PATH; {doctor}", tmp_path)
    assert "shell scripts run unpruned" in result.stdout
    assert f"mend it:  export PATH={os.path.dirname(sys.executable)}" in result.stdout
