"""A checkpoint of transformers' own classes, opened and asked as LLaVA's is: the same answers."""

import json

import pytest
import torch
from hf_models import needs_release

from llava_hvp import HIVTP, FastV
from llava_hvp.accuracy.exam import TEMPLATE, examine
from llava_hvp.accuracy.store import Answers
from llava_hvp.checkpoints.before_loading import check_before_loading
from llava_hvp.checkpoints.convert import to_transformers
from llava_hvp.checkpoints.opening import open_checkpoint
from llava_hvp.checkpoints.variants import variants
from llava_hvp.cli import main
from llava_hvp.errors import LayerError, OptionError
from llava_hvp.runtime import PruningConfig
from llava_hvp.shapes import checkpoint
from llava_hvp.shapes.exams import exam, exam_for

pytestmark = needs_release
COUNTED = ["method", "options", "batch", "tiles", "kept_tokens", "stock_tokens", "kept_of_patches"]
MODELS = ["llava-shapes", "llava-shapes-next"]


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A shipped checkpoint's name, and it opened in both forms."""
    folder = tmp_path_factory.mktemp("pair")
    source = checkpoint(folder, request.param)
    target = to_transformers(source, folder / f"{request.param}-hf")
    opened = [
        open_checkpoint(str(path), "cpu", dtype=torch.float32, conv_mode=TEMPLATE)
        for path in (source, target)
    ]
    return request.param, *opened


READ = ["hivtp", "hiprune++", "visionzip", "mmtok"]
INSIDE = ["fastv", "pyramiddrop", "sparsevlm", "hivtp+fastv"]


def texts_of(answers, variant):
    """Every answer of a variant, in the order of its sheets."""
    said, sheet = [], 0
    while (found := answers.find(sheet, str(variant))) is not None:
        said += found.said
        sheet += 1
    return said


def test_both_forms_answer_alike_with_every_way_to_choose(pair):
    name, *both = pair
    chosen = variants([*READ, *INSIDE], [{"r_max": 0.25}])
    asked = list(exam(exam_for(name), 6 if "next" in name else 24))
    told = Answers(), Answers()
    llavas, theirs = (
        examine(opened, asked, chosen, batch=8, answers=answers)
        for opened, answers in zip(both, told, strict=True)
    )
    assert len(llavas) == 9
    for mine, other in zip(llavas, theirs, strict=True):
        assert (mine.right, mine.kept, mine.kept_of_patches) == (
            other.right,
            other.kept,
            other.kept_of_patches,
        ), mine.variant
        said = [texts_of(answers, mine.variant) for answers in told]
        assert said[0] == said[1], mine.variant
        assert len(said[0]) == len(asked)
    assert sum(llavas[0].right.values()) >= 2 / 3 * len(asked)  # it has learnt what it is asked


def test_prompts_are_the_same_text(pair):
    _, llavas, theirs = pair
    question = "Is there a red circle?"
    assert llavas.text(question) == theirs.text(question)
    assert llavas.prompt(question).tolist() == theirs.prompt(question).tolist()
    assert theirs.text(f"<image>\n{question}") == theirs.text(question)
    assert "<image>" not in theirs.text(question, images=0)


def test_a_ragged_batch_of_answers_is_that_of_each_row(pair):
    name, llavas, theirs = pair
    from llava_hvp.shapes.drawing import draw

    asked = list(exam(exam_for(name), 3))
    questions = [asked[0][1].text, asked[1][1].text, "Is there a red circle?"]
    pictures = [[draw(asked[0][0])], [draw(asked[1][0])], []]
    calls = []
    given = {"do_sample": False, "max_new_tokens": 6}
    with theirs.pruned_by(HIVTP(r_max=0.5)) as pruning:
        found = theirs.answer(questions[:2], pictures[:2], calls.append, **given)
        assert calls[0].kept_tokens == sum(report.kept_tokens for report in pruning.last)
        found += theirs.answer(questions[2:], pictures[2:], calls.append, **given)
        alone = [
            theirs.answer([q], [p], lambda call: None, **given)[0]
            for q, p in zip(questions, pictures, strict=True)
        ]
    assert found == alone
    with llavas.pruned_by(HIVTP(r_max=0.5)):
        assert [
            llavas.answer([q], [p], lambda call: None, **given)[0]
            for q, p in zip(questions, pictures, strict=True)
        ] == alone
    assert [(c.prompts, c.images) for c in calls] == [(2, 2), (1, 0)]
    stock = []
    theirs.answer(questions[:2], pictures[:2], stock.append, **given)
    assert stock[0].kept_tokens == stock[0].stock_tokens == calls[0].stock_tokens
    assert calls[0].kept_tokens < calls[0].stock_tokens
    assert calls[0].vision_tower_dtype == "float32"


