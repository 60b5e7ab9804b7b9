"""`llava-hvp accuracy`: marks that are right, and answers that pruning has not spoiled."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file

from llava_hvp.accuracy.exam import TEMPLATE, Marks, examine
from llava_hvp.accuracy.scores import VariantScore, scores_of, wilson_interval
from llava_hvp.accuracy.store import Answers
from llava_hvp.accuracy.tables import figure_of, title_of
from llava_hvp.checkpoints.opening import open_checkpoint
from llava_hvp.checkpoints.variants import variants
from llava_hvp.cli import main
from llava_hvp.errors import EvaluationError
from llava_hvp.evaluation.files import locked
from llava_hvp.shapes import checkpoint, list_checkpoints
from llava_hvp.shapes.drawing import draw
from llava_hvp.shapes.exams import EXAMS, exam, exam_for
from llava_hvp.shapes.questions import TASKS, is_right
from llava_hvp.shapes.scenes import split_of

COMMITTED = Path(__file__).parent.parent / "docs" / "results" / "accuracy"
# Questions of a slice. LLaVA-NeXT takes three times as long for one.
SLICES = {"llava-shapes": 300, "llava-shapes-next": 150}


@pytest.fixture(scope="module", params=list_checkpoints())
def loaded(request, tmp_path_factory):
    """(name, opened) of a shipped checkpoint."""
    folder = checkpoint(tmp_path_factory.mktemp("shapes"), request.param)
    return request.param, open_checkpoint(str(folder), "cpu", conv_mode=TEMPLATE)


def alone(loaded, picture, text):
    """The answer to one question by itself, as a chat would ask it."""
    with torch.inference_mode():
        output = loaded.model.generate(
            loaded.prompt(text)[None],
            images=loaded.images([picture]),
            image_sizes=[picture.size],
            do_sample=False,
            max_new_tokens=10,
        )
    return loaded.tokenizer.decode(output[0], skip_special_tokens=True).strip()


def test_a_batch_answers_as_one_at_a_time(loaded):
    name, model = loaded
    asked = list(exam("detail" if "next" in name else "plain", 18))
    chosen = variants(["hivtp", "hiprune++"], [{"r_max": 0.5}])
    ticks = []
    marks = examine(model, asked, chosen, batch=4, tick=ticks.append)
    assert sum(ticks) == 18 * 3
    for mark in marks:
        assert sum(mark.asked.values()) == 18
        right = 0
        for scene, question in asked:
            if not mark.variant.prunes:
                right += is_right(alone(model, draw(scene), question.text), question)
                continue
            with model.pruned_by(mark.variant) as pruned:
                right += is_right(alone(model, draw(scene), question.text), question)
                assert pruned.last[0].kept_of_patches <= 0.5 + 1e-6
        assert abs(right - sum(mark.right.values())) <= 1  # rounding in a batch may tip one
        assert (mark.kept == 0) == (not mark.variant.prunes)
    assert "llava_hvp" not in vars(model.model)


def by_another_hand(side):
    """Plain PIL calls, none of the generator's code; things of 70 x 70 pixels."""
    picture = Image.new("RGB", (336, 336), (225, 222, 210))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((30, 40, 100, 110), fill="red")
    pen.rectangle((220, 45, 290, 115), fill="blue")
    pen.polygon(((160, 220), (120, 295), (200, 295)), fill="green")
    pen.text((275, 230), "47", fill="black", font=ImageFont.load_default(52), anchor="mm")
    return picture.resize((side, side))


ASKED = {
    "Is there a red circle?": "yes",
    "Is there a red square?": "no",
    "Is there a blue square?": "yes",
    "What colour is the triangle?": "green",
    "Where is the red circle?": "top left",
    "Where is the green triangle?": "bottom",
    "What is to the left of the blue square?": "red circle",
    "How many circles are there?": "1",
    "Which number is written?": "47",
}


def wrong_of(answers):
    """Questions that are not answered rightly."""
    assert list(answers) == list(ASKED)
    return {text: said for text, said in answers.items() if said.lower() != ASKED[text]}


