"""`tuned.json` on every command and in Python, on the tower that it was found on and no other."""

import dataclasses
import importlib
import shlex

import pytest
import torch
from evaluation import call

from llava_hvp import HIVTP, FastV, Runtime, config, load_method, prune
from llava_hvp.cli import main
from llava_hvp.encoder.digest import tower_digest
from llava_hvp.errors import OptionError, UnsupportedModelError
from llava_hvp.evaluation.model_args import model_args, pruning_of
from llava_hvp.runtime import PruningConfig
from llava_hvp.tuned import write_tuned

ELSEWHERE = "0123456789abcdef:fedcba9876543210"
FOUND = PruningConfig.of("hivtp", r_max=0.25, layers=(2, 3), regions=1)


@pytest.fixture
def tuned(loaded, tmp_path):
    """A file tuned for the tower of `llava-1.5-llama`."""
    path = tmp_path / "tuned.json"
    tower = loaded("llava-1.5-llama").model.get_vision_tower().vision_tower
    write_tuned(path, FOUND, tower_digest(tower), {"verdict": "for people"})
    return path


@pytest.fixture
def foreign(tmp_path):
    path = tmp_path / "foreign.json"
    write_tuned(path, FOUND, ELSEWHERE, {})
    return path


def test_python_prunes_by_it(tuned, loaded, photos):
    bundle = loaded("llava-1.5-llama")
    given = bundle.ids("What is this?"), bundle.pixels(photos[0]), [photos[0].size]
    with prune(bundle.model, load_method(tuned)) as pruned:
        bundle.embeds(*given)
        found = pruned.last[0].selection.keep
        assert pruned.method == FOUND.method
        assert pruned.config == load_method(tuned)
    with prune(bundle.model, HIVTP(r_max=0.25, layers=(2, 3), regions=1)) as pruned:
        bundle.embeds(*given)
        assert torch.equal(found, pruned.last[0].selection.keep)


def test_another_tower_is_refused_and_the_model_stays_as_it_was(foreign, loaded, hf):
    for model in (loaded("llava-1.5-llama").model, hf("llava-1.5-llama").model):
        with pytest.raises(UnsupportedModelError, match=f"another vision tower .{ELSEWHERE}"):
            prune(model, load_method(foreign))
        assert "llava_hvp" not in vars(model)


def test_a_block_takes_it_on_its_own_tower_only(tuned, foreign, loaded):
    with prune(loaded("llava-1.5-llama").model, "none") as pruned:
        with pruned.using(load_method(tuned)):
            assert pruned.config == load_method(tuned)
        with pytest.raises(UnsupportedModelError, match="another vision tower"):
            pruned.using(load_method(foreign)).__enter__()
        other = PruningConfig.of("hivtp", newline="all")
        with pytest.raises(OptionError, match="a running of its own"):
            pruned.using(other).__enter__()


def test_a_tower_is_the_same_in_every_dtype_and_form(loaded, hf, own, checkpoints):
    digest = tower_digest(loaded("llava-1.5-llama").model.get_vision_tower().vision_tower)
    assert digest == tower_digest(hf("llava-1.5-llama").model.model.vision_tower)
    for dtype in (torch.float16, torch.bfloat16):
        tower = own("llava-1.5-llama").model.get_vision_tower().vision_tower.to(dtype)
        assert tower_digest(tower) == digest
    with torch.no_grad():
        weight = next(p for p in tower.parameters() if p.ndim == 2)
        weight += 1e-2  # as an optimiser's steps
    assert tower_digest(tower) != digest


def test_a_quantised_tower_is_known_by_the_rest():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    whole = tower_digest(model).split(":")
    model[0].weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    assert tower_digest(model).split(":") == ["-", whole[1]]


