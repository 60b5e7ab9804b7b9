"""A checkpoint is known again by its contents, which are read once."""

import json
import os
import shutil
import time

import pytest
from benchdata import write_textvqa
from huggingface_hub import constants

from llava_hvp.config import Request
from llava_hvp.errors import EvaluationError
from llava_hvp.evaluation import digests as checkpoint
from llava_hvp.evaluation.benchmarks import get_benchmark
from llava_hvp.evaluation.data import find_data
from llava_hvp.evaluation.digests import difference, digests_of
from llava_hvp.evaluation.job import Job
from llava_hvp.evaluation.run import evaluate
from llava_hvp.evaluation.settings import settings_of
from llava_hvp.evaluation.store import Store

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path, checkpoints):
    """A checkpoint with a vision tower of its own, long settled."""
    source = checkpoints("llava-1.5-llama")
    folder = shutil.copytree(source, tmp_path / "llava-own")
    config = json.loads((folder / "config.json").read_text())
    tower = shutil.copytree(config["mm_vision_tower"], tmp_path / "tower")
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(tower)}))
    return folder


@pytest.fixture
def look(folder, tmp_path, monkeypatch):
    """A function that gives the digests, and the names of the files that it had to read."""
    monkeypatch.setattr(checkpoint, "SETTLED", -1)  # the test waits where it must
    read, stock = [], checkpoint._Known._read

    def reading(known, path):
        read.append(path.name)
        return stock(known, path)

    monkeypatch.setattr(checkpoint._Known, "_read", reading)

    def look(path=folder, base=None):
        read.clear()
        time.sleep(0.02)  # a tick of the clock of file times
        found = digests_of(str(path), base, tmp_path / "out" / "checkpoints.json")
        return found, sorted(read)

    return look


def flip(path):
    """Change a bit of a file in place, and nothing else that can be put back."""
    time.sleep(0.02)
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_what_has_not_changed_is_not_read_again(look, folder):
    first, read = look()
    assert WEIGHTS in read
    assert set(first) == {"model", "vision tower"}
    assert {WEIGHTS, "config.json", "generation_config.json"} <= set(first["model"])
    assert len(read) == sum(map(len, first.values()))
    assert look() == (first, [])
    os.utime(folder / WEIGHTS)  # touched, and equal
    assert look() == (first, [WEIGHTS])
    assert look() == (first, [])


@pytest.mark.parametrize("how", ["in place", "replaced", "copied with its times"])
def test_one_bit_of_the_weights_is_noticed_though_size_and_time_are_as_before(
    how, look, folder, tmp_path
):
    first, _ = look()
    weights = folder / WEIGHTS
    if how == "in place":
        flip(weights)
    else:
        other = shutil.copy2(weights, tmp_path / "other")
        flip(other)
        (os.replace if how == "replaced" else shutil.copy2)(other, weights)
    second, read = look()
    assert read == [WEIGHTS]
    assert difference(first, second) == f"{WEIGHTS} of the model has changed"
    flip(weights)
    third, _ = look()
    assert third == first
    assert difference(first, third) is None


