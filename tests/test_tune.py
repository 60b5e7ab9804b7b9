"""`llava-hvp tune`: divergence, halves, search, agreement, and going on after an interruption."""

import argparse
import json

import hf_models
import pytest
import torch
from hf_models import needs_release
from PIL import Image

from llava_hvp import load_method, prune
from llava_hvp.accuracy.exam import TEMPLATE
from llava_hvp.checkpoints.opening import open_checkpoint
from llava_hvp.checkpoints.variants import Variant
from llava_hvp.cli import main, tune
from llava_hvp.errors import LlavaHvpError, OptionError
from llava_hvp.methods import list_methods, method_class
from llava_hvp.methods.worth import LayerSet, OneLayer, Values, spread_layers
from llava_hvp.runtime import PruningConfig
from llava_hvp.shapes import checkpoint
from llava_hvp.tune.agreement import _last_kept
from llava_hvp.tune.candidates import Model, Space
from llava_hvp.tune.divergence import Answered, _until_end
from llava_hvp.tune.questions import EACH, GENERAL, Asked, Halves, drawn, in_folder, sheets_of
from llava_hvp.tune.search import model_of
from llava_hvp.tune.store import Measured
from llava_hvp.tune.verdict import Interval, Sample, Verdict

TOKENS = 4
KEEP_ALL = PruningConfig.of("hivtp", r_max=1)


def asked_about(photos, texts=("What is this?", "Where is the cat?")):
    return [
        Asked(f"{n}.png", text, lambda photo=photo: photo)
        for n, photo in enumerate(photos)
        for text in texts
    ]


HF = [pytest.param(f"{name}-hf", marks=needs_release) for name in hf_models.KINDS[:2]]


@pytest.fixture(scope="module", params=["llava-1.5-llama", "llava-next-llama", *HF])
def opened(request, checkpoints):
    """Of LLaVA's own form, and of transformers'."""
    path = source = checkpoints(request.param.removesuffix("-hf"))
    if request.param.endswith("-hf"):
        path = hf_models.convert(source, source.with_name(request.param))
    return open_checkpoint(str(path), "cpu", conv_mode="vicuna_v1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = checkpoint(tmp_path_factory.mktemp("tune"))
    return open_checkpoint(str(folder), "cpu", conv_mode=TEMPLATE)


def answered(opened, photos, batch=4):
    sheets = sheets_of(opened, asked_about(photos[:2]), batch)
    return [Answered(opened, sheet, Variant(), TOKENS) for sheet in sheets]


@pytest.mark.parametrize("inside", [False, True])
def test_what_keeps_all_diverges_by_nothing_at_all(opened, photos, inside):
    if inside and opened.host != "llava":
        pytest.skip("inside the language model only Python prunes there")
    candidate = PruningConfig.of("fastv", r_max=1) if inside else KEEP_ALL
    for sheet in answered(opened, photos):
        # Behind others, so that nothing of theirs is taken for its own.
        *_, moved = sheet.moved_by([PruningConfig.of("hivtp", r_max=0.5), candidate])
        assert moved.kl == [0.0] * len(sheet.sheet.asked)
        assert all(moved.same)


def by_hand(opened, asked, candidate, answer):
    """(n, V) log probabilities, a first token for each of one answer, by the host's generate."""
    picture, ids = asked.open(), opened.prompt(asked.text)[None]
    found = []
    with prune(opened.model, candidate), torch.inference_mode():
        for step in range(len(answer)):
            so_far = torch.cat((ids, answer[None, :step]), 1)
            seen: list[torch.Tensor] = []
            opened.generate(
                so_far,
                images=opened.images([picture]),
                image_sizes=[picture.size],
                max_new_tokens=1,
                do_sample=False,
                logits_processor=[lambda _, scores, seen=seen: seen.append(scores) or scores],
            )
            found.append(seen[0][0].float().log_softmax(-1))
    return torch.stack(found)


def test_divergence_is_that_of_each_token_added_up(opened, photos):
    candidates = [PruningConfig.of(name, r_max=0.4) for name in ("hiprune", "prumerge")]
    for sheet in answered(opened, photos)[:1]:
        every = list(sheet.moved_by(candidates))
        for row, asked in enumerate(sheet.sheet.asked[:2]):
            answer = sheet.answers[row, : sheet.counts[row]]
            stock = by_hand(opened, asked, KEEP_ALL, answer)
            for candidate, moved in zip(candidates, every, strict=True):
                found = by_hand(opened, asked, candidate, answer)
                kl = (stock.exp() * (stock - found)).sum()
                assert moved.kl[row] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
                assert moved.kl[row] > 0
                assert moved.same[row] == torch.equal(stock.argmax(-1), found.argmax(-1))


def test_an_answer_ends_where_it_says_so():
    said = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 0, 0, 0]])
    answers, counts = _until_end(said, [2])
    assert counts.tolist() == [2, 4, 1]
    assert answers.shape == (3, 4)
    assert _until_end(said[::2], [2])[0].shape == (2, 2)


