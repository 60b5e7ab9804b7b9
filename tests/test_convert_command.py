"""`llava-hvp convert`: transformers opens what it writes, LLaVA what it writes back."""

import json
import shutil

import pytest
import torch
from hf_models import needs_release
from llava.conversation import conv_templates

from llava_hvp.checkpoints.chat_templates import TEMPLATES
from llava_hvp.checkpoints.form import is_transformers
from llava_hvp.cli import main
from llava_hvp.files import whole_folder

TURNS = ("What is this?", "A rocket.", "Of what colour?")
KINDS = ["llava-1.5-llama", "llava-1.5-llama-unfrozen", "llava-next-mistral-unfrozen"]


@pytest.fixture
def converted(checkpoints, tmp_path):
    """A function from a name of KINDS to its folder in transformers' form, by the command."""

    def convert(kind, *flags):
        target = tmp_path / f"{kind}-hf"
        assert main(["convert", str(checkpoints(kind)), str(target), *flags]) == 0
        return target

    return convert


@needs_release
@pytest.mark.parametrize("kind", KINDS)
def test_the_auto_classes_open_it_and_llava_opens_it_again(
    kind, converted, checkpoints, photos, tmp_path
):
    from llava.model.builder import load_pretrained_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source, folder = checkpoints(kind), converted(kind)
    assert is_transformers(folder)
    assert not is_transformers(source)
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    said = [{"type": "image", "image": photos[0]}, {"type": "text", "text": TURNS[0]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": said}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 4

    again = tmp_path / f"back-{source.name}"
    assert main(["convert", str(folder), str(again)]) == 0
    model_of = {}
    for path in (source, again):
        model_of[path] = load_pretrained_model(
            str(path), None, path.name, device="cpu", device_map="cpu"
        )[1]
    before, after = (model.state_dict() for model in model_of.values())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # What releases of transformers save of their own accord is opened too.
    saved = tmp_path / "saved-llava-mistral"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    shutil.copyfile(folder / "tokenizer.model", saved / "tokenizer.model")
    third = tmp_path / f"third-{source.name}"
    assert main(["convert", str(saved), str(third)]) == 0
    loaded = load_pretrained_model(str(third), None, source.name, device="cpu", device_map="cpu")
    weights = loaded[1].state_dict()
    assert all(torch.equal(before[n].float(), weights[n].float()) for n in before)


@needs_release
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_chat_template_says_what_llavas_conversation_does(name, converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted(KINDS[0], "--conv-mode", name))
    conversation = conv_templates[name].copy()
    turns = []
    for number, text in enumerate((*TURNS, None)):
        first = number == 0
        conversation.append_message(
            conversation.roles[number % 2], f"<image>\n{text}" if first else text
        )
        image = [{"type": "image"}] if first else []
        role = ("user", "assistant")[number % 2]
        turns.append({"role": role, "content": [*image, {"type": "text", "text": text}]})
    for messages in (turns[:3], [{**turns[0], "content": f"<image>\n{TURNS[0]}"}, *turns[1:3]]):
        found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert found == conversation.get_prompt()


@pytest.mark.parametrize(
    ("kind", "template"),
    [("llava-1.5-llama", "vicuna_v1"), ("llava-next-mistral-unfrozen", "mistral_instruct")],
)
def test_the_template_is_that_of_the_language_model(kind, template, converted):
    assert (converted(kind) / "chat_template.jinja").read_text() == TEMPLATES[template]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("nowhere", "new", "no folder with a config.json"),
        ("bert", "new", "'bert' is no LLaVA checkpoint"),
        ("llava", "full", "is there already"),
        ("llava", "file", "is there already"),
        ("broken", "new", "cannot be converted"),
        ("no-tower", "new", "which is no folder here"),
        ("hf", "plain", "put 'llava' into it"),
        ("hf-mistral", "llava", "put 'mistral' into it"),
        ("v1.6-34b", "new", "chatml_direct, which is none of vicuna_v1, mistral_instruct"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left(
    source, target, message, checkpoints, tmp_path, capsys
):
    work = tmp_path / "work"
    work.mkdir()
    config = {
        "bert": {"model_type": "bert"},
        "hf": {"model_type": "llava", "vision_config": {}},
        "hf-mistral": {
            "model_type": "llava_next",
            "vision_config": {},
            "text_config": {"model_type": "mistral"},
        },
    }
    folder = tmp_path / source
    if source in config:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config[source]))
    elif source != "nowhere":
        shutil.copytree(checkpoints("llava-1.5-llama"), folder)
    if source == "broken":
        next(folder.glob("*.safetensors")).write_bytes(b"half")
    if source == "no-tower":
        changed = json.loads((folder / "config.json").read_text()) | {"mm_vision_tower": "/gone"}
        (folder / "config.json").write_text(json.dumps(changed))
    if target == "full":
        (work / target).mkdir()
        (work / target / "mine").write_text("mine")
    if target == "file":
        (work / target).write_text("mine")
    before = sorted(work.rglob("*"))
    assert main(["convert", str(folder), str(work / target)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert message in errors[-1]
    assert errors[-1].startswith("llava-hvp: error: ")
    assert sorted(work.rglob("*")) == before


@needs_release
def test_a_template_for_llavas_form_is_refused(checkpoints, hf, tmp_path, capsys):
    source = str(hf("llava-1.5-llama").path)
    flags = ["--conv-mode", "vicuna_v1"]
    assert main(["convert", source, str(tmp_path / "llava"), *flags]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_folder_is_there_as_a_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "b"

    def interrupted():
        with whole_folder(target) as half:
            (half / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path == target]
    target.mkdir(parents=True, exist_ok=True)  # empty: as good as none
    with whole_folder(target) as half:
        (half / "file").write_text("whole")
    assert [path.name for path in target.parent.rglob("*")] == ["b", "file"]
