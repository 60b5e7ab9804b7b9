"""What a process says of itself, in one process of ours."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llava_hvp import HIVTP
from llava_hvp.config import Request
from llava_hvp.hook.audit import PruningAudit
from llava_hvp.runtime import PruningConfig


@pytest.fixture
def account(tmp_path, monkeypatch):
    """An account whose process is a worker, with what it changes in this one put back."""
    for name in ("atexit.register", "signal.signal"):
        monkeypatch.setattr(name, lambda *args: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    request = Request(PruningConfig(HIVTP()), reports=str(tmp_path))
    versions = {"llava-hvp": "1", "llava": "llava-torch 1.2 at /here"}
    return PruningAudit("llava.serve.model_worker", request, PruningConfig(HIVTP()), versions)


def report(tmp_path):
    return json.loads((tmp_path / f"{os.getpid()}.json").read_text())


def test_it_begins_once(account, tmp_path, capfd):
    account.begin()
    account.begin()
    assert capfd.readouterr().err == (
        "llava-hvp: pruning on: hivtp r_max=0.5 (llava-hvp 1, llava-torch 1.2)\n"
    )
    assert report(tmp_path)["state"] == "started"
    assert report(tmp_path)["serves"]


def test_it_ends_once(account, tmp_path, capfd):
    account.begin()
    account.finish()
    account.finish()
    assert capfd.readouterr().err.count("llava-hvp: no image") == 1
    assert report(tmp_path)["state"] == "done"


def test_a_child_by_fork_says_nothing(account, tmp_path, capfd, monkeypatch):
    account.begin()
    parent = os.getpid()
    capfd.readouterr()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    account.finish()
    assert capfd.readouterr().err == ""
    assert [path.name for path in Path(tmp_path).iterdir()] == [f"{parent}.json"]


def test_an_error_is_one_line_and_a_failed_report(account, tmp_path, capfd):
    account.begin()
    from llava_hvp.errors import LayerError

    sys.excepthook(LayerError, LayerError("layer 30 of 24"), None)
    account.finish()
    assert capfd.readouterr().err.splitlines()[1:] == ["llava-hvp: error: layer 30 of 24"]
    assert (report(tmp_path)["state"], report(tmp_path)["reason"]) == ("failed", "LayerError")


def test_a_model_may_be_loaded_in_any_thread(tmp_path, monkeypatch):
    monkeypatch.setattr("atexit.register", lambda *args: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    account = PruningAudit(
        "", Request(PruningConfig(HIVTP()), reports=str(tmp_path)), PruningConfig(HIVTP()), {}
    )
    failures = []

    def begin():
        try:
            account.begin()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert failures == []
    assert report(tmp_path)["state"] == "started"


def test_a_signal_that_comes_while_the_end_is_told_lets_it_be_told(tmp_path):
    """As of a pool that dismisses a worker which is just ending by itself."""
    code = """if True:
        import os, signal, sys
        from llava_hvp.config import Request
        from llava_hvp.hook import audit
        from llava_hvp.runtime import PruningConfig

        pruning = PruningConfig.of("hivtp", r_max=0.5)
        request = Request(pruning, reports=sys.argv[1])
        told = audit.PruningAudit("", request, pruning, {})
        told.begin()
        say = audit.say
        audit.say = lambda line: (say(line), os.kill(os.getpid(), signal.SIGTERM))
        """
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    (report,) = tmp_path.glob("*.json")
    assert json.loads(report.read_text())["state"] == "done"
    assert (result.returncode, result.stderr.count("no image")) == (0, 1)
