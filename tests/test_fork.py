"""Processes that a pruned one forks: each counts for itself, and none goes unpruned unseen."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from evaluation import call

ASKED = {"LLAVA_HVP": "--prune-method hivtp --r-max 0.5", "LLAVA_HVP_DEVICE": "cpu"}
HEAD = """
import multiprocessing, os, sys
import torch
from torch.utils.data import DataLoader
from llava.model.builder import load_pretrained_model

def load():
    return load_pretrained_model({path!r}, None, "llava")[1]

def encode(model, images=1):
    with torch.no_grad():
        pixels = torch.zeros(images, 3, 112, 112, dtype=model.dtype)
        return [len(f) for f in model.encode_images(pixels)]

def encode_past_us(*images):
    import types
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    tower = CLIPVisionTower({tower!r}, types.SimpleNamespace(mm_vision_select_layer=-2))
    tower(torch.zeros(2, 3, 112, 112))
    print("went on", flush=True)

def forked(work, leave=os._exit):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    work()
    leave(0)

def encode_loaded(images):
    return encode(model, images)

def encode_own(images):
    return encode(load(), images)

fork = multiprocessing.get_context("fork")
"""
SCRIPTS = {
    # A pool is ended by SIGTERM, a DataLoader's workers by os._exit.
    "healthy": "model = load()\n"
    "print(len(list(DataLoader(list(range(4)), num_workers=2))))\n"
    "with fork.Pool(2) as pool:\n    print(pool.map(encode_loaded, [1, 2]))\n"
    "print(forked(lambda: encode(model)), forked(lambda: None), forked(lambda: 0, sys.exit))\n"
    "encode(model)\n",
    "own": "with fork.Pool(2) as pool:\n    print(pool.map(encode_own, [1, 2]))\n",
    "spawned": 'if __name__ == "__main__":\n'
    '    with multiprocessing.get_context("spawn").Pool(1) as pool:\n'
    "        print(pool.map(encode_own, [1]))\n",
    "past": "model = load()\n"
    "child = fork.Process(target=encode_past_us)\nchild.start()\nchild.join()\n"
    "print(child.exitcode, forked(encode_past_us, sys.exit), encode(model))\n",
    "caught": "def work():\n    try:\n        encode_past_us()\n    except Exception:\n"
    "        print('caught', flush=True)\n"
    "model = load()\nprint(forked(work), encode(model))\n",
}
RUN = "llava-hvp run --prune-method hivtp --r-max 0.5 -- python"


@pytest.fixture(scope="module")
def ended(checkpoints, tmp_path_factory):
    """Each script of this file by its name, and "alone" without the launcher, at its end."""
    folder = tmp_path_factory.mktemp("fork")
    path = checkpoints("llava-1.5-llama")
    tower = json.loads((path / "config.json").read_text())["mm_vision_tower"]
    head = HEAD.format(path=str(path), tower=tower)
    for name, code in SCRIPTS.items():
        (folder / f"{name}.py").write_text(head + code)
    lines = {name: f"{RUN} {name}.py" for name in SCRIPTS} | {"alone": "python past.py"}
    environ = {name: {"LLAVA_HVP_DEVICE": "cpu"} for name in SCRIPTS} | {"alone": ASKED}
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda name: call(lines[name], folder, **environ[name]), lines)
        return dict(zip(lines, ends, strict=True))


def last_of_ours(result):
    """Our last line; Python's own resource tracker may speak after it."""
    return [line for line in result.stderr.splitlines() if line.startswith("llava-hvp: ")][-1]


def test_healthy_children_are_counted_and_none_is_taken_for_killed(ended):
    result = ended["healthy"]
    assert result.returncode == 0, result.stderr
    assert result.stdout == "4\n[[32], [32, 32]]\n0 0 0\n"
    assert "did not finish" not in result.stderr
    # One or two workers of the pool, the fork that encoded, and the parent.
    assert " processes, 5 images, kept 50.0% of stock's" in last_of_ours(result)
    assert result.stderr.count("pruning on") == 1


@pytest.mark.parametrize(("name", "images"), [("own", 3), ("spawned", 1)])
def test_children_with_models_of_their_own(ended, name, images):
    result = ended[name]
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("[[32], [32, 32]]\n" if images == 3 else "[[32]]\n")
    assert "did not finish" not in result.stderr
    assert "pruning on" in result.stderr
    assert "kept 50.0% of stock's" in last_of_ours(result)


@pytest.mark.parametrize("name", ["past", "alone"])
def test_a_fork_that_would_encode_unpruned_ends_with_an_error(ended, name):
    result = ended[name]
    assert result.stdout == "1 1 [32]\n", result.stderr
    assert result.stderr.count("error: 2 images would have been encoded without pruning") == 2
    assert result.returncode == (1 if name == "past" else 0)


def test_the_launcher_sees_a_fork_that_leaves_without_a_word(ended):
    result = ended["caught"]
    assert (result.returncode, result.stdout) == (1, "caught\n0 [32]\n"), result.stderr
    assert "images were encoded without pruning" in result.stderr
    assert "did not finish pruned" in result.stderr
