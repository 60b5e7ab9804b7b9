"""The line that every Python runs at its start: it imports the hook where that may wake, or not."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import llava_hvp_startup as startup
import pytest

FOLDER = Path(__file__).parents[1] / "startup"
LINE = (FOLDER / "llava_hvp.pth").read_text()
ASKED = {"LLAVA_HVP": "--prune-method hivtp"}
SCRIPT = "/checkout/llava/eval/model_vqa.py"
SEEN = "import sys; print('llava_hvp_startup' in sys.modules)"

# (words after `python`, variables, whether the line imports the hook, whether the hook wakes).
STARTS = [
    ("-c pass", {}, False, False),
    ("", {}, False, False),
    ("script.py --port 80 -v", {}, False, False),
    ("-m pip install llava-hvp --upgrade", {}, False, False),
    ("-m llava.eval.model_vqa --model-path x", {}, False, False),
    ("-m llava.serve.cli --model-path llava-r-max", {}, False, False),
    ("my-host.py my-h", {}, False, False),
    ("script.py", ASKED, True, True),
    ("-c pass", {"LLAVA_HVP_DEVICE": "cpu"}, True, True),
    ("script.py", {**ASKED, "LLAVA_HVP_DISABLE": "1"}, True, False),
    ("script.py", {"LLAVA_HVP": ""}, True, False),
    *(
        (f"{command} --x y {flag}", {}, True, True)
        for command in ("-m llava.eval.model_vqa", "-mllava.serve.cli", "-u -m llava.train.train")
        for flag in ("-h", "--help", *startup.FLAGS, "--r-max=1", "--prune-opt=a='b'")
    ),
    *((f"{SCRIPT} {flag}", {}, True, True) for flag in ("-h", "--device cpu", "--num-tokens 9")),
    ("-m llava.eval.run_llava --device=cpu", {}, True, True),
    ("-m llava.serve.cli --device cpu", {}, True, False),
    ("script.py --help", {}, True, False),
    ("-m pytest --prune-method x", {}, True, False),
]


def run_line(monkeypatch, wake):
    """Run the line as `site` does, with a hook whose `wake` is this."""
    monkeypatch.setitem(sys.modules, "llava_hvp_startup", types.SimpleNamespace(wake=wake))
    (line,) = LINE.splitlines()
    assert line.startswith("import ")

    def addpackage():
        exec(line)

    addpackage()


@pytest.mark.parametrize(("words", "environ", "imports", "wakes"), STARTS)
def test_the_line_and_the_hook_agree(monkeypatch, words, environ, imports, wakes):
    for name in ("LLAVA_HVP", "LLAVA_HVP_DEVICE", "LLAVA_HVP_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    arguments = words.split()
    at = next((i for i, w in enumerate(arguments) if w.startswith("-m")), None)
    argv = arguments or [""]
    if at is not None:  # so Python leaves it while it starts
        argv = ["-m", *arguments[at + 1 + (arguments[at] == "-m") :]]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", ["python", *arguments])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("llava", *startup.TRANSFORMERS):  # waking would prune what is there
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(startup, "_finder", None)
    for name in ("sys.addaudithook", "atexit.register"):
        monkeypatch.setattr(name, lambda *arguments: None)
    woken = []
    run_line(monkeypatch, lambda: woken.append(True))
    assert bool(woken) is imports
    startup.wake()
    assert (startup._finder is not None) is wakes
    assert imports or not wakes


@pytest.mark.parametrize("odd", [None, [], [b"x"], 7])
def test_odd_arguments_are_nobodys_business(monkeypatch, odd):
    for name in ("LLAVA_HVP", "LLAVA_HVP_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(startup, "_finder", None)
    for name in ("argv", "orig_argv"):
        if odd is None:
            monkeypatch.delattr(sys, name)
        else:
            monkeypatch.setattr(sys, name, odd)
    run_line(monkeypatch, lambda: pytest.fail("woken"))
    startup.wake()
    assert startup._finder is None


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A function that starts the Python of an environment which has nothing but the hook."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    for name in ("llava_hvp.pth", "llava_hvp.start", "llava_hvp_startup.py"):
        shutil.copy(FOLDER / name, packages)

    def start(shell, **environ):
        return subprocess.run(
            ["bash", "-c", shell],
            capture_output=True,
            text=True,
            cwd=folder,
            env={"PATH": f"{folder}/bin:/usr/bin:/bin", **environ},
            check=False,
        )

    return start


PRINTS = "'print(1)'"
GONE = "mkdir gone; cd gone; rmdir ../gone; python"


@pytest.mark.parametrize(
    "shell",
    [
        f"{GONE} -c {PRINTS}",
        f"{GONE} -c {PRINTS} --help --r-max 1",
        f"{GONE} -m this --help >/dev/null; echo 1",
        f"echo {PRINTS[1:-1]!r} | ({GONE})",
        f"python -c {PRINTS} --r-max $'\\xff' --prune-method",
        f"python -bb -W error -X dev -c {PRINTS} --help",
        f"python -I -c {PRINTS} --device",
        f"python -S -c {PRINTS} --device",
        f"python -c {PRINTS} --help 2>&-",
        f"python -c {PRINTS} --help <&-",
        f"env -i $(command -v python) -c {PRINTS} --help",
        "python -c 'import sys, site; del sys.argv, sys.orig_argv; "
        "site.main(); site.addsitedir(site.getsitepackages()[0]); print(1)' --help",
        "python -c 'import os, site; os.environ.clear(); site.main(); print(1)' -h",
        "echo 'print(1)' > model_vqa.py; python model_vqa.py --device cpu --help",
        "mkdir -p llava/mine; echo 'print(1)' > llava/mine/x.py; python llava/mine/x.py --r-max 1",
    ],
)
@pytest.mark.parametrize("as_start_file", [False, True])
def test_a_program_that_did_not_ask_sees_nothing_of_ours(started, shell, as_start_file):
    if as_start_file:  # Python 3.15 calls `wake` whatever the command line is
        call = "import llava_hvp_startup; llava_hvp_startup.wake()"
        shell = shell.replace("print(1)", f"{call}; print(1)" if "-S" not in shell else "print(1)")
    result = started(shell)
    assert (result.returncode, result.stdout, result.stderr) == (0, "1\n", "")


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="reads llava_hvp.start")
def test_asleep_not_even_the_hook_is_imported(started):
    assert started(f'python -c "{SEEN}"').stdout == "False\n"
    assert started(f'python -c "{SEEN}" --r-max').stdout == "True\n"
    assert started(f'python -c "{SEEN}"', **ASKED).stdout == "True\n"


def test_the_start_file_names_what_the_line_calls():
    module, _, function = (FOLDER / "llava_hvp.start").read_text().strip().partition(":")
    assert f'__import__("{module}").{function}()' in LINE
    assert callable(getattr(startup, function))
    assert module == startup.__name__


@pytest.mark.parametrize("close", ["2>&-", ">&- 2>&-"])
def test_asked_and_unable_it_ends_with_an_error_where_nobody_listens(started, close):
    # This environment has no llava_hvp, so that nothing can be pruned.
    line = f"mkdir -p llava; touch llava/__init__.py; PYTHONPATH=. python -c 'import llava' {close}"
    assert started(line, **ASKED).returncode == 1
    assert started(line.replace(close, ""), **ASKED).stderr.startswith("llava-hvp: error: ")
    assert os.linesep not in started(line.replace(close, ""), **ASKED).stderr.strip()