def test_the_worse_of_two_known_options_diverges_more(trained):
    bad, good = (PruningConfig.of("hivtp", r_max=0.25, layers=layers) for layers in ((1,), (5, 6)))
    found = {bad: 0.0, good: 0.0}
    for sheet in sheets_of(trained, drawn("plain", 24), 16):
        moved = Answered(trained, sheet, Variant(), 8).moved_by([bad, good])
        for candidate, each in zip((bad, good), moved, strict=True):
            found[candidate] += sum(each.kl)
    assert found[bad] > 2 * found[good]


def test_the_tower_runs_once_for_all_candidates(opened, photos, monkeypatch):
    space = Space("hivtp", {"r_max": 0.5}, model_of(opened))
    runs, sheet = [], answered(opened, photos)[0]
    sheet._reference(False)
    layer = opened.vit.get_submodule(
        next(name for name, _ in opened.vit.named_modules() if name.endswith("layers.0"))
    )
    handle = layer.self_attn.q_proj.register_forward_hook(lambda *call: runs.append(1))
    try:
        together = list(sheet.moved_by(space.first()))
        assert len(runs) == 1
        alone = [next(iter(sheet.moved_by([candidate]))) for candidate in space.first()]
    finally:
        handle.remove()
    assert together == alone


def test_no_picture_is_in_both_halves():
    asked = [Asked(f"{n % 7}.png", str(n), Image.new) for n in range(30)]
    for seed in range(5):
        halves = Halves.of(asked, seed)
        one, other = ({a.picture for a in half} for half in (halves.choosing, halves.judging))
        assert not one & other
        assert (len(one), len(other)) == (4, 3)
        assert len(halves.choosing) + len(halves.judging) == len(asked)
    assert Halves.of(asked, 1) != Halves.of(asked, 2)
    with pytest.raises(OptionError, match="at least two"):
        Halves.of(asked[:1])


