"""Flags, LLAVA_HVP and keyword arguments say the same things, and wrong ones are named."""

import argparse
import shlex

import pytest

from llava_hvp import HIVTP, HiPrune, HiPrunePlus, VisionMethod, get_method, list_methods
from llava_hvp.checkpoints.variants import variants
from llava_hvp.cli.evaluate import requested
from llava_hvp.config import Request, add_flags, from_environment, parse, to_flags
from llava_hvp.errors import OptionError
from llava_hvp.evaluation.model_args import model_args, pruning_of
from llava_hvp.runtime import PruningConfig, Runtime


def parsed(line, device=True):
    return parse(shlex.split(line), device=device)


def test_flags_of_a_command_are_told_from_its_own():
    request, rest = parsed(
        "--model-path x --prune-method hivtp --num-chunks 2 --r-max=0.25 --temperature 0"
    )
    assert request == Request(PruningConfig(HIVTP(r_max=0.25)))
    assert rest == ["--model-path", "x", "--num-chunks", "2", "--temperature", "0"]


def test_a_command_without_our_flags_keeps_all_of_its_own():
    line = ["--model-path", "x", "--num", "2"]
    assert parse(line, device=False) == (Request(), line)


def test_shortened_flags_are_left_to_the_command():
    # `--num` would be --num-tokens by abbreviation, and is --num-chunks to the eval scripts.
    assert parsed("--num 3")[1] == ["--num", "3"]


@pytest.mark.parametrize(
    ("line", "method"),
    [
        ("hivtp", HIVTP(r_max=0.5)),
        ("hivtp --prune-opt layers=7,8,9", HIVTP(layers=(7, 8, 9))),
        ("hivtp --prune-opt layers=7", HIVTP(layers=(7,))),
        ("hivtp --prune-opt k=25 --prune-opt window=2", HIVTP(k=25, window=2)),
        ("hivtp --prune-opt k=25 --prune-opt window=none", HIVTP(k=25, window=None)),
        ("hiprune --prune-opt buffer=none --prune-opt alpha=0", HiPrune(buffer="none", alpha=0)),
        ("hiprune --prune-opt num_tokens=64", HiPrune(num_tokens=64)),
        ("hiprune++ --prune-opt extra=true --prune-opt text=llm",
         HiPrunePlus(extra=True, text="llm")),
    ],
)  # fmt: skip
def test_options_are_read_as_the_method_has_them(line, method):
    assert parsed(f"--prune-method {line}")[0].pruning.method == method


@pytest.mark.parametrize(
    ("line", "method", "runtime"),
    [
        ("hivtp --prune-opt newline=none", HIVTP(), Runtime(newline="none")),
        ("hivtp --prune-opt tiling=672", HIVTP(), Runtime(tiling="672")),
        ("hiprune --num-tokens 640 --prune-opt patch_merge=spatial",
         HiPrune(num_tokens=640), Runtime(patch_merge="spatial")),
        ("hiprune --prune-opt tower-dtype=model --prune-opt tower_attention=stock",
         HiPrune(), Runtime(tower_dtype="model", tower_attention="stock")),
    ],
)  # fmt: skip
def test_options_of_the_run_are_told_from_those_of_the_method(line, method, runtime):
    assert parsed(f"--prune-method {line}")[0].pruning == PruningConfig(method, runtime)


TURNS = "--prune-method hivtp --train-r-max"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--prune-method hivtpp", "unknown method 'hivtpp'.*hivtp"),
        ("--prune-method hivtp --r-max 1.5", r"r_max=1.5.*\(0, 1\]"),
        ("--prune-method hivtp --r-max nan", "r_max=nan"),
        ("--prune-method hivtp --r-max half", "'half' is no number"),
        ("--prune-method hivtp --num-tokens 1.5", "'1.5' is no whole number"),
        ("--prune-method hivtp --num-tokens 0", "num_tokens=0"),
        ("--prune-method hivtp --r-max 0.5 --num-tokens 3", "exclude each other"),
        ("--prune-method hivtp --prune-opt windw=3", "'windw'.*window"),
        ("--prune-method hivtp --prune-opt window", "KEY=VALUE"),
        ("--prune-method hivtp --prune-opt window=two", "window='two'"),
        ("--prune-method hivtp --r-max 0.5 --prune-opt r_max=0.3", "r_max is given twice"),
        ("--prune-method hiprune --prune-opt alpha=2", r"alpha=2.*\[0, 1\]"),
        ("--r-max 0.5", "--r-max without --prune-method"),
        ("--prune-opt alpha=1", "--prune-opt without --prune-method"),
        ("--prune-train", "--prune-train without --prune-method"),
        ("--train-r-max 1,0.25 --prune-train", "--train-r-max without --prune-method"),
        (f"{TURNS} 1,0.25", "--train-r-max without --prune-train"),
        ("--prune-method none --train-r-max 1,0.25 --prune-train", "name a method"),
        (f"{TURNS} 1,,0.25 --prune-train", "'' is no number"),
        (f"{TURNS} 0.25,1.5 --prune-train", r"r_max=1.5.*\(0, 1\]"),
        (f"{TURNS} 1 --prune-train --num-tokens 3", "beside --num-tokens: give one"),
        (f"{TURNS} 1 --prune-train --prune-opt r_max=1", "beside --r-max: give one"),
        ("--r-max 0.5", "give one of .*, none$"),
        ("--prune-method none --r-max 2", r"none: r_max=2.0.*\(0, 1\]"),
        ("--prune-method none --r-max 0.5 --num-tokens 3", "exclude each other"),
        ("--prune-method none --prune-opt tiling=2x2", "tiling='2x2'.*stock.*672"),
        ("--prune-method none --prune-opt windw=3", "none: unknown option 'windw'"),
        ("--prune-method none --prune-opt window", "KEY=VALUE"),
        ("--prune-method", "expected one argument"),
        ("--prune-method hivtp --device tpu", "'tpu'"),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(line, message):
    with pytest.raises(OptionError, match=message):
        parsed(line)


