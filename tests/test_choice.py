"""What choices cost and what half precision leaves of them, on a trained LLaVA."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from llava_hvp import Runtime, prune
from llava_hvp.accuracy import choice
from llava_hvp.accuracy.choice import PICTURES, Opened, is_looked_at, look, spread
from llava_hvp.accuracy.exam import TEMPLATE, Marks, sheets
from llava_hvp.accuracy.scores import scores_of
from llava_hvp.accuracy.store import Answers, Chosen
from llava_hvp.accuracy.tables import render
from llava_hvp.checkpoints.dtypes import dtype_of
from llava_hvp.checkpoints.llava import LlavaCheckpoint
from llava_hvp.checkpoints.opening import open_checkpoint
from llava_hvp.checkpoints.variants import variants
from llava_hvp.cli import main
from llava_hvp.shapes import checkpoint, list_checkpoints
from llava_hvp.shapes.drawing import draw
from llava_hvp.shapes.exams import exam, exam_for
from llava_hvp.tables import MARKDOWN

BUDGET = {"r_max": 0.25}
ASKED = 4
NAMES = ("uniform", "vispruner", "hiprune++", "mmtok")


@pytest.fixture(scope="module", params=list_checkpoints())
def trained(request, tmp_path_factory):
    """(what is asked, how to open it in a dtype) of a shipped checkpoint."""
    folder = checkpoint(tmp_path_factory.mktemp("choice"), request.param)

    def opened(dtype):  # anew: a test may spoil it
        return open_checkpoint(str(folder), "cpu", dtype=dtype, conv_mode=TEMPLATE)

    return list(exam(exam_for(request.param), ASKED)), opened


def looked_at(trained, names=NAMES, opened_of=Opened.of):
    """Answers with what methods chose on every sheet, and the sheets."""
    asked, opened = trained
    exact = opened(torch.float32)
    found, answers = list(sheets(exact, asked, 4)), Answers()
    look(lambda sheet: opened_of(exact, sheet, opened), found, variants(names, [BUDGET]), answers)
    return answers, found


def by_another_hand(trained, method, dtype):
    """What `prune` keeps of each question's picture alone, as a chat would ask."""
    asked, opened = trained
    model, kept = opened(dtype), []
    stock = Runtime(tower_attention="stock")
    with prune(model.model, method, runtime=stock, tokenizer=model.tokenizer) as pruned:
        for scene, question in asked:
            picture = draw(scene)
            with torch.inference_mode():
                model.model.prepare_inputs_labels_for_multimodal(
                    model.prompt(question.text)[None],
                    *(None,) * 4,
                    model.images([picture]),
                    image_sizes=[picture.size],
                )
            kept.append(pruned.last[0].selection.keep)
    return kept


def test_what_is_in_common_is_what_pruning_in_both_keeps(trained):
    answers, _ = looked_at(trained)
    shares = {}
    for variant in variants(NAMES, [BUDGET])[1:]:
        exact = by_another_hand(trained, variant.pruning.method, torch.float32)
        chosen = answers.all_chosen(str(variant))
        kept = sum(c.kept for c in chosen)
        assert kept == sum(int(keep.sum()) for keep in exact)
        for name in ("float16", "bfloat16"):
            half = by_another_hand(trained, variant.pruning.method, dtype_of(name))
            common = sum(int((a & b).sum()) for a, b in zip(exact, half, strict=True))
            found = sum(c.common[name] for c in chosen)
            # Rounding in a batch moves patches where a rule is not stable.
            assert abs(found - common) <= (0.25 if variant.name == "vispruner" else 0.02) * kept
            shares[variant.name, name] = found / kept
    for name in ("float16", "bfloat16"):
        assert shares["uniform", name] == 1
        assert shares["vispruner", name] < 0.9 < shares["hiprune++", name]
    assert 0.8 < shares["mmtok", "bfloat16"] < 1


def test_the_tower_runs_its_own_attention_and_is_rounded(trained, monkeypatch):
    seen, stock = set(), LlavaCheckpoint.prepare

    def prepare(self, ids, pictures, sizes):
        pruning, tower = vars(self.model).get("llava_hvp"), self.model.get_vision_tower()
        images = pictures if torch.is_tensor(pictures) else pictures[0]
        attention = pruning and pruning.runtime.tower_attention
        seen.add((attention, images.dtype, tower.dtype))
        return stock(self, ids, pictures, sizes)

    monkeypatch.setattr(LlavaCheckpoint, "prepare", prepare)
    monkeypatch.setattr(choice, "time_encode", lambda *call: (None, 1.0))
    looked_at(trained, ["hivtp"])
    assert seen == {
        ("stock", torch.float32, torch.float32),
        ("stock", torch.float16, torch.float16),
        ("stock", torch.bfloat16, torch.bfloat16),
        (None, torch.float16, torch.float16),  # whether the device can
        (None, torch.bfloat16, torch.bfloat16),
    }


def test_a_method_is_timed_right_after_its_floor(trained, monkeypatch):
    turns, stock = [], choice.time_encode

    def time_encode(opened, work, pruning, clock):
        prepared, seconds = stock(opened, work, pruning, clock)
        assert seconds > 0
        assert "run_to_layer" not in vars(opened.model.get_vision_tower())  # nothing is remembered
        turns.append((pruning.method.name, pruning.last[0].selection.keep))
        return prepared, {"floor": 2.0}.get(pruning.method.name, 3.0)

    monkeypatch.setattr(choice, "time_encode", time_encode)
    answers, found = looked_at(trained, ["hivtp", "hiprune++"])
    assert [name for name, _ in turns] == ["floor", "hivtp", "floor", "hiprune++"] * len(found)
    for (_, floor), (_, method) in zip(turns[::2], turns[1::2], strict=True):
        assert torch.equal(floor, method)
    assert {(c.floor, c.encode) for c in answers.all_chosen("hivtp r_max=0.25")} == {(2.0, 3.0)}