def test_pictures_alone_are_asked_general_questions(tmp_path, photos):
    for name in ("a.png", "deep/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photos[0].resize((40, 30)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    found = in_folder(tmp_path, None)
    assert [each.picture for each in found] == ["a.png"] * EACH + ["deep/b.jpg"] * EACH
    assert len({each.text for each in found}) == 2 * EACH
    assert {each.text for each in found} <= set(GENERAL)
    assert found[0].open().size == (40, 30)
    photos[0].save(tmp_path / "tuned-table.png")  # an earlier run's
    assert in_folder(tmp_path, None, plots="tuned") == found
    (tmp_path / "tuned-table.png").unlink()
    questions = tmp_path / "q.jsonl"
    line = {"question_id": 1, "image": "a.png", "text": "<image>\nWhat?", "category": "x"}
    questions.write_text(json.dumps(line) + "\n")
    assert [(each.picture, each.text) for each in in_folder(tmp_path, questions)] == [
        ("a.png", "What?")
    ]
    questions.write_text(json.dumps({**line, "image": "gone.png"}) + "\n")
    with pytest.raises(OptionError, match=r"gone\.png is not in"):
        in_folder(tmp_path, questions)


@pytest.mark.parametrize("name", list_methods())
def test_what_a_method_declares_can_be_had(name):
    """Each value alone, on the tower that the papers number their layers by."""
    kind, model = method_class(name), Model(24, 23, (24, 24), 32)
    space = Space(name, {"r_max": 0.5}, model)
    tried = [*space.first(), *space.near(space.first())]
    assert str(tried[0]) == str(space.default())
    named = {option for each in tried for option in each.given}
    assert named - {"r_max"} == set(kind.worth_trying)
    assert set(kind.worth_trying) <= set(kind.__dataclass_fields__)


def test_layers_are_tried_coarse_to_fine():
    assert spread_layers(11) == tuple(range(1, 12))
    assert spread_layers(23) == (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23)
    assert OneLayer().near(9, (9, 11), 23) == (8, 10)
    near = LayerSet().near((9,), [(9,), (13,), (7,)], 23)
    assert {(9, 13), (7, 9), (8,), (10,), (8, 9), (9, 10), (8, 9, 10), (7, 9, 13)} <= set(near)
    assert (9,) not in near
    assert (8, 9) in LayerSet().near((9, 10), [(9, 10), (9,)], 23)
    assert Values((1, 2, 3)).near(2, (2,), 23) == (1, 3)


def test_options_that_are_given_are_left_alone():
    model = Model(12, 11, (12, 12), 5)
    space = Space("hivtp", {"r_max": 0.25}, model, {"layers": (5, 6)})
    assert {c.given["layers"] for c in (*space.first(), *space.near(space.first()))} == {(5, 6)}
    with pytest.raises(LlavaHvpError):
        Space("hivtp", {"r_max": 0.25}, model, {"layers": (12,)}).default()


def verdict_of(gain, pictures=100):
    winner, default = PruningConfig.of("hivtp", layers=(5,)), PruningConfig.of("hivtp")
    return Verdict(winner, default, Interval(*gain), pictures)


def test_a_verdict_says_what_is_chance():
    assert verdict_of((0.2, 0.1, 0.3)).is_better
    assert not verdict_of((0.2, 0.1, 0.3), pictures=8).is_better
    undecided = verdict_of((0.1, -0.1, 0.3))
    assert not undecided.is_better
    assert undecided.would_decide == 400  # twice too wide: four times the pictures
    assert "800 pictures" in undecided.words()
    assert undecided.chosen is undecided.winner
    worse = verdict_of((-0.2, -0.3, -0.1))
    assert worse.chosen is worse.default
    assert "Worse" in worse.words()


def test_an_interval_is_over_pictures_and_not_questions():
    """Eight questions about one picture that all say the same are one voice."""
    pictures = [Asked(str(n), "?", Image.new) for n in range(8) for _ in range(8)]
    sheet = type("Sheet", (), {"asked": pictures})
    values = [float(n % 2) for n in range(8) for _ in range(8)]
    by_picture = Sample.of([sheet], [values]).interval()
    alone = [Asked(str(n), "?", Image.new) for n in range(64)]
    by_question = Sample.of([type("Sheet", (), {"asked": alone})], [values]).interval()
    assert by_picture.mean == by_question.mean == 0.5
    assert by_picture.half_width > 2 * by_question.half_width


def test_the_smallest_budget_is_that_which_all_larger_ones_keep_too():
    means = torch.tensor([[0.99, 0.98, 0.9, 0.99], [0.5, 0.99, 0.99, 0.99], [1, 1, 1, 1]])
    assert _last_kept(means, 0.98).tolist() == [1, -1, 3]


@pytest.fixture
def command(checkpoints, photos, tmp_path):
    """A tune of one method on a random checkpoint and four pictures, without its --out."""
    images = tmp_path / "images"
    images.mkdir()
    for number, photo in enumerate(photos):
        photo.resize((60, 40)).save(images / f"{number}.png")
    model = ["--model-path", str(checkpoints("llava-1.5-llama")), "--device", "cpu"]
    own = ["--images", str(images), "--methods", "scope", "--new-tokens", "3", "--batch", "4"]
    return ["tune", *model, *own]


def test_an_interrupted_run_goes_on_and_gives_the_same(command, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole" / "tuned.json", tmp_path / "parts" / "tuned.json"
    for path in (whole, parts):
        path.parent.mkdir()
    added, stock = [], Measured.add

    def add(self, half, sheet, candidate, moved):
        added.append((half, sheet, str(candidate)))
        if len(added) == stop:
            raise KeyboardInterrupt
        stock(self, half, sheet, candidate, moved)

    monkeypatch.setattr(Measured, "add", add)
    stop = 0
    assert main([*command, "--out", str(whole)]) == 0
    everything = list(added)
    added.clear()
    stop = len(everything) // 2
    assert main([*command, "--out", str(parts)]) == 130
    assert not parts.exists()
    before, stop = added[:-1], 0
    added.clear()
    assert main([*command, "--out", str(parts)]) == 0
    assert sorted(before + added) == sorted(everything)
    found = [json.loads(path.read_text()) for path in (whole, parts)]
    for each in found:
        assert each.pop("command")
    assert found[0] == found[1]
    assert not list(parts.parent.glob("*.unfinished"))
    assert {p.suffix for p in parts.parent.glob("tuned-table.*")} >= {".md", ".json"}
    output = capsys.readouterr()
    assert "scope r_max=0.25" in output.out
    assert "some " in output.err  # how long it takes
    tuned = load_method(parts)
    assert (tuned.name, tuned.options["r_max"]) == ("scope", 0.25)


def test_the_smallest_budget_is_written_too(tmp_path):
    out, again = tmp_path / "tuned.json", tmp_path / "again.json"
    command = ["tune", "--model", "llava-shapes", "--count", "8", "--new-tokens", "4"]
    given = ["--methods", "hivtp", "--prune-opt", "layers=5,6", "--agreement", "0.5"]
    assert main([*command, *given, "--device", "cpu", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert 0.06 <= content["options"]["r_max"] < 0.9
    assert content["options"]["layers"] == [5, 6]
    assert "is the smallest that keeps 50.0%" in content["verdict"]
    assert (tmp_path / "tuned-curve.md").read_text().count("hivtp r_max=") > 8
    # Its options at other budgets.
    given = ["--prune-from", str(out), "--agreement", "0.999"]
    settings = tune.parse(parsed([*command, *given, "--device", "cpu", "--out", str(again)]))
    assert settings.fixed == {"hivtp": {"layers": (5, 6)}}


def parsed(words):
    parser = argparse.ArgumentParser()
    tune.add(parser.add_subparsers())
    return parser.parse_args(words)


def test_nothing_is_written_where_no_budget_agrees(command, tmp_path, capsys):
    """A random model's answers all change."""
    out = tmp_path / "tuned.json"
    given = ["--count", "4", "--agreement", "1", "--out", str(out)]
    assert main([*command, *given]) == 2
    assert "nothing keeps 100.0% of the answers" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("", "--images is missing"),
        ("--images nowhere", "no such folder"),
        ("--images . --agreement 2", "a share in"),
        ("--images . --methods none", "nothing to tune"),
        ("--images . --prune-from x.json", "goes with --agreement"),
        ("--images . --out tuned.txt", "as tuned.json"),
        ("--images . --count 1", "at least 2"),
        ("--images . --prune-opt layers=99 --methods hivtp", "layer 99"),
    ],
)
def test_what_cannot_be_is_refused_beforehand(flags, told, checkpoints, photos, tmp_path, capsys):
    photos[0].save(tmp_path / "a.png")
    model = ["tune", "--model-path", str(checkpoints("llava-1.5-llama")), "--device", "cpu"]
    given = [str(tmp_path) if word == "." else word for word in flags.split()]
    assert main([*model, *given]) == 2
    assert told in capsys.readouterr().err