def test_show_draws_the_same_patches(pair, tmp_path):
    from PIL import Image

    from llava_hvp.checkpoints.viewer import Viewer
    from llava_hvp.shapes.drawing import draw

    name, *both = pair
    image = draw(next(iter(exam(exam_for(name), 1)))[0])
    viewers = [Viewer(opened, opened.view()) for opened in both]
    looked = []
    for viewer in viewers:
        ids = viewer.prompt("What is in the picture?")
        looked.append(viewer.look(HIVTP(r_max=0.5), image, ids))
        assert viewer.look(None, image, ids).kept_tokens == looked[-1].stock_tokens
    first, second = looked
    assert torch.equal(first.selection.keep, second.selection.keep)
    inside = PruningConfig.checked(HIVTP(r_max=0.5), inside=FastV(r_max=0.5))
    drawn = [v.look(inside, image, v.prompt("What is in the picture?")) for v in viewers]
    assert drawn[0].layer_tokens == drawn[1].layer_tokens
    assert drawn[0].layer_tokens[-1] < drawn[0].kept_tokens == first.kept_tokens
    assert all(torch.equal(a, b) for a, b in zip(*(d.stages for d in drawn), strict=True))
    maps = [viewer.received_attention(image, (1, 6)) for viewer in viewers]
    assert all(torch.allclose(maps[0][layer], maps[1][layer], atol=1e-6) for layer in (1, 6))
    image.save(tmp_path / "picture.png")
    path = str(both[1].model.config._name_or_path)
    shown = ["--image-file", str(tmp_path / "picture.png"), "--device", "cpu"]
    out = tmp_path / "kept.png"
    what = ["--prune-method", "hivtp", "-o", str(out)]
    assert main(["show", "--model-path", path, *shown, *what]) == 0
    assert Image.open(out).size[0] > 100


def test_what_cannot_be_opened_so_is_said(hf, capsys):
    path = str(hf("llava-1.5-llama").path)
    with pytest.raises(OptionError, match="vicuna_v1, mistral_instruct"):
        open_checkpoint(path, "cpu", conv_mode="llava_v0")
    with pytest.raises(OptionError, match="has no base"):
        open_checkpoint(path, "cpu", base="x")
    with pytest.raises(OptionError, match="tiling='672'"):
        open_checkpoint(path, "cpu").view("672")
    inside = ["accuracy", "--model-path", path, "--methods", "fastv", "--r-max", "0.3"]
    assert main(inside) == 2
    assert "averaged over 2 layers" in capsys.readouterr().err
    with pytest.raises(LayerError, match="40"):
        check_before_loading(path, [PruningConfig.checked(HIVTP(r_max=0.5, layers=(40,)))])


def test_a_folder_that_cannot_be_loaded_is_said(hf, tmp_path):
    import shutil

    shutil.copytree(hf("llava-1.5-llama").path, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(OptionError, match="transformers cannot load it"):
        open_checkpoint(str(tmp_path / "broken"), "cpu")


@pytest.mark.parametrize("kind", ["llava-1.5-llama", "llava-next-llama"])
def test_bench_counts_what_it_counts_of_llavas_form(kind, hf, checkpoints, tmp_path):
    flags = "--methods hivtp,fopru --r-max 0.25 --rounds 2 --new-tokens 2 --device cpu"
    flags += " --conv-mode vicuna_v1 --image-size 200x120 --batch 1,2 --all-attentions"
    rows = []
    for number, path in enumerate((checkpoints(kind), hf(kind).path)):
        out = tmp_path / str(number)
        line = ["bench", "--model-path", str(path), "--out", str(out), *flags.split()]
        assert main(line) == 0
        rows.append(json.loads(next(out.glob("*.json")).read_text())["rows"])
    counted = [name for name in rows[0][0] if name in COUNTED]
    assert counted == COUNTED
    assert [[row[n] for n in counted] for row in rows[0]] == [
        [row[n] for n in counted] for row in rows[1]
    ]