@pytest.mark.parametrize("side", [168, 336])
def test_pictures_by_another_hand_are_answered(loaded, side):
    _, model = loaded
    answers = {text: alone(model, by_another_hand(side), text) for text in ASKED}
    assert len(wrong_of(answers)) <= 1, wrong_of(answers)


@pytest.mark.parametrize("flags", ["", "--prune-method hivtp --r-max 0.5"])
@pytest.mark.parametrize("name", list_checkpoints())
def test_the_chat_answers_in_the_template_that_it_takes_by_itself(name, flags, tmp_path):
    """LLaVA's chat goes by the checkpoint's name, and takes llava_v0 for these."""
    by_another_hand(336).save(tmp_path / "picture.png")
    shell = subprocess.run(
        [
            *(sys.executable, "-m", "llava.serve.cli", "--temperature", "0"),
            *("--model-path", checkpoint(tmp_path, name)),
            *("--image-file", tmp_path / "picture.png"),
            *("--device", "cpu", "--max-new-tokens", "10", *flags.split()),
        ],
        input="\n".join((*ASKED, "")),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LLAVA_HVP_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
    )
    said = re.findall(r"^Human: Assistant: (.*)$", shell.stdout, re.MULTILINE)
    answers = dict(zip(ASKED, said, strict=True))
    assert len(wrong_of(answers)) <= 1, wrong_of(answers)
    counted = f"llava-hvp: 1 image, sent {len(ASKED)} times, kept "
    assert (counted in shell.stderr) == bool(flags)


def test_every_question_is_asked_once():
    for name in EXAMS:
        asked = list(exam(name, 61))
        assert len(asked) == 61
        assert all(split_of(scene) == "test" for scene, _ in asked)
        assert {question.task for _, question in asked} == set(TASKS)
        assert asked == list(exam(name, 61))


def committed(name):
    """The rows of the committed table, by method and options."""
    rows = json.loads((COMMITTED / f"{name}.json").read_text())["rows"]
    return {(row["method"], row["options"]): row for row in rows}


def margin(questions):
    """Percent: three standard deviations of so many answers of which 80 % are right.

    7 for 300: what chance alone would do once in a thousand runs. The slice is part of the
    committed questions, so that less is to be expected.
    """
    return 300 * (0.8 * 0.2 / questions) ** 0.5


def test_a_slice_is_answered_as_well_as_committed(loaded):
    name, model = loaded
    rows, count = committed(name), SLICES[name]
    asked = list(exam(exam_for(name), count))
    chosen = variants(["hivtp", "hiprune", "hiprune++"], [{"r_max": 0.25}])
    for score in scores_of(examine(model, asked, chosen, batch=16)):
        expected = rows[score.method, score.options]["overall"]
        least = expected - margin(count)
        assert score.overall > least, f"{score.method}: {score.overall}, committed {expected}"


def test_the_committed_models_are_good_enough_to_lose_something():
    none = committed("llava-shapes")["none", ""]
    assert none["questions"] >= 1000
    assert none["tasks"]["existence"] >= 95
    assert none["overall"] >= 90
    twin, first = (
        committed(name)["none", ""] for name in ("llava-shapes-next", "llava-shapes-detail")
    )
    assert twin["overall"] >= first["overall"] + 10


def test_the_interval_is_wilsons():
    """Against the examples of a table, and by its definition: |share - p| = z sqrt(p (1-p) / n)."""
    low, high = wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    for right, asked in ((8, 10), (1911, 2000), (0, 12), (12, 12)):
        share = right / asked
        for bound in wilson_interval(right, asked):
            deviation = 1.959964 * (bound * (1 - bound) / asked) ** 0.5
            assert abs(share - bound) == pytest.approx(deviation)


def test_all_right_is_not_all_certain():
    marks = Marks(variants(["hivtp"], [{"r_max": 0.5}])[1])
    marks.asked["colour"] = marks.right["colour"] = 12
    marks.each = [True] * 12
    marks.seconds = 1.0
    (score,) = scores_of([marks])
    assert score.overall == 100
    assert score.half_width == pytest.approx(12.1, abs=0.1)


