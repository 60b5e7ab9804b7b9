"""A method inside the language model, alone or behind one at the tower, however it is asked for."""

import dataclasses
import shlex
from typing import ClassVar

import pytest

from llava_hvp import HIVTP, HiPrunePlus, get_method
from llava_hvp.checkpoints.variants import Variant, variants
from llava_hvp.config import Request, from_environment, parse, to_flags
from llava_hvp.errors import OptionError, UnsupportedModelError
from llava_hvp.evaluation.model_args import OTHERS, SECOND, model_args, pruning_of
from llava_hvp.methods.language import LanguageMethod, Stage
from llava_hvp.methods.unpruned import Unpruned
from llava_hvp.runtime import PruningConfig, Runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halver(LanguageMethod):
    """Keeps half after some layers.

    Parameters
    ----------
    layer : int
        that the first drop comes before
    layers : tuple[int, ...] | None
        of further drops
    """

    name: ClassVar[str] = "halver"
    summary: ClassVar[str] = "half after some layers"
    listed: ClassVar[bool] = False

    layer: int = 1
    layers: tuple[int, ...] | None = None

    def stages(self, depth):
        return tuple(Stage(layer) for layer in (self.layer, *(self.layers or ())))

    def keeps(self, visual, depth, images=1):
        return tuple(visual // 2 ** (n + 1) for n in range(len(self.stages(depth))))


@pytest.fixture(autouse=True)
def _is_known(monkeypatch):
    """By its name, for these tests only."""
    monkeypatch.setattr(Halver, "listed", True)


def parsed(line):
    request, rest = parse(shlex.split(line), device=True)
    assert not rest
    return request


PAIR = PruningConfig(HIVTP(r_max=0.5), Runtime(), Halver(r_max=0.4, layer=2))
ALONE = PruningConfig(Unpruned(), Runtime(newline="all"), Halver(num_tokens=30, layers=(3, 4)))
CONFIGS = {
    "halver": PruningConfig.checked(Halver()),
    "halver num_tokens=30 newline=all layers=(3, 4)": ALONE,
    "hivtp+halver r_max=0.5 inside_r_max=0.4 inside_layer=2": PAIR,
    "hiprune+++halver num_tokens=64 inside_num_tokens=9": PruningConfig(
        HiPrunePlus(num_tokens=64), inside=Halver(num_tokens=9)
    ),
    "hivtp+halver patch_merge=spatial regions=3 inside_layers=(2,)": PruningConfig(
        HIVTP(regions=3), Runtime(patch_merge="spatial"), Halver(layers=(2,))
    ),
}


def test_a_configuration_has_one_name_and_says_what_was_given():
    said = [str(config) for config in CONFIGS.values()]
    # r_max=0.5 stands where no budget was given.
    wanted = [
        "halver r_max=0.5",
        "halver num_tokens=30 newline=all layers=(3, 4)",
        "hivtp+halver r_max=0.5 inside_r_max=0.4 inside_layer=2",
        "hiprune+++halver num_tokens=64 inside_num_tokens=9",
        "hivtp+halver r_max=0.5 patch_merge=spatial regions=3 inside_r_max=0.5 inside_layers=(2,)",
    ]
    assert said == wanted
    assert [config.name for config in CONFIGS.values()] == [text.split()[0] for text in wanted]
    assert [Variant(config).name for config in CONFIGS.values()] == [t.split()[0] for t in wanted]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_flags_variable_results_and_model_args_carry_it_unchanged(config):
    flags = to_flags(Request(config))
    assert parsed(shlex.join(flags)).pruning == config
    assert from_environment({"LLAVA_HVP": shlex.join(flags)}).pruning == config
    assert PruningConfig.of(config.name, **config.options) == config
    assert PruningConfig.of(config.name, **config.given) == config
    pairs = dict(pair.split("=", 1) for pair in model_args("x", config).split(","))
    options = {key: text for key, text in pairs.items() if key not in (*OTHERS, "prune_method")}
    for key in options:
        if key.endswith(("r_max", "num_tokens")):  # lmms-eval reads numbers itself
            options[key] = float(options[key]) if "." in options[key] else int(options[key])
    assert pruning_of(pairs["prune_method"], options) == config


def test_what_is_typed_says_which_method_is_where():
    line = "--prune-method hivtp --r-max 0.5 --prune-inside halver --inside-r-max 0.4 "
    assert parsed(line + "--inside-opt layer=2").pruning == PAIR
    alone = parsed("--prune-method halver --num-tokens 30 --prune-opt layers=3,4").pruning
    assert alone == dataclasses.replace(ALONE, runtime=Runtime())
    assert model_args("x", PAIR) == (
        f"pretrained=x,prune_method=hivtp,prune_inside={__name__}:Halver,r_max=0.5,inside_r_max=0.4,"
        "inside_layer=2"
    )
    assert SECOND == "prune_inside"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--prune-inside halver", "'halver' without --prune-method: give it as --prune-method"),
        ("--inside-r-max 0.5", "--inside-r-max without --prune-method"),
        ("--inside-num-tokens 5", "--inside-num-tokens without --prune-method"),
        ("--inside-opt layer=2", "--inside-opt without --prune-method"),
        ("--prune-method hivtp --inside-r-max 0.5",
         "--inside-r-max without --prune-inside: an only method takes --r-max"),
        ("--prune-method halver --inside-opt layer=2", "an only method takes --prune-opt"),
        ("--prune-method none --inside-r-max 0.5", "--inside-r-max without --prune-inside"),
        ("--prune-method none --prune-inside halver", "beside prune-method 'none': .* alone"),
        ("--prune-method hivtp --prune-inside none", "beside prune-method 'hivtp'"),
        ("--prune-method halver --prune-inside halver", "inside the language model already"),
        ("--prune-method hivtp --prune-inside hiprune",
         "'hiprune': that prunes at the vision tower: inside the language model prune .*halver"),
        ("--prune-method hivtp --prune-inside halvr", "unknown method 'halvr'"),
        ("--prune-method hivtp+halver",
         "give --prune-method hivtp --prune-inside .*Halver, each with a budget of its own"),
        ("--prune-method hivtp+halver --prune-inside halver", "inside the language model already"),
        ("--prune-method hivtp --prune-inside halver --inside-r-max 0", r"r_max=0.0.*\(0, 1\]"),
        ("--prune-method hivtp --prune-inside halver --inside-r-max x", "'x' is no number"),
        ("--prune-method hivtp --prune-inside halver --inside-r-max .5 --inside-num-tokens 3",
         "exclude each other"),
        ("--prune-method hivtp --prune-inside halver --inside-r-max 0.5 --inside-opt r_max=0.5",
         "inside_r_max is given twice"),
        ("--prune-method hivtp --prune-inside halver --inside-opt window=2",
         "unknown option 'inside_window': .*inside_layer"),
        ("--prune-method hivtp --prune-inside halver --prune-opt layer=2",
         "unknown option 'layer'"),
        ("--prune-method halver --prune-opt tower_dtype=model", "the tower stays stock's"),
        ("--prune-method halver --prune-train", "--prune-train: halver prunes inside"),
        ("--prune-method hivtp --prune-inside halver --prune-train", "training does not go with"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_the_remedy(line, message):
    with pytest.raises(OptionError, match=message):
        parsed(line)
    with pytest.raises(OptionError, match=message):
        from_environment({"LLAVA_HVP": line})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("halver+hivtp", {}, "halver prunes inside the language model: give it second"),
        ("halver+halver", {}, "both prune inside"),
        ("hivtp+random", {}, "random prunes at the vision tower.*halver"),
        ("hivtp+halver+halver", {}, "unknown method"),
        ("hivtp+halver", {"layer": 2}, "unknown option 'layer'.*inside_layer"),
        ("halver", {"inside_layer": 2}, "unknown option 'inside_layer'.*layer"),
    ],
)
def test_names_that_do_not_go_together_are_refused(name, options, message):
    with pytest.raises(OptionError, match=message):
        PruningConfig.of(name, **options)