LONG = {
    "list": "7," * 100_000,
    "nested": "(" * 200_000,
    "signs": "-" * 200_000 + "1",
    "nested less": "(" * 900,
    "fewer signs": "-" * 990 + "1",
    "digits": "9" * 5000,
    "no key": "{[]: 1}",
}


@pytest.mark.parametrize("option", ["layers", "regions", "k"])
@pytest.mark.parametrize("value", LONG.values(), ids=LONG)
def test_an_endless_value_is_refused_in_one_short_line(option, value):
    """Python's own parser ends such ones with a MemoryError, RecursionError or TypeError."""
    with pytest.raises(OptionError, match=f"{option}=") as raised:
        parse(["--prune-method", "hivtp", "--prune-opt", f"{option}={value}"], device=True)
    assert len(str(raised.value)) < 250
    assert "give a" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prune-method", "x" * 9999],
        ["--prune-method", "hivtp", "--r-max", "x" * 9999],
        ["--prune-method", "hivtp", "--num-tokens", "9" * 9999],
        ["--prune-method", "hivtp", "--device", "x" * 9999],
        ["--prune-method", "hivtp", "--prune-opt", "x" * 9999],
        ["--prune-method", "hivtp", "--prune-opt", "x" * 9999 + "=1"],
        ["--prune-method", "hiprune", "--prune-opt", "buffer=" + "x" * 999],
    ],
    ids=lambda a: a[-2],
)
def test_an_error_shows_the_beginning_of_what_is_long(arguments):
    with pytest.raises(OptionError, match=r"xxxx|9999") as raised:
        parse(arguments, device=True)
    assert len(str(raised.value)) <= 350
    with pytest.raises(OptionError, match="LLAVA_HVP=") as raised:
        from_environment({"LLAVA_HVP": shlex.join(arguments)})
    assert len(str(raised.value)) <= 500


@pytest.mark.parametrize("name", list_methods(VisionMethod))
@pytest.mark.parametrize("options", [{}, {"r_max": 0.3}, {"num_tokens": 77, "newline": "none"}])
def test_the_variable_carries_every_method_unchanged(name, options):
    request = Request(PruningConfig.of(name, **options), True, "cpu", "/tmp/a folder")
    assert from_environment({"LLAVA_HVP": shlex.join(to_flags(request))}) == request


def test_the_variable_carries_options_that_are_no_words():
    for method in (HIVTP(layers=(7, 8)), HIVTP(k=25.5, window=None, regions=1)):
        text = shlex.join(to_flags(Request(PruningConfig(method))))
        assert from_environment({"LLAVA_HVP": text}).pruning.method == method


@pytest.mark.parametrize("name", ["cdpruner", "hiprune++", "hiprune+++fastv"])
def test_a_clip_is_named_as_an_option(name):
    first, _, second = name.rpartition("+") if "fastv" in name else (name, "", "")
    given = shlex.quote("clip_text=/tmp/a folder+ViT")
    flags = f"--prune-method {first} --prune-opt {given}" + " --prune-inside fastv" * bool(second)
    request = from_environment({"LLAVA_HVP": flags})
    assert request.pruning == PruningConfig.of(name, clip_text="/tmp/a folder+ViT")
    assert request.pruning.arguments["clip_text"] == "/tmp/a folder+ViT"
    assert request.pruning.options["clip_text"] == "/tmp/a folder+ViT"
    assert from_environment({"LLAVA_HVP": shlex.join(to_flags(request))}) == request
    text = model_args("x", request.pruning)
    assert "clip_text=/tmp/a folder+ViT" in text.split(",")
    options = dict(pair.split("=") for pair in text.split(",")[1:])
    numbers = {key: float(value) for key, value in options.items() if key.endswith("r_max")}
    assert pruning_of(options.pop("prune_method"), options | numbers) == request.pruning
    assert "clip_text" not in PruningConfig.of(name).arguments


@pytest.mark.parametrize("spec", ["hivtp", "hiprune++ text=llm", "fastv", "cdpruner clip_text="])
def test_a_clip_that_nothing_would_read_by_is_refused(spec):
    name, *options = spec.split()
    options = {"clip_text": "x"} | dict(option.split("=") for option in options)
    with pytest.raises(OptionError, match=r"clip_text='x?'.*leave it out"):
        PruningConfig.of(name, **options)


