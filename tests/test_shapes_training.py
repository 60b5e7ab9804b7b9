"""The shipped checkpoints' training, small: its stages learn, LLaVA opens what comes of it."""

import csv

import numpy as np
import pytest
import torch

from llava_hvp.checkpoints.opening import open_checkpoint
from llava_hvp.shapes import CHECKPOINTS, checkpoint
from llava_hvp.shapes.drawing import draw
from llava_hvp.shapes.questions import held_out
from llava_hvp.shapes.scenes import make_scene

loop = pytest.importorskip("training.loop", reason="only in a checkout")

from training import anyres, export, language, pool, prompts, tower  # noqa: E402

POOLS = {
    "easy": {"first": 500_000_000, "easy": True},
    "pool": {"first": 0},
    "text": {"first": 700_000_000, "text": True},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training of a few steps a stage, uncompiled."""
    out = tmp_path_factory.mktemp("training")
    for name, options in POOLS.items():
        pool.draw_pool(out / name, 48, **options)
    small = ["--minutes", "60", "--log-every", "0"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pools = [str(out / "pool"), str(out / "tower")]
    more = ["--easy", str(out / "easy"), "--text", str(out / "text"), "--easy-steps", "4"]
    stages = {stage: str(out / stage) for stage in ("language", "anyres")}
    with torch.compiler.set_stance("force_eager"):
        tower.main([*pools, *more, "--batch", "12", "--steps", "16", *small])
        language.main([*pools, stages["language"], "--batch", "4", "--steps", "24", *small])
        anyres.main(
            [pools[1], *stages.values(), *("--count", "16", "--batch", "4"), "--steps", "6", *small]
        )
    torch.set_num_threads(threads)
    for name, stage in zip(CHECKPOINTS, stages.values(), strict=True):
        export.main([pools[1], stage, "--name", name, "--to", str(out / "weights")])
    return out


@pytest.mark.parametrize(("stage", "fallen"), [("tower", 0.8), ("language", 0.5)])
def test_the_loss_of_a_stage_falls(trained, stage, fallen):
    rows = log(trained, stage)
    losses = [float(row["loss"]) for row in rows]
    assert np.mean(losses[-3:]) < fallen * losses[0]


def log(trained, stage):
    lines = (trained / stage / f"{stage}.csv").read_text().splitlines()
    assert lines[0].startswith(f"# python -m training.{stage} ")
    return list(csv.DictReader(line for line in lines if line[0] != "#"))


def test_the_last_stage_goes_on_from_the_one_before(trained):
    first = float(log(trained, "anyres")[0]["loss"])
    # Not from the loss of nothing learned, which is ln(vocabulary).
    assert first < 0.7 * float(log(trained, "language")[0]["loss"])


@pytest.fixture(scope="module", params=CHECKPOINTS)
def exported(request, trained, tmp_path_factory):
    """(checkpoint as LLaVA's loader opens it, the same as training knows it)."""
    stage = "anyres" if "next" in request.param else "language"
    folder = checkpoint(tmp_path_factory.mktemp("written"), request.param, trained / "weights")
    model = language.Language(language.VOCABULARY, tower.WIDTH, **language.LANGUAGE)
    state = torch.load(trained / stage / language.STATE)
    model.load_state_dict({name: weight.half().float() for name, weight in state.items()})
    return open_checkpoint(str(folder), "cpu"), model


def picture_tokens(opened, picture):
    """(n, width) what stock LLaVA hands to its language model for one picture."""
    packed = opened.model.prepare_inputs_labels_for_multimodal(
        torch.tensor([[1, -200, 5]]),
        *(None, None, None, None),
        opened.images([picture]),
        [picture.size],
    )[4]
    return packed[0, 1:-1]


@torch.inference_mode()
def test_llava_packs_a_picture_as_training_did(exported, trained):
    opened, model = exported
    seen = language.load_tower(trained / "tower")
    if opened.model.config.image_aspect_ratio == "anyres":
        album = anyres.Album(seen, 16, 900_000_000)
        rows = range(len(album.scenes))
        pictures = [draw(scene) for scene in album.scenes]
        ours = [album.picture(model, np.array([r]), len(album.tokens[r]))[0] for r in rows]
        assert len({len(tokens) for tokens in ours}) >= 4
    else:
        views = [pool.make_view(seed) for seed in range(12)]
        pictures = [draw(view.scene) for view in views if view.whole]
        patches = np.stack([pool.to_patches(view.picture) for view in views if view.whole])
        ours = model.picture(seen.features(tower.normalise(patches)).float())
    for picture, mine in zip(pictures, ours, strict=True):
        stock = picture_tokens(opened, picture)
        assert stock.shape == mine.shape
        # The tower ran in bfloat16 there, with an image processor of another resampling here.
        alike = torch.cosine_similarity(stock, mine, dim=-1)
        assert alike.min() > 0.999, (picture.size, alike.min())
        assert alike.mean() > 0.9999


@torch.inference_mode()
def test_llava_computes_the_logits_of_training(exported):
    opened, model = exported
    torch.manual_seed(0)
    x = torch.randn(1, 40, language.LANGUAGE["width"]) * 0.5
    causal = torch.full((40, 40), language.HIDDEN).triu(1)[None, None]
    ours = model(x, model.rotary(torch.arange(40)[None]), causal, torch.arange(40))
    stock = opened.model(inputs_embeds=x).logits[0]
    torch.testing.assert_close(ours, stock, atol=1e-3, rtol=1e-3)


def test_fewer_pictures_than_a_batch_are_refused(trained):
    with pytest.raises(SystemExit, match="48 pictures"):
        next(loop.batches(np.arange(48), 64, np.random.RandomState(0)))


@pytest.mark.parametrize("mode", prompts.TEMPLATES)
def test_a_conversation_is_tokenised_as_llava_does(trained, tmp_path, mode):
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token

    opened = open_checkpoint(str(checkpoint(tmp_path, source=trained / "weights")), "cpu")
    template, _ = prompts.TEMPLATES[mode]
    maker = prompts.Prompts(trained / "language")
    questions = [question for _, question in held_out(8)]
    for asked in (questions[:1], questions[1:3], questions[3:6]):
        conversation = conv_templates[mode].copy()
        for number, question in enumerate(asked):
            mark = "" if number else "<image>\n"
            conversation.append_message(conversation.roles[0], mark + question.text)
            # As the chat keeps it: with what the model said at its end, where nothing else says so.
            end = "" if conversation.sep2 else "</s>"
            said = None if question is asked[-1] else question.answer + end
            conversation.append_message(conversation.roles[1], said)
        ids = tokenizer_image_token(conversation.get_prompt(), opened.tokenizer)
        mine = maker.segment(asked, template).ids
        answer = len(maker.turn(asked[-1], True, template)[1])
        assert [*maker.prefix(template), -200, *mine[:-answer]] == ids


def test_every_template_is_asked_in(trained):
    asker = language.Asker(prompts.Prompts(trained / "language"), 170, 0.0, 0)
    batches = [asker.batch([make_scene(1)], [4], 4)[0] for _ in range(40)]
    starts = {tuple(batch["prefix"].tolist()) for batch in batches}
    assert len(starts) == len(prompts.TEMPLATES)
