"""The stock chat, `llava.serve.cli`, over several turns on one image."""

import ast
import re
import shutil

import pytest
import torch
from conftest import load
from evaluation import call

from llava_hvp import HIVTP, FastV, HiPrune, prune
from llava_hvp.errors import OptionError
from llava_hvp.hook.serving import Chat
from llava_hvp.hosts.llava.compat.versions import transformers_version

QUESTIONS = ("What is this?", "And what is behind it?", "Why?")
CHAT = (
    "printf '%s\\n' {questions} '' | python -m llava.serve.cli --model-path {path} --image-file "
    "photo.png --device cpu --temperature 0 --max-new-tokens 6 --conv-mode v1 --debug {flags}"
)


@pytest.fixture
def chat(tmp_path, photos):
    """A function that holds a chat: (its turns as the stock chat prints them, its process)."""
    photos[0].save(tmp_path / "photo.png")

    def hold(path, flags, questions=QUESTIONS):
        quoted = " ".join(f"'{q}'" for q in questions)
        result = call(CHAT.format(questions=quoted, path=path, flags=flags), tmp_path)
        assert result.returncode == 0, result.stderr
        turns = re.findall(r"^ (\{'prompt': .*\}) $", result.stdout, re.M)
        asked = [question for question in questions if question.split()[0] != "/prune"]
        assert len(turns) == len(asked), result.stdout
        return [ast.literal_eval(turn) for turn in turns], result

    return hold


def test_every_turn_has_the_history_and_the_answer_of_it(chat, checkpoints, photos, tmp_path):
    from llava.mm_utils import process_images, tokenizer_image_token

    path = checkpoints("llava-1.5-llama")
    turns, result = chat(path, "--prune-method hiprune --r-max 0.33")
    assert "pruning on: hiprune r_max=0.33" in result.stderr
    assert "llava-hvp: 1 image, sent 3 times, kept 32.8% of stock's" in result.stderr

    bundle = load(path)
    bundle.model.half().get_vision_tower().float()
    pixels = process_images([photos[0]], bundle.processor, bundle.model.config).half()
    history = ""
    with prune(bundle.model, HiPrune(r_max=0.33)):
        for question, turn in zip(QUESTIONS, turns, strict=True):
            mark = "" if history else "<image>\n"
            history += f"USER: {mark}{question} ASSISTANT:"
            assert turn["prompt"].endswith(history)
            ids = tokenizer_image_token(turn["prompt"], bundle.tokenizer, return_tensors="pt")[None]
            with torch.inference_mode():
                output = bundle.model.generate(
                    ids, images=pixels, do_sample=False, max_new_tokens=6
                )
            answer = bundle.tokenizer.decode(output[0]).strip().removeprefix("<s>").strip()
            assert turn["outputs"].removeprefix("<s>").strip() == answer != ""
            history += f" {turn['outputs']}</s>"


def test_a_line_switches_the_answers_that_follow(chat, checkpoints, photos):
    from llava.mm_utils import process_images, tokenizer_image_token

    path = checkpoints("llava-1.5-llama")
    lines = (
        *("/prune", QUESTIONS[0], "/prune hiprune 0.25", QUESTIONS[0], "/prune hivpt 0.5"),
        *(
            "/prune none",
            "/pruned?",
            "/prune hivtp+fastv 0.5 inside_r_max=0.7 inside_layer=1",
            QUESTIONS[0],
        ),
    )
    turns, result = chat(path, "--prune-method hivtp --r-max 0.5", lines)
    said = [line for line in result.stderr.splitlines() if line.startswith("llava-hvp: ")]
    for line, start in zip(
        said[1:],
        (
            "pruning on: hivtp r_max=0.5; /prune NAME",
            "pruning on: hiprune r_max=0.25, from the next answer on",
            "error: unknown method 'hivpt': did you mean hivtp",
            "pruning off (none), from the next answer on",
            "pruning on: hivtp+fastv r_max=0.5 inside_r_max=0.7 inside_layer=1, from",
            "4 images, kept",
        ),
        strict=True,
    ):
        assert line.startswith(f"llava-hvp: {start}")
    assert "; hiprune r_max=0.25: 1 image, 25.0%; none: 1 image, 100.0%; hivtp+fastv" in said[-1]

    bundle = load(path)
    bundle.model.half().get_vision_tower().float()
    pixels = process_images([photos[0]], bundle.processor, bundle.model.config).half()
    methods = (
        HIVTP(r_max=0.5),
        HiPrune(r_max=0.25),
        None,
        (HIVTP(r_max=0.5), FastV(layer=1, r_max=0.7)),
    )
    with prune(bundle.model, "none"):
        for method, turn in zip(methods, turns, strict=True):
            ids = tokenizer_image_token(turn["prompt"], bundle.tokenizer, return_tensors="pt")[None]
            output = bundle.model.generate(
                ids, images=pixels, do_sample=False, max_new_tokens=3, prune=method
            )
            # The first tokens: on a tower in float16, as the chat has it, later ones are near ties.
            answer = bundle.tokenizer.decode(output[0]).strip().removeprefix("<s>").strip()
            assert turn["outputs"].removeprefix("<s>").strip().startswith(answer)
            assert answer
    assert len({turn["outputs"] for turn in turns}) == 4


def test_a_chat_that_nobody_prunes_says_how_to_begin(monkeypatch, capsys):
    lines = iter(["/prune hivtp", "  /prune", "What is this? /prune"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert Chat(None).input("USER: ") == "What is this? /prune"
    assert capsys.readouterr().err.count("start with a method") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hivtp half", "/prune 'half': give a share, as 0.25, or KEY=VALUE"),
        ("hivtp 0.5 r_max=0.25", "r_max is given twice: 0.5, 0.25"),
        ("hivtp 2", "r_max=2.0"),
        ("hivtp 0.5 newline=all", "newline says how the model runs"),
    ],
)
def test_a_line_that_is_wrong_changes_nothing(line, message, loaded):
    with prune(loaded("llava-1.5-llama").model, HIVTP(r_max=0.5)) as pruned:
        said = Chat(pruned)
        said.answer(["hiprune", "0.25"])
        with pytest.raises(OptionError, match=message):
            said.answer(line.split())
        assert pruned.method == HiPrune(r_max=0.25)
        said.answer(["hivtp", "0.5"])


def test_none_is_a_chat_with_its_history(chat, checkpoints):
    turns, result = chat(checkpoints("llava-1.5-llama"), "--prune-method none", QUESTIONS[:2])
    assert "pruning off (none)" in result.stderr
    assert "llava-hvp: images encoded unpruned: 2\n" in result.stderr
    assert turns[0]["outputs"]
    assert turns[0]["outputs"] in turns[1]["prompt"]


@pytest.mark.skipif(
    transformers_version() < (4, 46), reason="this transformers refuses to quantise without a GPU"
)
def test_four_bit_with_a_method_that_reads_the_prompt(chat, checkpoints, tmp_path):
    path = shutil.copytree(checkpoints("llava-next-mistral-unfrozen"), tmp_path / "llava-mistral")
    flags = "--load-4bit --prune-method hiprune++ --num-tokens 128"
    turns, result = chat(path, flags, QUESTIONS[:2])
    assert "pruning on: hiprune++ num_tokens=128" in result.stderr
    assert "2 images, kept" in result.stderr
    assert turns[0]["outputs"]
    assert turns[0]["outputs"] in turns[1]["prompt"]