def test_runtime_and_a_method_inside_come_along(tmp_path):
    both = PruningConfig.of("hivtp+fastv", r_max=0.5, inside_r_max=0.5, newline="all")
    write_tuned(tmp_path / "t.json", both, ELSEWHERE, {})
    found = load_method(tmp_path / "t.json")
    assert found == dataclasses.replace(both, tower=ELSEWHERE)
    for beside in ({"runtime": Runtime()}, {"inside": FastV()}):
        with pytest.raises(OptionError, match="give neither runtime nor inside"):
            PruningConfig.checked(found, **beside)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be read"),
        ("{}", "no method and no options"),
        ('{"method": "hivtp", "options": {"layer": 3}, "tower": "a:b"}', "unknown option 'layer'"),
        ('{"method": "hivtp", "options": {}, "tower": 3}', "no hash"),
    ],
)
def test_a_file_that_is_none_is_refused(content, told, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(OptionError, match=told):
        load_method(tmp_path / "t.json")


# --- on every command ---


def requested(*words):
    return config.parse(list(words), device=True)[0]


def test_flags_carry_it_to_other_processes(tuned):
    request = requested("--prune-from", str(tuned))
    assert request.pruning == load_method(tuned)
    assert request.pruning.tower is not None
    flags = config.to_flags(request)
    tuned.unlink()  # they need the file no more
    assert requested(*flags) == request
    environment = {config.VARIABLE: shlex.join(flags)}
    assert config.from_environment(environment) == request


@pytest.mark.parametrize(
    "beside",
    ["--prune-method hiprune", "--r-max 0.5", "--prune-opt regions=2", "--prune-tower a:b"],
)
def test_other_flags_beside_it_are_refused(tuned, beside):
    with pytest.raises(OptionError, match=r"write it out: --prune-method hivtp --r-max 0\.25"):
        requested("--prune-from", str(tuned), *beside.split())
    with pytest.raises(OptionError, match="without --prune-method"):
        requested("--prune-tower", "a:b")


def parsed(name, words):
    """Settings of a command."""
    import argparse

    command = importlib.import_module(f"llava_hvp.cli.{name}")
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    given = argparse.Namespace(rest=["true"], unknown=[])
    return command.parse(parser.parse_args(words, given))


def test_every_command_that_compares_takes_it(tuned, checkpoints, tmp_path):
    model, wanted = str(checkpoints("llava-1.5-llama")), load_method(tuned)
    source = ["--prune-from", str(tuned), "--device", "cpu"]
    for name in ("bench", "accuracy"):
        settings = parsed(name, [name, "--model-path", model, *source])
        assert [v.pruning for v in settings.variants] == [None, wanted], name
        beside = parsed(name, [name, "--model-path", model, *source, "--methods", "hiprune"])
        assert beside.variants[-1].pruning == wanted
        assert {v.name for v in beside.variants} == {"none", "hiprune", "hivtp"}
    picture = ["--image-file", "x.png", "-o", str(tmp_path / "x.png")]
    shown = parsed("show", ["show", "--model-path", model, *source, *picture])
    assert [v.pruning for v in shown.variants] == [wanted]
    job = parsed("evaluate", ["eval", "pope", "--model-path", model, *source])
    assert job.request.pruning == wanted
    run = parsed("run", ["run", *source])
    assert run.request.pruning == wanted


def test_lmms_eval_takes_it(tuned):
    found = pruning_of(None, {"prune_from": str(tuned)})
    assert found == load_method(tuned)
    pairs = dict(pair.split("=", 1) for pair in model_args("x", found).split(",")[1:])
    assert pruning_of(pairs.pop("prune_method"), {**pairs, "r_max": 0.25}) == found
    with pytest.raises(OptionError, match="prune_from and r_max"):
        pruning_of(None, {"prune_from": str(tuned), "r_max": 0.5})


def test_a_tiling_that_differs_is_refused(tmp_path, capsys):
    write_tuned(tmp_path / "t.json", PruningConfig.of("hivtp", tiling="672"), ELSEWHERE, {})
    command = ["bench", "--geometry", "llava-next-tiny", "--prune-from", str(tmp_path / "t.json")]
    assert main([*command, "--methods", "hiprune"]) == 2
    assert "--prune-opt tiling=672" in capsys.readouterr().err


@pytest.mark.parametrize("own", [True, False])
def test_a_stock_command_is_pruned_by_it_or_ends(
    own, tuned, foreign, checkpoints, photos, tmp_path
):
    photos[0].save(tmp_path / "a.png")
    path = tuned if own else foreign
    result = call(
        f"python -m llava.eval.run_llava --model-path {checkpoints('llava-1.5-llama')} "
        f"--image-file a.png --query What? --max_new_tokens 2 --device cpu --prune-from {path}",
        tmp_path,
    )
    if own:
        assert result.returncode == 0, result.stderr
        assert "hivtp r_max=0.25 layers=(2, 3) regions=1" in result.stderr
        assert "kept 25.0%" in result.stderr
    else:
        assert result.returncode == 1
        assert "another vision tower" in result.stderr