def test_the_command_writes_table_and_plot(tmp_path, capsys):
    flags = ["--questions", "12", "--methods", "hivtp,random", "--r-max", "0.5,0.25"]
    assert main(["accuracy", *flags, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "llava-shapes.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["none", "hivtp", "hivtp", "random", "random"]
    assert all(set(r["tasks"]) == set(TASKS) for r in rows)
    assert all(r["questions"] == 12 for r in rows)
    for r in rows:
        right = int(r["each"], 16).bit_count()
        assert r["overall"] == pytest.approx(100 * right / 12)
    assert [set(r["stability"]) for r in rows] == [set(), *[{"float16", "bfloat16"}] * 4]
    assert rows[1]["kept_tokens"] > rows[2]["kept_tokens"] > 20
    assert (tmp_path / "out" / "llava-shapes.png").read_bytes()[:4] == b"\x89PNG"
    table = (tmp_path / "out" / "llava-shapes.md").read_text()
    assert "| hivtp" in table
    assert "On 12 of the pictures, each with its question: `choice`" in table
    assert "## r_max=0.25" in (tmp_path / "out" / "llava-shapes-ranking.md").read_text()
    assert "existence" in printed


def test_a_projector_alone_is_opened_by_what_it_was_tuned_from(tmp_path):
    """The projector is that of --model-path, all else that of --model-base."""
    base, tuned = checkpoint(tmp_path), tmp_path / "llava-tuned"
    tuned.mkdir()
    shutil.copy(base / "config.json", tuned)
    weights = load_file(base / "model.safetensors")
    projector = {k: weight.clone() for k, weight in weights.items() if "mm_projector" in k}
    torch.save(projector, tuned / "mm_projector.bin")
    for name in projector:
        weights[name] = torch.zeros_like(weights[name])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    flags = ["--questions", "12", "--methods", "none", "--out", str(tmp_path)]
    of = ["--model-path", str(tuned), "--model-base", str(base)]
    assert main(["accuracy", *flags]) == main(["accuracy", *flags, *of]) == 0
    shipped, own = (
        json.loads((tmp_path / f"{name}.json").read_text())["rows"][0]
        for name in ("llava-shapes", "llava-tuned")
    )
    assert own["each"] == shipped["each"]
    assert own["overall"] > 75  # a projector of zeros sees nothing


# --- an interrupted measurement ---

ASK = [
    "accuracy",
    "--questions",
    "12",
    "--batch",
    "2",
    "--methods",
    "hivtp,hiprune++",
    "--r-max",
    "0.5",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(rows of a run to its end, each (sheet, variant) in the order in which it was answered)."""
    out, asked = tmp_path_factory.mktemp("undisturbed"), []
    with pytest.MonkeyPatch.context() as patch:
        stock = Answers.add

        def add(self, sheet, variant, answered):
            asked.append((sheet, variant))
            stock(self, sheet, variant, answered)

        patch.setattr(Answers, "add", add)
        assert main([*ASK, "--out", str(out)]) == 0
    return rows_of(out), asked


TIMES = ("time", "choice")


def rows_of(out):
    """The rows of a results file, less the times that it took."""
    found = json.loads((out / "llava-shapes.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def lines_of(out):
    path = out / "llava-shapes.unfinished" / "answers.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that `kill -9` ended in the middle, its last line half written."""
    out = tmp_path_factory.mktemp("killed")
    process = subprocess.Popen(
        [sys.executable, "-m", "llava_hvp", *ASK, "--out", out],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as many threads as here
    )
    while len(lines_of(out)) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    with (out / "llava-shapes.unfinished" / "answers.jsonl").open("a") as file:
        file.write('{"sheet": 2, "var')
    return out


@pytest.fixture
def interrupted(killed, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(killed, tmp_path / "out")


def test_a_killed_measurement_goes_on_where_it_stopped(
    interrupted, undisturbed, monkeypatch, capsys
):
    rows, order = undisturbed
    done = [json.loads(line) for line in lines_of(interrupted)[:-1]]
    assert 5 <= len(done) < len(order)
    assert [(record["sheet"], record["variant"]) for record in done] == order[: len(done)]
    asked, stock = [], Answers.add

    def add(self, sheet, variant, answered):
        asked.append((sheet, variant))
        stock(self, sheet, variant, answered)
        assert json.loads(lines_of(interrupted)[-1])["said"] == answered.said

    monkeypatch.setattr(Answers, "add", add)
    assert main([*ASK, "--out", str(interrupted)]) == 0
    assert asked == order[len(done) :]
    assert rows_of(interrupted) == rows
    told = capsys.readouterr().err
    assert "half written and will be asked for again" in told
    assert f"{sum(len(record['said']) for record in done)} answers are there" in told
    assert not (interrupted / "llava-shapes.unfinished").exists()


def test_finished_questions_are_not_put_to_the_model_again(interrupted, undisturbed, monkeypatch):
    from llava.model import LlavaLlamaForCausalLM

    left = len(undisturbed[1]) - len(lines_of(interrupted)[:-1])
    calls, stock = [], LlavaLlamaForCausalLM.generate

    def generate(self, *args, **kwargs):
        calls.append(1)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(LlavaLlamaForCausalLM, "generate", generate)
    assert main([*ASK, "--out", str(interrupted)]) == 0
    assert len(calls) == left + 3  # once more for each variant, since first calls are slow


def test_ctrl_c_says_how_to_go_on(tmp_path, undisturbed, monkeypatch, capsys):
    stock = Answers.add

    def add(self, sheet, variant, answered):
        stock(self, sheet, variant, answered)
        if sheet == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "add", add)
    assert main([*ASK, "--out", str(tmp_path)]) == 130
    assert "the same command goes on from the answers that are there" in capsys.readouterr().err
    monkeypatch.undo()
    assert len(lines_of(tmp_path)) == 4
    assert main([*ASK, "--out", str(tmp_path)]) == 0
    assert rows_of(tmp_path) == undisturbed[0]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--methods", "hivtp"), "variants was ['none', 'hivtp r_max=0.5', 'hiprune++ r_max=0.5']"),
        (("--r-max", "0.25"), "variants was"),
        (("--prune-opt", "layers=6"), "variants was"),
        (("--questions", "13"), "12 held-out questions"),
        (("--batch", "3"), "up to 2 at a time"),
    ],
)
def test_answers_of_other_settings_are_refused(interrupted, more, told, capsys):
    before = lines_of(interrupted)
    assert main([*ASK, *more, "--out", str(interrupted)]) == 2
    error = capsys.readouterr().err
    assert "unfinished holds answers of other settings: " in error
    assert told in error
    assert "--restart" in error
    assert lines_of(interrupted) == before


def test_answers_of_other_weights_or_versions_are_refused(tmp_path, monkeypatch, capsys):
    model = checkpoint(tmp_path)
    ask = [*ASK, "--methods", "none", "--model-path", str(model), "--out", str(tmp_path / "out")]
    stock = Answers.add

    def add(self, sheet, variant, answered):
        stock(self, sheet, variant, answered)
        raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "add", add)
    assert main(ask) == 130
    for weights in (model / "model.safetensors", model / "vision-tower" / "model.safetensors"):
        content = bytearray(weights.read_bytes())
        times = weights.stat()
        content[-1] ^= 1  # of the same size, and of the same time
        weights.write_bytes(content)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert main(ask) == 2
        assert "weights was" in capsys.readouterr().err
        content[-1] ^= 1
        weights.write_bytes(content)
    assert main(ask) == 130
    capsys.readouterr()
    monkeypatch.setattr("llava_hvp.bench.machine.versions", lambda: "torch 9")
    assert main(ask) == 2
    assert "versions was" in capsys.readouterr().err


