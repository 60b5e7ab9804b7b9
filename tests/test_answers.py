"""The answers file: one run's at a time, and a record only of what this process wrote."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation import GREEDY, call, environment, write_data

from llava_hvp.cli import main
from llava_hvp.cli.run import read_reports, tell
from llava_hvp.errors import RecordError
from llava_hvp.hook.answers import AnswersFile
from llava_hvp.pruning.record import answers_facts, record_path

QUESTIONS = 60


@pytest.fixture
def answers(tmp_path):
    """An answers file that is not there yet, as a process is about to write it."""
    path = tmp_path / "answers.jsonl"
    return AnswersFile(lambda: path)


def lock(path):
    """Another run: its lock ends when what is given is closed."""
    file = path.open("ab")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


@pytest.mark.parametrize("buffering", [-1, 1, 64])
def test_a_script_writes_as_by_the_built_in_open(answers, tmp_path, buffering):
    mine, stock = answers.path, tmp_path / "stock.jsonl"
    for path, opened in ((mine, answers.open), (stock, open)):
        file = opened(str(path), "w", buffering, encoding="utf-8")
        file.writelines(["{}\n", "ä\n"])
        print("{}", file=file)
        if buffering == 1:
            assert path.read_text().count("\n") == 3
        assert (file.name, file.mode) == (str(path), "w")
        file.close()
    assert mine.read_bytes() == stock.read_bytes()
    assert answers.facts() == answers_facts(mine)


def test_what_is_not_flushed_yet_counts(answers):
    answers.open(answers.path, "w").write("{}\n")
    assert answers.facts()["lines"] == 1


def test_other_files_are_opened_as_ever(answers, tmp_path):
    with answers.open(tmp_path / "other", "w") as file:
        file.write("x")
    with answers.open(tmp_path / "other", "rb") as file:
        assert file.read() == b"x"
    assert answers.facts() is None
    nothing = AnswersFile(lambda: None)
    nothing.claim()
    assert nothing.open(tmp_path / "other").read() == "x"


def test_devices_have_no_lock_and_no_record(tmp_path):
    for _ in range(2):
        null = AnswersFile(lambda: Path("/dev/null"))
        null.claim()
        null.open("/dev/null", "w").write("{}\n")
        assert null.facts() is None


def foreign_line(path):
    with path.open("a") as file:
        file.write(json.dumps({"of": "another" * 10_000}) + "\n")  # longer than all answers


def replaced(path):
    path.unlink()
    path.write_text("{}\n")


@pytest.mark.parametrize("spoil", [foreign_line, replaced, os.unlink])
def test_a_file_that_others_touched_is_not_vouched_for(answers, spoil):
    file = answers.open(answers.path, "w")
    file.write("{}\n")
    file.flush()
    spoil(answers.path)
    file.write("{}\n")
    file.close()
    with pytest.raises(RecordError, match=r"answers\.jsonl"):
        answers.facts()


def test_lines_that_were_there_are_told_apart(answers):
    answers.path.write_text("{}\n{}\n")
    for _ in range(2):  # a script that opens its file for every answer
        with answers.open(answers.path, "a") as file:
            file.write("{}\n")
    assert answers.facts() == answers_facts(answers.path) | {"lines_before": 2}
    assert answers.facts()["lines"] == 4


@pytest.mark.parametrize("step", [AnswersFile.claim, lambda a: a.open(a.path, "w")])
def test_a_second_run_is_refused_before_it_does_anything(answers, step):
    answers.path.write_text("{}\n")
    record_path(answers.path).write_text("of the first run")
    first = lock(answers.path)
    with pytest.raises(RecordError, match="another run is writing these answers"):
        step(answers)
    assert answers.path.read_text() == "{}\n"
    assert record_path(answers.path).read_text() == "of the first run"
    first.close()
    step(answers)
    assert not record_path(answers.path).exists()


def test_the_lock_lasts_while_the_process_does_and_no_file_is_left(answers, tmp_path):
    answers.path.write_text("")
    answers.claim()
    answers.open(answers.path, "w").close()
    with pytest.raises(BlockingIOError):
        lock(answers.path)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_without_locks_a_run_goes_on_and_is_checked_at_its_end(answers, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    answers.path.write_text("{}\n")
    answers.claim()
    answers.open(answers.path, "w").write("{}\n")
    said = capsys.readouterr().err
    assert said.count("no lock can be had here") == 1
    assert answers.facts()["lines"] == 1
    foreign_line(answers.path)
    with pytest.raises(RecordError):
        answers.facts()


FORK = """
import os, sys, time
from pathlib import Path
from llava_hvp.hook.answers import AnswersFile
answers = AnswersFile(lambda: Path("answers.jsonl"))
answers.watch()
file = open("answers.jsonl", "w")
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