def test_lmms_evals_arguments_are_refused_alike():
    with pytest.raises(OptionError, match="options of a method go with prune_method"):
        pruning_of(None, {"prune_inside": "halver"})
    with pytest.raises(OptionError, match="beside prune-method 'none'"):
        pruning_of("none", {"prune_inside": "halver"})
    with pytest.raises(OptionError, match="unknown option 'inside_r_max'"):
        pruning_of("hivtp", {"inside_r_max": 0.5})


def test_two_that_are_joined_share_a_budget():
    one, half = variants(["hivtp+halver"], [{"r_max": 0.25}, {"r_max": 0.64}])[1:]
    assert one.pruning == PruningConfig(HIVTP(r_max=0.5), inside=Halver(r_max=0.5))
    assert (half.pruning.method.r_max, half.pruning.inside.r_max) == (0.8, 0.8)
    (tokens,) = variants(["hivtp+halver"], [{"num_tokens": 30}])[1:]
    assert tokens.pruning == PruningConfig(HIVTP(num_tokens=60), inside=Halver(num_tokens=30))
    (shifted,) = variants(["hivtp+halver"], [{"r_max": 0.2}], ["inside_r_max=0.8"])[1:]
    assert shifted.pruning == PruningConfig(HIVTP(r_max=0.25), inside=Halver(r_max=0.8))
    options = ["layers=7,8", "inside_layer=3", "layer=2"]
    found = variants(["hivtp", "halver", "hivtp+halver"], [{"r_max": 0.25}], options)[1:]
    assert [v.pruning for v in found] == [
        PruningConfig(HIVTP(r_max=0.25, layers=(7, 8))),
        PruningConfig.checked(Halver(r_max=0.25, layer=2, layers=(7, 8))),
        PruningConfig(HIVTP(r_max=0.5, layers=(7, 8)), inside=Halver(r_max=0.5, layer=3)),
    ]


