"""What is given for a method: an object, a name with options, a mapping of a request, None."""

import json

import pytest

import llava_hvp
from llava_hvp import HIVTP, FastV, HiPrune, HiPrunePlus, Runtime
from llava_hvp.errors import LlavaHvpError, OptionError, UnsupportedModelError
from llava_hvp.given import config_for, config_of
from llava_hvp.methods.unpruned import Unpruned
from llava_hvp.runtime import PruningConfig

ROWS = Runtime(newline="all")


@pytest.mark.parametrize(
    ("given", "options", "config"),
    [
        (("hivtp",), {"r_max": 0.25}, PruningConfig(HIVTP(r_max=0.25))),
        (("hivtp",), {"newline": "all"}, PruningConfig(HIVTP(), ROWS)),
        (("hivtp", None, ROWS), {"regions": 3}, PruningConfig(HIVTP(regions=3), ROWS)),
        (("hiprune++",), {"num_tokens": 9}, PruningConfig(HiPrunePlus(num_tokens=9))),
        (("fastv",), {"r_max": 0.25}, PruningConfig(Unpruned(), inside=FastV(r_max=0.25))),
        (
            ("hivtp+fastv",),
            {"r_max": 0.5, "inside_r_max": 0.75},
            PruningConfig(HIVTP(r_max=0.5), inside=FastV(r_max=0.75)),
        ),
        (("hiprune", "fastv"), {}, PruningConfig(HiPrune(), inside=FastV())),
        (("none",), {}, PruningConfig(Unpruned())),
    ],
)
def test_a_name_and_options_are_the_object(given, options, config):
    assert config_of(*given, options=options) == config


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (("hivpt",), {}, "unknown method 'hivpt': did you mean hivtp"),
        (("hiprune", "fastw"), {}, r"unknown method 'hiprune\+fastw'"),
        (("hivtp",), {"rmax": 0.5}, "hivtp: unknown option 'rmax': did you mean r_max"),
        (("hivtp",), {"r_max": "x"}, "r_max='x'"),
        ((HIVTP(),), {"r_max": 0.5}, "r_max=0.5 beside HIVTP.*by name"),
        ((HIVTP(), "fastv"), {}, "both methods as objects, or both by name"),
        (("hivtp", FastV()), {}, "both methods as objects, or both by name"),
        (("fastv", "fastv"), {}, "both prune inside the language model"),
        (("hivtp", None, ROWS), {"newline": "none"}, "newline='none' beside a runtime"),
        (("hivtp", None, 7), {}, "runtime=7 is no Runtime"),
    ],
)
def test_what_is_no_method_is_told_and_the_nearest_named(given, options, message):
    with pytest.raises(OptionError, match=message):
        config_of(*given, options=options)


def test_prune_and_install_take_names():
    for call in (lambda *a, **o: llava_hvp.prune(object(), *a, **o), llava_hvp.install):
        with pytest.raises(OptionError, match="unknown option 'rmax': did you mean r_max"):
            call("hivtp", rmax=0.5)
    with pytest.raises(UnsupportedModelError, match="object is not a LLaVA model"):
        llava_hvp.prune(object(), "hivtp", r_max=0.5)


def request(text):
    return json.loads(text)


@pytest.mark.parametrize(
    ("given", "config"),
    [
        ((None,), PruningConfig(Unpruned(), ROWS)),
        ((HIVTP(r_max=0.25),), PruningConfig(HIVTP(r_max=0.25), ROWS)),
        ((FastV(),), PruningConfig(Unpruned(), ROWS, FastV())),
        (((HIVTP(), FastV()),), PruningConfig(HIVTP(), ROWS, FastV())),
        ((HIVTP(), FastV()), PruningConfig(HIVTP(), ROWS, FastV())),
        (("none",), PruningConfig(Unpruned(), ROWS)),
        (
            (request('{"method": "hivtp", "r_max": 0.25, "layers": [7, 8]}'),),
            PruningConfig(HIVTP(r_max=0.25, layers=(7, 8)), ROWS),
        ),
        (
            (request('{"method": "hivtp+fastv", "inside_r_max": 0.75}'),),
            PruningConfig(HIVTP(), ROWS, FastV(r_max=0.75)),
        ),
    ],
)
def test_a_block_a_call_or_a_request_gives_a_method_and_the_model_runs_as_before(given, config):
    assert config_for(ROWS, *given) == config


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (({"r_max": 0.25},), {}, "give the name and its options"),
        (({"method": HIVTP()},), {}, "give the name and its options"),
        (({"method": "hivtp"},), {"r_max": 0.5}, "give the name and its options"),
        (({"method": "hivtp", "r_mx": 0.25},), {}, "unknown option 'r_mx': did you mean r_max"),
        (({"method": "hivtp", "r_max": 2},), {}, "r_max=2"),
        (({"method": "hivtp", "r_max": {"a": 1}},), {}, "r_max="),
        (({"method": "hivtp", "tiling": "672"},), {}, "tiling says how the model runs"),
        (("hivtp",), {"newline": "none"}, "newline says how the model runs"),
        (("hiprune++",), {"clip_text": "x"}, "clip_text='x' names the CLIP of a model"),
        ((None,), {"r_max": 0.5}, "r_max=0.5 beside None"),
        ((None, FastV()), {}, "None is no Method"),
        ((7,), {}, "7 is no Method"),
        (([1, 2, 3],), {}, "is no Method"),
    ],
)
def test_what_a_block_cannot_be_given_is_told(given, options, message):
    with pytest.raises(LlavaHvpError, match=message):
        config_for(ROWS, *given, options=options)
