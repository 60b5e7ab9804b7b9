"""Folders that are called after a checkpoint lie below --out, whatever --model-path is."""

import os
from pathlib import Path

import pytest

from llava_hvp.checkpoints.naming import model_name, named_path
from llava_hvp.cli import main
from llava_hvp.config import Request
from llava_hvp.errors import OptionError
from llava_hvp.evaluation.benchmarks import get_benchmark
from llava_hvp.evaluation.job import Job
from llava_hvp.evaluation.plan import plan
from llava_hvp.evaluation.published import get_table
from llava_hvp.shapes import checkpoint

ODD = (
    *("..", ".", "../", "./", "/", "//", "", "models/..", "models/../", "../..", "a/../..", "..//"),
    *("../checkpoint-5", "./checkpoint-5", "/checkpoint-5", "..//checkpoint-5", "~/.."),
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory: a checkpoint's folder, with a folder in it."""
    folder = tmp_path / "llava-v1.5-tiny" / "models"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent)
    return folder.parent


@pytest.mark.parametrize("path", ODD)
def test_every_folder_lies_below_out(path, here, tmp_path):
    name = model_name(path)
    assert Path(name).name == name not in ("", "..")
    out = tmp_path / "out"
    job = Job(get_benchmark("pope"), path, Request(), tmp_path / "data", out)
    for folder in (job.folder, *of_lmms(path, tmp_path / "data", out)):
        assert Path(os.path.normpath(folder)) == folder
        assert out in folder.parents
    assert len(job.folder.relative_to(out).parts) == 3


def of_lmms(path, data, out):
    steps = plan(
        get_table("hivtp-1"),
        model_path=path,
        data=data,
        out=out,
        gpus=("0",),
        device="cpu",
        only=["ocrbench"],
    )
    return [Path(s.command[s.command.index("--output_path") + 1]) for s in steps]


def test_a_path_that_ends_in_no_name_is_called_after_the_folder_that_it_leads_to(here):
    assert model_name(".") == model_name("models/..") == model_name("./") == "llava-v1.5-tiny"
    assert model_name("./checkpoint-5") == "llava-v1.5-tiny_checkpoint-5"
    assert named_path("models/..") == str(here)
    for plain in ("a/llava-x", "llava-x/", "../llava-x", "a/../llava-x/checkpoint-5", "~/llava-x"):
        assert named_path(plain) == plain


@pytest.mark.parametrize("path", ["/", "//", "", " ", "/.."])
@pytest.mark.parametrize("command", ["eval pope", "reproduce hivtp-1", "bench"])
def test_a_path_without_any_name_is_refused(command, path, tmp_path, capsys):
    with pytest.raises(OptionError, match="has no name"):
        named_path(path)
    out = tmp_path / "a" / "b" / "out"
    flags = ["--device", "cpu", "--out", str(out)]
    assert main([*command.split(), "--model-path", path, *flags]) == 2
    assert "that has no name: give a checkpoint's folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_measuring_from_within_the_checkpoint_writes_below_out(tmp_path, monkeypatch, capsys):
    """`accuracy --model-path .` wrote beside --out, `bench` could not load it."""
    folder = checkpoint(tmp_path / "models", "llava-shapes")
    monkeypatch.chdir(folder)
    out = tmp_path / "a" / "out"
    flags = ["--model-path", ".", "--out", str(out), "--device", "cpu"]
    assert main(["accuracy", "--questions", "6", "--methods", "none", *flags]) == 0
    short = ["--rounds", "2", "--new-tokens", "3", "--methods", "uniform", "--r-max", "0.5"]
    assert main(["bench", *short, *flags]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"models", "a"}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]
    assert {p.name for p in out.iterdir()} == {
        *("llava-shapes.json", "llava-shapes.md"),
        *(f"llava-shapes-cpu.{suffix}" for suffix in ("json", "md", "png")),
    }