def marks_of(variant):
    mark = Marks(variant, {"place": 1}, {"place": 2}, 72, 0.5, 1.0, [False, True])
    return replace(mark, kept=0) if not variant.prunes else mark


def test_a_score_is_of_all_sheets():
    answers, chosen = Answers(), variants(["hivtp"], [BUDGET])
    for number, floor in enumerate((1.0, 2.0, 4.0)):
        common = {"float16": 10, "bfloat16": 5 * number}
        answers.add_chosen(number, "hivtp r_max=0.25", Chosen(10, common, floor, 5.0))
    none, hivtp = scores_of([marks_of(variant) for variant in chosen], answers)
    assert hivtp.choice == 1.5
    assert hivtp.stability == {"float16": 1.0, "bfloat16": 0.5}
    assert hivtp.budget == "r_max=0.25"
    assert (hivtp.each, hivtp.questions) == ("1", 2)
    assert (none.choice, none.stability, none.budget) == (None, {}, "")


ABOUT = {
    "command": "llava-hvp accuracy",
    "machine": "a CPU",
    "versions": "torch 2",
    "model": "llava-shapes",
    "template": TEMPLATE,
    "looked_at": "6",
}


def test_a_dtype_that_the_device_does_not_compute_is_left_out(trained, monkeypatch, capsys):
    stock = LlavaCheckpoint.prepare

    def prepare(self, *inputs):
        if next(self.model.parameters()).dtype == torch.float16:
            raise RuntimeError(why)
        return stock(self, *inputs)

    why = "\"addmm_impl_cpu_\" not implemented for 'Half'"
    monkeypatch.setattr(LlavaCheckpoint, "prepare", prepare)
    answers, _ = looked_at(trained, ["hivtp"])
    assert "no stability in float16, which cpu does not compute" in capsys.readouterr().err
    scores = scores_of([marks_of(v) for v in variants(["hivtp"], [BUDGET])], answers)
    assert scores[1].stability["float16"] is None
    assert scores[1].stability["bfloat16"] > 0.5
    table = render(ABOUT, scores, MARKDOWN)
    assert "own attention; none where that cannot be computed." in table
    assert table.splitlines()[-1].split("|")[-3].strip() == ""
    why = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        looked_at(trained, ["hivtp"])


def test_a_tower_that_overflows_in_half_has_no_stability(trained, capsys):
    def opened_of(exact, sheet, reopened):
        opened = Opened.of(exact, sheet, reopened)
        vit = opened.halves["float16"].model.get_vision_tower().vision_tower
        for name, parameter in vit.named_parameters():
            if name.endswith("fc2.bias"):
                parameter.data.fill_(65504.0)  # the largest; of two layers it is too large
        return opened

    answers, _ = looked_at(trained, ["hivtp"], opened_of)
    assert "hivtp r_max=0.25 chooses nothing in float16: " in capsys.readouterr().err
    scores = scores_of([marks_of(v) for v in variants(["hivtp"], [BUDGET])], answers)
    assert scores[1].stability["float16"] is None


def test_what_is_chosen_inside_the_language_model_is_not_looked_at(trained):
    names = ["hivtp", "fastv", "hivtp+fastv"]
    chosen = variants(names, [BUDGET])
    assert [is_looked_at(variant) for variant in chosen] == [False, True, False, False]
    answers, found = looked_at(trained, names)
    assert [len(answers.all_chosen(str(variant))) for variant in chosen] == [0, len(found), 0, 0]
    scores = scores_of([marks_of(variant) for variant in chosen], answers)
    table = render(ABOUT, scores, MARKDOWN)
    assert "own attention; none of what is chosen inside the language model." in table
    fastv = next(line for line in table.splitlines() if line.startswith("| fastv"))
    assert [cell.strip() for cell in fastv.split("|")[-4:-1]] == ["", "", ""]


@pytest.mark.parametrize("count", [1, 63, 64, 65, 700, 2000])
def test_pictures_are_spread_evenly(count):
    found = spread(range(count))
    assert len(found) == len(set(found)) == min(PICTURES, count)
    steps = {b - a for a, b in itertools.pairwise(found)}
    assert not steps or max(steps) - min(steps) <= 1


ASK = "accuracy --questions 6 --batch 2 --methods uniform,vispruner --r-max 0.5 --device cpu --out"


def test_choices_that_were_interrupted_go_on(tmp_path, monkeypatch, capsys):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert main([*ASK.split(), whole]) == 0
    stock, chosen = Answers.add_chosen, []

    def add(self, sheet, variant, what):
        stock(self, sheet, variant, what)
        chosen.append((sheet, variant))
        if len(chosen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "add_chosen", add)
    assert main([*ASK.split(), parts]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    answered = []
    monkeypatch.setattr(Answers, "add", lambda *what: answered.append(what))
    assert main([*ASK.split(), parts]) == 0
    assert not answered
    assert len(chosen) == len(set(chosen)) >= 6
    rows = [
        [(r["method"], r["stability"], r["each"]) for r in read(folder)]
        for folder in (whole, parts)
    ]
    assert rows[0] == rows[1]
    assert rows[0][1][1] == {"float16": 1.0, "bfloat16": 1.0}


def read(folder):
    with open(f"{folder}/llava-shapes.json") as file:
        return json.load(file)["rows"]
