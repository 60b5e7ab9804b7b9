"""Pruning put on and taken off by several threads at once."""

import contextlib
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from llava_hvp import HIVTP, Uniform, prune, unprune
from llava_hvp.errors import PrunedStateError, TextEncoderError
from llava_hvp.hosts.llava import builder
from llava_hvp.hosts.llava.tower import PrunedCLIPVisionTower
from llava_hvp.pruning.pruning import Pruning


class Meeting:
    """A place where two threads wait for each other, a second at most."""

    def __init__(self):
        self._barrier = threading.Barrier(2)

    def wait(self):
        # Broken where the other one is not let in, which is right.
        with contextlib.suppress(threading.BrokenBarrierError):
            self._barrier.wait(1)


@dataclass(frozen=True, kw_only=True)
class Meets(Uniform):
    """A method whose check ends when that of a second thread has begun as well."""

    meeting: Meeting = field(default_factory=Meeting)

    def check(self, grid):
        self.meeting.wait()


def at_once(*steps):
    """What each step, in a thread of its own, gives or raises."""
    results = [None] * len(steps)

    def run(index, step):
        try:
            results[index] = step()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(steps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_of_two_threads_one_prunes_and_the_other_is_told(own, photos):
    bundle = own("llava-1.5-llama")
    method = Meets(num_tokens=5)
    results = at_once(*(lambda: prune(bundle.model, method),) * 2)
    (pruning,) = (result for result in results if isinstance(result, Pruning))
    (error,) = (result for result in results if result is not pruning)
    assert isinstance(error, PrunedStateError)
    assert bundle.model.llava_hvp is pruning
    with pruning:
        bundle.embeds(bundle.ids("x"), bundle.pixels(photos[0]), None)
        assert pruning.last[0].kept_tokens == 5
    assert not isinstance(bundle.model.get_vision_tower(), PrunedCLIPVisionTower)
    with pytest.raises(PrunedStateError, match="not pruned"):
        unprune(bundle.model)


def test_of_two_that_unprune_one_is_told(own, monkeypatch):
    model = own("llava-1.5-llama").model
    prune(model, HIVTP())
    meeting, stock = Meeting(), PrunedCLIPVisionTower.release

    def release(tower):
        meeting.wait()
        stock(tower)

    monkeypatch.setattr(PrunedCLIPVisionTower, "release", release)
    results = at_once(*(lambda: unprune(model),) * 2)
    assert sorted(type(r) for r in results if r is not None) == [PrunedStateError]


def test_a_prune_that_fails_takes_back_no_pruning_but_its_own(own, monkeypatch):
    """Its model may have been unpruned and pruned anew while it looked for a text encoder."""
    model = own("llava-1.5-llama").model
    stock, theirs = Pruning.load_text, []

    def load_text(pruning):
        if pruning.method == HIVTP(r_max=0.25):
            return stock(pruning)
        unprune(model)
        theirs.append(prune(model, HIVTP(r_max=0.25)))
        raise TextEncoderError("there is none")

    monkeypatch.setattr(Pruning, "load_text", load_text)
    with pytest.raises(TextEncoderError, match="there is none"):
        prune(model, HIVTP(r_max=0.5))
    assert model.llava_hvp is theirs[0]
    assert isinstance(model.get_vision_tower(), PrunedCLIPVisionTower)


def test_the_end_of_a_block_takes_back_no_pruning_but_its_own(own):
    model = own("llava-1.5-llama").model
    with prune(model, HIVTP(r_max=0.5)):
        _, theirs = at_once(lambda: unprune(model)) + at_once(lambda: prune(model, HIVTP()))
    assert model.llava_hvp is theirs
    assert isinstance(model.get_vision_tower(), PrunedCLIPVisionTower)


def test_of_two_that_install_one_is_told(monkeypatch):
    meeting, load = Meeting(), builder.importlib.import_module

    def import_module(name):
        meeting.wait()
        return load(name)

    monkeypatch.setattr(builder, "importlib", SimpleNamespace(import_module=import_module))
    results = at_once(*(lambda: builder.install(HIVTP()),) * 2)
    try:
        assert sorted(type(r) for r in results if r is not None) == [PrunedStateError]
    finally:
        builder.uninstall()
    with pytest.raises(PrunedStateError, match="nothing to undo"):
        builder.uninstall()