def test_of_a_list_the_methods_that_read_by_clip_take_it():
    options = ["clip_text=x", "text=llm"]
    found = variants(["hivtp", "cdpruner", "hiprune++"], [{}], options)
    assert [v.pruning and v.pruning.clip_text for v in found] == [None, None, "x", None]
    with pytest.raises(OptionError, match="clip_text: none of hivtp, hiprune"):
        variants(["hivtp", "hiprune"], [{}], options[:1])


def test_budgets_by_turns_come_as_one_list():
    request = parsed(f"{TURNS} 1,0.11,0.25 --prune-train --prune-opt window=2")[0]
    assert request.train_r_max == (1, 0.11, 0.25)
    assert request.pruning.method == HIVTP(r_max=0.11, window=2)
    assert from_environment({"LLAVA_HVP": shlex.join(to_flags(request))}) == request


@pytest.mark.parametrize(
    "flags", ["", "--r-max 0.5", "--num-tokens 64", "--prune-opt window=2", "--prune-train"]
)
def test_none_takes_the_flags_of_a_loop_over_methods(flags):
    request = parsed(f"--prune-method none {flags}")[0]
    assert (request.pruning, request.unpruned, request.asked) == (None, True, True)
    assert from_environment({"LLAVA_HVP": shlex.join(to_flags(request))}) == request
    assert not Request().asked


@pytest.mark.parametrize(
    ("flags", "runtime"),
    [
        ("--r-max 0.5 --prune-opt tiling=672", Runtime(tiling="672")),
        ("--prune-opt patch_merge=spatial --prune-opt window=2", Runtime(patch_merge="spatial")),
        ("--prune-opt tiling=672 --prune-opt tower_dtype=model", Runtime(tiling="672")),
        ("--prune-opt newline=none", Runtime(newline="none")),
    ],
)
def test_none_takes_the_tiling_and_the_packing_of_a_loop_over_methods(flags, runtime):
    request = parsed(f"--prune-method none {flags}")[0]
    assert (request.pruning.runtime, request.pruning.prunes) == (runtime, False)
    assert (request.unpruned, request.asked) == (False, True)
    assert from_environment({"LLAVA_HVP": shlex.join(to_flags(request))}) == request
    assert PruningConfig.of("none", **request.pruning.options) == request.pruning


def test_none_is_no_method_from_python():
    assert "none" not in list_methods()
    with pytest.raises(OptionError, match=r"none is unpruned LLaVA.*compat\.bridge\(\).*hivtp"):
        get_method("none")


@pytest.mark.parametrize(
    ("flags", "variable", "method"),
    [
        ("--prune-method none", "--prune-method hivtp", None),
        ("", "--prune-method none", None),
        ("", "--prune-method hivtp", HIVTP()),
        ("--prune-method hiprune", "--prune-method none", HiPrune()),
    ],
)
def test_in_eval_none_is_as_no_method_and_flags_come_first(monkeypatch, flags, variable, method):
    monkeypatch.setenv("LLAVA_HVP", variable)
    ours = argparse.ArgumentParser()
    add_flags(ours, device=True)
    found = ours.parse_args([*shlex.split(flags), "--device", "cpu"])
    pruning = None if method is None else PruningConfig(method)
    assert requested(found) == Request(pruning, device="cpu")


def test_in_eval_the_options_of_the_run_stay_with_the_method(monkeypatch):
    monkeypatch.setenv("LLAVA_HVP", "--prune-method hivtp --prune-opt patch_merge=spatial")
    ours = argparse.ArgumentParser()
    add_flags(ours, device=True)
    request = requested(ours.parse_args(["--device", "cpu"]))
    assert request.pruning == PruningConfig(HIVTP(), Runtime(patch_merge="spatial"))


def test_an_empty_environment_asks_for_nothing():
    assert from_environment({"LLAVA_HVP": " ", "LLAVA_HVP_DEVICE": ""}) == Request()


def test_the_device_has_a_variable_of_its_own():
    assert from_environment({"LLAVA_HVP_DEVICE": "cpu"}) == Request(device="cpu")
    with pytest.raises(OptionError, match=r"LLAVA_HVP_DEVICE='tpu'.*cpu"):
        from_environment({"LLAVA_HVP_DEVICE": "tpu"})


@pytest.mark.parametrize("text", ["--prune-method hivtp --rmax 1", "--prune-method 'x", "hivtp"])
def test_errors_in_the_variable_name_it(text):
    with pytest.raises(OptionError, match="LLAVA_HVP="):
        from_environment({"LLAVA_HVP": text})


def test_a_method_is_described_by_what_was_given():
    assert str(PruningConfig(HIVTP(r_max=0.25, regions=3))) == "hivtp r_max=0.25 regions=3"
    spatial = PruningConfig(HIVTP(r_max=0.25, regions=3), Runtime(patch_merge="spatial"))
    assert str(spatial) == "hivtp r_max=0.25 patch_merge=spatial regions=3"