def test_a_worker_that_outlives_its_killed_parent_blocks_nobody(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", FORK], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    try:
        with pytest.raises(BlockingIOError):
            lock(tmp_path / "answers.jsonl")
        parent.kill()
        parent.wait()
        os.kill(child, 0)
        lock(tmp_path / "answers.jsonl").close()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoints):
    """A folder with a checkpoint and so many questions that a run of them can be caught."""
    folder = write_data(tmp_path_factory.mktemp("answers") / "data")
    checkpoint = shutil.copytree(checkpoints("llava-1.5-llama"), folder / "llava-v1.5-tiny")
    ends = {"eos_token_id": [2, *range(4, 512, 4)], "bos_token_id": 1, "pad_token_id": 0}
    (checkpoint / "generation_config.json").write_text(json.dumps(ends))
    lines = (folder / "questions.jsonl").read_text()
    (folder / "many.jsonl").write_text(lines * (QUESTIONS // 3))
    return folder


def line(out, method, questions="many"):
    return (
        f"python -m llava.eval.model_vqa --model-path llava-v1.5-tiny --image-folder images "
        f"--question-file {questions}.jsonl --answers-file {out}/a.jsonl {GREEDY} --device cpu "
        f"--prune-method {method}"
    )


@pytest.fixture
def caught(place):
    """A function that starts a run and stops it while it is answering: (process, its file)."""
    processes = []

    def start(out, method):
        path = place / out / "a.jsonl"
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line(out, method)}"],
            cwd=place,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        while not path.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
        return process, path

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("method", ["hivtp", "none"])
def test_of_two_runs_on_one_file_the_second_is_refused(place, caught, method):
    first, path = caught(f"two-{method}", method)
    before = path.read_bytes()
    second = call(line(path.parent, method), place)
    assert second.returncode == 1, second.stderr
    assert "another run is writing these answers" in second.stderr.splitlines()[-1]
    assert "Traceback" not in second.stderr
    assert path.read_bytes() == before
    first.send_signal(signal.SIGCONT)
    assert first.wait(300) == 0, first.stderr.read()
    record = json.loads(record_path(path).read_text())
    assert record["answers"] == answers_facts(path)
    assert record["answers"]["lines"] == record["counts"]["images"] == QUESTIONS
    assert {p.name for p in path.parent.iterdir()} == {"a.jsonl", "a.jsonl.hvp.json"}


def test_a_killed_run_blocks_nobody_and_the_launcher_tells_why_one_is_refused(place, caught):
    first, path = caught("killed", "hivtp")
    launched = f"llava-hvp run --prune-method hivtp -- {line('killed', 'hivtp', 'questions')}"
    refused = call(launched, place)
    assert refused.returncode == 1
    assert "did not finish pruned: killed/a.jsonl: another run" in refused.stderr.splitlines()[-1]
    first.kill()
    first.wait()
    again = call(launched, place)
    assert again.returncode == 0, again.stderr
    assert json.loads(record_path(path).read_text())["answers"]["lines"] == 3


def test_no_record_of_a_mixture(place, caught):
    process, path = caught("mixed", "hivtp")
    foreign_line(path)
    process.send_signal(signal.SIGCONT)
    assert process.wait(300) == 1
    last = process.stderr.read().splitlines()[-1]
    assert last.startswith("llava-hvp: error: mixed/a.jsonl: something else has written")
    assert not record_path(path).exists()


@pytest.mark.parametrize("launcher", ["", "llava-hvp run --prune-method hivtp -- "])
def test_a_record_for_which_there_is_no_room(place, launcher):
    """The kernel refuses any file of more than 1024 bytes: answers fit, a record does not."""
    out = f"full{bool(launcher):d}"
    script = f"ulimit -f 1; {line(out, 'hivtp', 'questions')}; echo $?; echo scored"
    (place / "script.sh").write_text(script)
    # Python would leave half a module behind where it compiles one.
    result = call(f"{launcher}bash script.sh", place, PYTHONDONTWRITEBYTECODE="1")
    assert result.stdout.split() == ["1", "scored"], result.stderr
    ours = [text for text in result.stderr.splitlines() if "llava-hvp: error: " in text]
    told = f"{out}/a.jsonl.hvp.json: the record cannot be written: File too large. The answers in"
    assert all(told in text and "stand without a record" in text for text in ours)
    assert len(ours) == 1 + bool(launcher)
    assert result.returncode == bool(launcher)
    assert "killed" not in result.stderr
    assert "Traceback" not in result.stderr
    assert len((place / out / "a.jsonl").read_text().splitlines()) == 3
    assert {p.name for p in (place / out).iterdir()} == {"a.jsonl"}


def test_an_old_record_that_stays_is_refused_before_a_model_is_loaded(place):
    (place / "stuck/a.jsonl.hvp.json").mkdir(parents=True)
    result = call(line("stuck", "hivtp"), place)
    assert result.returncode == 1
    assert "the record of an earlier run cannot be removed" in result.stderr.splitlines()[-1]
    assert not (place / "stuck/a.jsonl").exists()


NO_ROOM = """
import resource
from llava.model.builder import load_pretrained_model
if {early}: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
load_pretrained_model("llava-v1.5-tiny", None, "llava-v1.5-tiny")
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""


@pytest.mark.parametrize("early", [True, False])
def test_a_report_for_which_there_is_no_room(place, early):
    (place / "no_room.py").write_text(NO_ROOM.format(early=early))
    launched = "llava-hvp run --device cpu --prune-method hivtp -- "
    result = call(f"{launched} bash -c 'python no_room.py; echo $?'", place)
    assert result.stdout == "1\n", result.stderr
    assert result.returncode == 1
    own, launchers = [text for text in result.stderr.splitlines() if "llava-hvp: error: " in text]
    assert "the launcher cannot be told how far this process came: File too large" in own
    assert "cannot be written: File too large" in launchers
    assert "killed" not in result.stderr


def test_the_launcher_tells_what_became_of_a_report(tmp_path, capsys):
    (tmp_path / "7.ENOSPC.unwritten").touch()
    assert tell(read_reports(tmp_path), 0)
    assert "a process (process 7): it could not tell" in capsys.readouterr().err
    assert os.strerror(errno.ENOSPC) in read_reports(tmp_path)[0]["reason"]


def test_without_a_place_for_reports_nothing_is_started(monkeypatch, capsys, tmp_path):
    def full(*args, **kwargs):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    command = ["touch", str(tmp_path / "started")]
    assert main(["run", "--prune-method", "hivtp", "--", *command]) == 2
    assert "Set TMPDIR" in capsys.readouterr().err
    assert not (tmp_path / "started").exists()
