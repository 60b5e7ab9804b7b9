"""The hook that runs at the start of every Python: asleep, unless a LLaVA command asks for it."""

import ast
import subprocess
import sys
from pathlib import Path

import llava_hvp_startup as startup
import pytest

from llava_hvp import config

LOADED = "import sys; print([m for m in ('torch', 'llava', 'llava_hvp') if m in sys.modules])"


def python(*arguments, **environ):
    """Run this interpreter with nothing of ours in the environment but `environ`."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "OMP_WAIT_POLICY": "PASSIVE", **environ},
        check=False,
    )


@pytest.fixture
def started(monkeypatch):
    """A function that puts this process in the state of one just started, and wakes the hook."""

    def start(*argv, orig=None, **environ):
        for name in ("LLAVA_HVP", "LLAVA_HVP_DEVICE", "LLAVA_HVP_DISABLE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", list(argv))
        monkeypatch.setattr(sys, "orig_argv", orig or ["python", *argv])
        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        for name in ("llava", *startup.TRANSFORMERS):  # waking would prune what is there
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(startup, "_finder", None)
        for name in ("sys.addaudithook", "atexit.register"):  # neither could be taken back
            monkeypatch.setattr(name, lambda *arguments: None)
        startup.wake()
        return any(isinstance(finder, startup.LlavaFinder) for finder in sys.meta_path)

    return start


def module(*arguments, interpreter=()):
    """(argv, orig_argv) of `python -m` at the time of the hook."""
    name, *rest = arguments
    return ["-m", *rest], ["python", *interpreter, "-m", name, *rest]


@pytest.mark.parametrize("command", sorted(startup.EVALUATING | startup.SERVING))
@pytest.mark.parametrize("flag", ["--prune-method", "--r-max=0.5", "--prune-opt", "--help", "-h"])
def test_it_wakes_for_our_flags_on_a_llava_command(started, command, flag):
    argv, orig = module(command, "--model-path", "x", flag, "hivtp")
    assert started(*argv, orig=orig)


def test_it_knows_every_flag_of_ours():
    parser = config.parser()
    config.add_flags(parser, device=False)
    assert set(startup.FLAGS) == {word for a in parser._actions for word in a.option_strings}


def test_it_wakes_for_scripts_of_a_checkout(started, tmp_path):
    assert started(str(tmp_path / "llava/eval/model_vqa.py"), "--prune-method", "hivtp")


def test_it_wakes_for_our_variables_in_any_program(started):
    assert started("my_script.py", LLAVA_HVP="--prune-method hivtp")
    assert started("my_script.py", LLAVA_HVP_DEVICE="cpu")


@pytest.mark.parametrize(
    "interpreter", [(), ("-u",), ("-X", "utf8"), ("-W", "ignore", "-O"), ("-I",)]
)
def test_it_finds_the_module_behind_the_interpreters_own_options(started, interpreter):
    argv, orig = module("llava.eval.run_llava", "--r-max", "1", interpreter=interpreter)
    assert started(*argv, orig=orig)
    assert startup.llava_command() == "llava.eval.run_llava"


def test_it_finds_the_module_in_one_word_with_its_option(started):
    assert started("-m", "-h", orig=["python", "-Bmllava.serve.cli", "-h"])
    assert startup.llava_command() == "llava.serve.cli"


@pytest.mark.parametrize(
    ("argv", "orig"),
    [
        module("llava.eval.model_vqa", "--model-path", "x"),
        module("llava.serve.cli", "--device", "cpu"),
        module("pytest", "--prune-method", "hivtp"),
        module("llava.eval.eval_textvqa", "--prune-method", "hivtp"),
        module("mine.llava.eval", "--prune-method", "hivtp"),
        (["my_script.py", "--prune-method", "hivtp"], None),
        (["-c", "--prune-method"], None),
        (["", ""], None),
    ],
)
def test_it_sleeps_for_everything_else(started, argv, orig):
    assert not started(*argv, orig=orig)


def test_device_is_ours_only_where_the_command_has_none(started):
    argv, orig = module("llava.eval.model_vqa", "--device", "cpu")
    assert started(*argv, orig=orig)


def test_it_can_be_switched_off(started):
    argv, orig = module("llava.eval.model_vqa", "--prune-method", "hivtp")
    assert not started(*argv, orig=orig, LLAVA_HVP_DISABLE="1", LLAVA_HVP="--prune-method hivtp")
    assert started(*argv, orig=orig, LLAVA_HVP_DISABLE="0")


def test_waking_twice_is_waking_once(started):
    started("x.py", LLAVA_HVP="--prune-method hivtp")
    startup.wake()
    assert sum(isinstance(finder, startup.LlavaFinder) for finder in sys.meta_path) == 1


def test_every_python_that_asks_runs_it_and_loads_nothing_more():
    seen = python("-c", LOADED)
    assert (seen.stdout, seen.stderr) == ("[]\n", "")
    code = "import sys; print('llava_hvp_startup' in sys.modules); " + LOADED
    asked = python("-c", code, LLAVA_HVP="--prune-method hivtp", LLAVA_HVP_DEVICE="cpu")
    assert (asked.stdout, asked.stderr) == ("True\n[]\n", "")


def test_asleep_it_imports_nothing_that_python_has_not():
    path = str(Path(startup.__file__).parent)
    hooked = python(
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, {path!r}); import os; before = set(sys.modules); "
        "import llava_hvp_startup; llava_hvp_startup.wake(); print(set(sys.modules) - before)",
    )
    assert ast.literal_eval(hooked.stdout) <= {"llava_hvp_startup", "__future__"}


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["--prune-method", "hivtpp"], {}, "unknown method 'hivtpp'"),
        ([], {"LLAVA_HVP": "--prune-method hivtp --r-max 2"}, "r_max=2.0"),
    ],
)
def test_a_typo_ends_the_command_in_one_line(arguments, environ, message):
    result = python("-m", "llava.eval.model_vqa", "--model-path", "none", *arguments, **environ)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_a_typo_in_a_flags_name_is_an_error_of_the_command_itself():
    stock = ["--image-file", "x", "--query", "y"]
    result = python("-m", "llava.eval.run_llava", *stock, "--r-mx", "1")
    assert result.returncode == 2
    assert "unrecognized arguments: --r-mx 1" in result.stderr


def test_nobody_can_go_on_after_the_refusal():
    # As LLaVA's own `llava/model/__init__.py` does with whatever goes wrong.
    code = "try:\n    import llava\nexcept:\n    pass\nprint('went on')"
    result = python("-c", code, LLAVA_HVP="--prune-method nonsense")
    assert (result.returncode, result.stdout) == (2, "")


@pytest.mark.parametrize(
    ("command", "own", "others"),
    [
        ("llava.eval.model_vqa_loader", ["--device {cuda,cpu}"], ["--answers-file"]),
        ("llava.serve.cli", [], ["--load-4bit", "--device DEVICE"]),
    ],
)
def test_help_shows_our_flags_beside_the_commands_own(command, own, others):
    result = python("-m", command, "--help", COLUMNS="200")
    assert result.returncode == 0, result.stderr
    ours = ["--prune-method NAME", "--r-max R", "--num-tokens N", "--prune-opt KEY=VALUE"]
    for flag in [*ours, *own, *others]:
        assert flag in result.stdout
    assert "--prune-train" not in result.stdout