@pytest.mark.parametrize("budget", [{"r_max": 0.25}, {"r_max": 0.11}, {"num_tokens": 30}])
def test_methods_alone_and_joined_have_one_budget(budget):
    ((name, value),) = budget.items()
    found = variants(["hivtp", "halver", "hivtp+halver"], [budget])[1:]
    assert {variant.pruning.budget for variant in found} == {f"{name}={value}"}
    assert PruningConfig(HIVTP(r_max=0.5), inside=Halver(num_tokens=9)).budget == "num_tokens=9"
    assert PruningConfig(HIVTP(num_tokens=9), inside=Halver(r_max=0.5)).budget == ""
    assert PruningConfig(HIVTP(k=25, window=2)).budget == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["inside_r_max=0.2"], "inside_r_max=0.2: of r_max=0.25 in all"),
        (["inside_num_tokens=3"], "exclude each other"),
        (["inside_layre=3"], "none of hivtp.halver has it"),
        (["r_max=0.3"], "r_max: the budget is given twice"),
    ],
)
def test_a_budget_that_cannot_be_shared_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        variants(["hivtp+halver"], [{"r_max": 0.25}], options)


def test_from_python_both_are_given_or_one():
    both = PruningConfig.checked(HIVTP(r_max=0.5), None, Halver(r_max=0.4, layer=2))
    assert both == PAIR
    assert both.methods == (PAIR.method, PAIR.inside)
    assert PruningConfig.checked(Halver()).methods == (Halver(),)
    assert get_method("halver", layer=3) == Halver(layer=3)
    with pytest.raises(UnsupportedModelError, match="does not prune inside"):
        PruningConfig.checked(HIVTP(), None, HIVTP())
    with pytest.raises(OptionError, match="both prune inside"):
        PruningConfig.checked(Halver(), None, Halver())