def test_restart_throws_the_answers_away(interrupted, undisturbed, monkeypatch, capsys):
    assert main([*ASK, "--questions", "6", "--restart", "--out", str(interrupted)]) == 0
    assert "answers are there" not in capsys.readouterr().err
    assert {row["questions"] for row in rows_of(interrupted)} == {6}


def test_two_measurements_in_one_folder_are_refused(interrupted, capsys):
    before = lines_of(interrupted)
    with locked(interrupted / "llava-shapes.unfinished"):
        assert main([*ASK, "--out", str(interrupted)]) == 2
    assert "another run is at work in" in capsys.readouterr().err
    assert lines_of(interrupted) == before


def test_a_folder_that_a_run_has_just_taken_away_is_not_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: shutil.rmtree(tmp_path / "out"))
    with pytest.raises(EvaluationError, match="another run is at work"), locked(tmp_path / "out"):
        pass


def test_a_folder_that_cannot_be_written_is_said_before_a_model_is_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*ASK, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_quick_form_is_short_and_says_beforehand_how_long_it_takes(tmp_path, capsys):
    asked = ["accuracy", "--quick", "--questions", "4", "--out", str(tmp_path)]
    assert main(asked) == 0
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    (told,) = (n for n, line in enumerate(lines) if "each asked unpruned and in 6 ways" in line)
    assert re.search(r"about \d+ (seconds|minutes) on one CPU core; Ctrl-C stops", lines[told])
    assert "go on with the same command" in lines[told]
    rows = json.loads((tmp_path / "llava-shapes.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        "none",
        *(name for name in ("hivtp", "hiprune", "random") for _ in range(2)),
    ]
    assert all(row["questions"] == 4 and row["choice"] is None for row in rows)
    # Why HiPrune falls short here stands above the figures.
    assert printed.out.index("HiPrune's registers are background") < printed.out.index("hiprune ")


def test_panels_of_a_plot_share_their_scale_and_the_title_names_no_variable():
    """On the committed results: what tasks come to can be compared by eye."""
    folder = Path(__file__).parent.parent / "docs" / "results" / "accuracy"
    about = json.loads((folder / "llava-shapes.json").read_text())
    scores = [VariantScore(**row) for row in about["rows"]]
    figure = figure_of(title_of(about), scores)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert len(panels) == 1 + len(TASKS)
    assert len({axis.get_ylim() for axis in panels}) == 1
    (least, most), shown = panels[0].get_ylim(), [v for s in scores for v in s.tasks.values()]
    assert least <= min(shown) < max(shown) <= most
    title = figure.get_suptitle()
    assert "llava-shapes" in title
    assert "1000 held-out questions" in title
    assert "=" not in title
    assert "OMP_WAIT_POLICY=" in about["machine"]  # which the table has


def test_there_is_no_plot_of_nothing_pruned(tmp_path):
    assert main(["accuracy", "--questions", "6", "--methods", "none", "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llava-shapes.json", "llava-shapes.md"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--questions 0", "--questions 0"),
        ("--batch 0", "--batch 0"),
        ("--methods hivpt", "'hivpt'"),
        ("--model-path nowhere", "nowhere: no such folder"),
        ("--model-path . --model-base nowhere", "--model-base nowhere: no such folder"),
        ("--model-base .", "--model-base . without --model-path"),
        ("--r-max 2", "2"),
    ],
)
def test_what_is_wrong_is_said(flags, message, capsys):
    assert main(["accuracy", *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_what_is_kept_of_things_is_counted(tmp_path):
    """The script as typed, and its numbers for methods that are known."""
    out = tmp_path / "objects.md"
    script = Path(__file__).parent.parent / "eval_scripts" / "objects.py"
    command = [sys.executable, script, "--pictures", "4", "--out", out]
    shell = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.read_text() == shell.stdout
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in out.read_text().splitlines()
        if line.startswith("| ")
    ]
    layers = [row for row in rows if row[0].isdigit()]
    assert [row[0] for row in layers] == [str(n) for n in range(1, 12)]
    kept = {(row[0], row[1]): row for row in rows}
    found, things, digits, background = map(float, kept["uniform", "0.5"][2:6])
    assert found == 100  # every second patch
    assert all(40 < share < 60 for share in (things, digits, background))
    # What the roles kept is all that was kept: 16 patches but for those that are half covered.
    role = kept["random", "0.11"][6].removeprefix("random ").split(" / ")
    assert 12 <= sum(map(float, role)) <= 16