def test_every_file_that_answers_depend_on_is_known(look, folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    first, _ = look(base=str(base))
    assert set(first) == {"model", "vision tower", "base"}
    for path, part in (
        (folder / "tokenizer.model", "model"),
        (folder / "generation_config.json", "model"),
        (tmp_path / "tower" / WEIGHTS, "vision tower"),
        (base / WEIGHTS, "base"),
    ):
        flip(path)
        second, read = look(base=str(base))
        assert read == [path.name]
        assert difference(first, second) == f"{path.name} of the {part} has changed"
        first = second
    (folder / "adapter_model.bin").write_bytes(b"x")
    second, _ = look(base=str(base))
    assert difference(first, second) == "adapter_model.bin of the model is new"
    assert difference(second, first) == "adapter_model.bin of the model is gone"
    first, _ = look(base=str(base))
    for name in ("trainer_state.json", "training_args.bin", "all_results.json", "README.md"):
        (folder / name).write_bytes(b"x")
    assert look(base=str(base)) == (first, [])


def test_a_file_that_may_still_change_within_a_tick_is_read_again(look, folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "SETTLED", 60)
    first, read = look()
    assert look() == (first, read)


@pytest.mark.parametrize("content", ["", "[1]", '{"x": 1}', "{"])
def test_a_damaged_cache_is_as_good_as_none(content, look, tmp_path):
    first, read = look()
    (tmp_path / "out" / "checkpoints.json").write_text(content)
    assert look() == (first, read)
    assert look() == (first, [])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a revision of a model into a cache of the hub."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for name in ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def put(name, revision, **blobs):
        root = cache / f"models--{name.replace('/', '--')}"
        for folder in ("blobs", "refs", f"snapshots/{revision}"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for file, digest in blobs.items():
            (root / "blobs" / digest).write_text('{"mm_vision_tower": "openai/clip"}')
            link = root / "snapshots" / revision / file.replace("_json", ".json")
            link.symlink_to(f"../../blobs/{digest}")
        (root / "refs" / "main").write_text(revision)

    return put


def test_of_the_hubs_cache_nothing_is_read(look, hub):
    assert look("a/llava") == ({"model": None, "vision tower": None}, [])
    hub("a/llava", "r1", config_json="c" * 40)
    without, read = look("a/llava")
    assert (without, read) == ({"model": {"config.json": "c" * 40}, "vision tower": None}, [])
    hub("openai/clip", "r1", config_json="d" * 40)
    first, read = look("a/llava")
    assert first == {"model": {"config.json": "c" * 40}, "vision tower": {"config.json": "d" * 40}}
    assert read == []
    assert difference(without, first) is None  # downloaded since
    assert difference(first, without) == "the files of the vision tower are no longer here"
    hub("a/llava", "r2", config_json="e" * 40)
    assert difference(first, look("a/llava")[0]) == "config.json of the model has changed"


@pytest.mark.parametrize(("version", "finds"), [("4.57.6", True), ("5.23.0", False)])
def test_the_older_variable_counts_where_transformers_reads_it(
    version, finds, look, hub, tmp_path, monkeypatch
):
    hub("a/llava", "r1", config_json="c" * 40)
    monkeypatch.setattr(checkpoint.importlib.metadata, "version", lambda name: version)
    monkeypatch.setenv("TRANSFORMERS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nowhere"))
    assert (look("a/llava")[0]["model"] is not None) == finds


def test_a_folder_that_only_looks_like_the_hubs_is_read(look, folder, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (folder / WEIGHTS).rename(blobs / "weights")
    (folder / WEIGHTS).symlink_to(blobs / "weights")
    first, _ = look()
    flip(blobs / "weights")
    assert difference(first, look()[0]) == f"{WEIGHTS} of the model has changed"


def test_large_files_are_announced_and_unreadable_ones_named(folder, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "LARGE", 1000)
    digests_of(str(folder), None)
    assert f"reading 0.0 GB of {folder} to know it again" in capsys.readouterr().err

    def refuse(*args, **kwargs):
        raise PermissionError("not for you")

    monkeypatch.setattr(checkpoint.Path, "open", refuse)
    with pytest.raises(EvaluationError, match=r"cannot read .* of the checkpoint: not for you"):
        digests_of(str(folder), None)


@pytest.fixture
def run(tmp_path, look):
    """Settings of a run, and its folder with an answer in it."""
    write_textvqa(tmp_path / "data")
    benchmark = get_benchmark("textvqa")
    data = find_data(benchmark, tmp_path / "data")
    store = Store(tmp_path / "run", data.questions)
    store.parts.mkdir(parents=True)
    store.answers_file.write_text("{}\n")

    def settings(model="a/llava"):
        return settings_of(
            benchmark,
            Request(),
            model_path=model,
            model_base=None,
            stock=(),
            questions=data.questions,
            cache=tmp_path / "out" / "checkpoints.json",
        )

    return store, settings


@pytest.mark.parametrize("before", [None, "0123456789abcdef"], ids=["hub", "folder"])
def test_answers_of_an_earlier_release_are_refused_in_one_line(before, run):
    store, settings = run
    path = store.folder / "settings.json"
    path.write_text(json.dumps(settings() | {"checkpoint": before}))
    with pytest.raises(EvaluationError) as refused:
        store.check_settings(settings())
    line = str(refused.value)
    assert "may not be this checkpoint's: they are from a release that knew a checkpoint by" in line
    assert "Give --restart to throw those answers away, or --out another folder" in line
    assert "\n" not in line
    store.restart()
    store.check_settings(settings())
    assert json.loads(path.read_text()) == settings()


def test_what_was_downloaded_by_the_run_itself_is_noted(run, hub, capsys):
    store, settings = run
    path, begun = store.folder / "settings.json", settings()
    path.write_text(json.dumps(begun))
    hub("a/llava", "r1", config_json="c" * 40)
    killed = settings()
    store.check_settings(killed)
    assert "its answers are taken for this checkpoint's, which was not here" in (
        capsys.readouterr().err
    )
    assert json.loads(path.read_text()) == killed
    store.check_again(begun, killed["checkpoint"])
    assert json.loads(path.read_text())["checkpoint"]["model"] == {"config.json": "c" * 40}
    store.check_settings(settings())
    assert capsys.readouterr().err == ""


def test_a_checkpoint_that_changes_while_it_answers_is_no_result(run, folder, look):
    store, settings = run
    given = settings(str(folder))
    store.check_again(given, look()[0])
    flip(folder / WEIGHTS)
    with pytest.raises(EvaluationError, match=f"changed while it was answering: {WEIGHTS}"):
        store.check_again(given, look()[0])


def test_a_run_looks_at_its_checkpoint_again_at_the_end(tmp_path, folder, look, monkeypatch):
    write_textvqa(tmp_path / "data")

    def answer(job, store, images):
        lines = [
            {
                "question_id": q["question_id"],
                "prompt": q["text"],
                "text": "",
                "answer_id": str(row),
            }
            for row, q in enumerate(store.questions.items)
        ]
        (store.parts / "0.answers.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        flip(folder / WEIGHTS)

    monkeypatch.setattr("llava_hvp.evaluation.workers.answer", answer)
    job = Job(get_benchmark("textvqa"), str(folder), Request(), tmp_path / "data", tmp_path / "out")
    with pytest.raises(EvaluationError, match=f"changed while it was answering: {WEIGHTS}"):
        evaluate(job)
    assert not list((tmp_path / "out").rglob("result.json"))
    with pytest.raises(EvaluationError, match=f"{WEIGHTS} of the model has changed"):
        evaluate(job)
