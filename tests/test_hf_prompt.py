"""transformers' own LLaVA: which text each image is asked with, and where its CLIP comes from."""

import contextlib
import copy
import sys

import pytest
import torch
from hf_models import needs_release, sized

from llava_hvp import get_method, prune
from llava_hvp.encoder.text import ClipText
from llava_hvp.errors import TextEncoderError
from llava_hvp.hosts.hf import loading
from llava_hvp.hosts.hf.prompt import KNOWN, marks_of
from llava_hvp.pruning.monkeypatch import MonkeyPatcher
from llava_hvp.pruning.turns import Marks, last_user_turn
from llava_hvp.runtime import PruningConfig

pytestmark = needs_release
ASKED = "What is on the left of the cup?"
# As the published checkpoints' templates have a second turn; {} is where the question stands.
CONVERSATIONS = {
    "1.5": "USER: <image>\nHi there ASSISTANT: Hello. USER: {} ASSISTANT:",
    "vicuna": "A chat between a user and an assistant. USER: <image>\n{} ASSISTANT:",
    "vicuna, turns": "A chat. USER: <image>\nHi ASSISTANT: Hello.</s>USER: {} ASSISTANT:",
    "mistral": "<s>[INST] <image>\nHi [/INST] Hello.</s> [INST] {} [/INST]",
    "llama-2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n{} [/INST]",
    "34b": "<|im_start|>system\nAnswer.<|im_end|><|im_start|>user\n<image>\n{}<|im_end|>"
    "<|im_start|>assistant\n",
    "qwen, slow": "<|im_start|> user\n{}<|im_end|> <|im_start|> assistant\n",
    "llama-3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "v0": "A chat.###Human: <image>\n{}###Assistant:",
    "none": "{}",
}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<q>{{ m.content[0].text }}</q>"
    "{% else %}<a>{{ m.content[0].text }}</a>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_last_user_turn_of_published_templates(name):
    turn = last_user_turn(CONVERSATIONS[name].format(ASKED), KNOWN)
    assert turn.replace("<image>", "").strip() == ASKED


def test_a_message_that_quotes_a_mark_stays_whole():
    text = "USER: Who says ASSISTANT: here? ASSISTANT:"
    assert last_user_turn(text, KNOWN) == "Who says ASSISTANT: here?"


def test_marks_of_a_template_nobody_knows(hf):
    tokenizer = copy.deepcopy(hf("llava-1.5-llama").processor.tokenizer)
    tokenizer.chat_template = None
    assert marks_of(tokenizer) == ()
    marks = marks_of(tokenizer, TEMPLATE)
    assert marks == (Marks("<q>", "</q><a>"),)
    text = f"<q>Hi</q><a>Hello.</a><q>{ASKED}</q><a>"
    assert last_user_turn(text, marks) == ASKED
    assert marks_of(tokenizer, "{{ raise_exception('no') }}") == ()
    assert marks_of(tokenizer, "nothing of it") == ()


def test_the_converted_checkpoints_own_template_is_read(hf):
    processor = hf("llava-next-llama").processor
    (found,) = marks_of(processor.tokenizer, processor.chat_template)
    assert (found.user, found.answer) == ("USER:", "ASSISTANT:")


@pytest.mark.parametrize("kind", ["llava-1.5-llama", "llava-next-llama"])
def test_each_image_is_asked_what_its_row_asks_last(kind, hf, photos, checkpoints, monkeypatch):
    bundle, asked = hf(kind), []
    embed = ClipText.embed

    def spy(clip, prompt):
        asked.append(prompt)
        return embed(clip, prompt)

    monkeypatch.setattr(ClipText, "embed", spy)
    texts = [
        "USER: <image>\nWhat is this? ASSISTANT:",
        "USER: <image> and <image>\nHi ASSISTANT: Hello. USER: Which is larger? ASSISTANT:",
        "USER: No picture here. ASSISTANT:",
    ]
    inputs = bundle.inputs(texts, sized(photos))
    clip = checkpoints(kind).parent / "clip-112"
    method = get_method("cdpruner", num_tokens=30)
    with prune(bundle.model, method, clip_text=clip) as pruned:
        bundle.generate(inputs)
        together = [report.selection.keep for report in pruned.last]
        assert asked == ["What is this?", "Which is larger?", "Which is larger?"]
        alone = bundle.inputs(texts[:1], sized(photos)[:1])
        bundle.logits(alone)
        assert torch.equal(pruned.last[0].selection.keep, together[0])
        bundle.logits(bundle.inputs("USER: <image>\nWhere is it? ASSISTANT:", photos[:1]))
        assert not torch.equal(pruned.last[0].selection.keep, together[0])
        with pytest.raises(TextEncoderError, match="no text"):
            bundle.logits(bundle.inputs("USER: <image>\n ASSISTANT:", photos[:1]))
        with pytest.raises(TextEncoderError, match="call the model"):
            bundle.model.get_image_features(
                **{k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
            )


@pytest.mark.parametrize("given", ["nothing", "tokenizer", "processor"])
def test_tokenizer_and_processor_are_equally_good(given, hf, photos):
    bundle = hf("llava-next-llama")
    tokenizer = {
        "nothing": None,
        "tokenizer": bundle.processor.tokenizer,
        "processor": bundle.processor,
    }[given]
    inputs = bundle.ask("Where is the cup?", pictures=photos[:1])
    with prune(bundle.model, get_method("mmtok", num_tokens=40), tokenizer=tokenizer) as pruned:
        bundle.logits(inputs)
        keep = pruned.last[0].selection.keep
        assert pruned.host_model.prompts([inputs["input_ids"][0]], 1, pruned.tokenizer) == [
            "Where is the cup?"
        ]
    with prune(bundle.model, get_method("mmtok", num_tokens=40)) as pruned:
        bundle.logits(inputs)
        assert torch.equal(pruned.last[0].selection.keep, keep)


def test_without_a_tokenizer_the_remedy_is_named(hf):
    own = hf("llava-1.5-llama").own()
    own.model.config._name_or_path = "/nowhere"
    with pytest.raises(TextEncoderError, match="tokenizer=processor"):
        prune(own.model, get_method("mmtok", num_tokens=40))


def test_a_tower_of_the_published_shape_is_known(monkeypatch):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    text = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = CLIPVisionConfig(**shape, image_size=336, patch_size=14, intermediate_size=64)
    with torch.device("meta"):
        model = Llava(LlavaConfig(vision_config=vision, text_config=text))
    names = []

    def load(name):
        names.append(name)
        raise TextEncoderError("offline")

    monkeypatch.setattr(ClipText, "load", load)
    with pytest.raises(TextEncoderError, match="offline"):
        prune(model, get_method("cdpruner", r_max=0.5), tokenizer=object())
    assert names == ["openai/clip-vit-large-patch14-336"]


def test_the_flags_name_the_clip_of_whatever_is_loaded(hf, photos, checkpoints, monkeypatch):
    bundle = hf("llava-1.5-llama")
    kind, clip = type(bundle.model), checkpoints("llava-1.5-llama").parent / "clip-112"
    config = copy.deepcopy(bundle.model.config)
    del config.clip_checkpoint  # as of a checkpoint that we did not convert
    inputs = bundle.ask(ASKED, pictures=photos[:1])
    with prune(bundle.model, get_method("cdpruner", r_max=0.25)) as pruned:
        bundle.logits(inputs)
        expected = pruned.last[0].selection.keep
    for options in ({"clip_text": str(clip)}, {}):
        pruning, patches = PruningConfig.of("cdpruner", r_max=0.25, **options), MonkeyPatcher()
        with contextlib.ExitStack() as stack:
            stack.callback(patches.undo)
            loading.install(
                patches,
                sys.modules[kind.__module__],
                pruning,
                before=lambda: None,
                on_model=lambda pruning: None,
                on_unpruned=pytest.fail,
                on_images=pytest.fail,
            )
            if not options:
                with pytest.raises(TextEncoderError, match="--prune-opt clip_text="):
                    kind.from_pretrained(bundle.path, config=config)
                continue
            model = kind.from_pretrained(bundle.path, config=config, dtype=torch.float32).eval()
            with torch.no_grad():
                model(**inputs)
            assert torch.equal(model.llava_hvp.last[0].selection.keep, expected)


def test_a_clip_of_another_width_is_refused(hf, tmp_path):
    from llava_hvp.testing import make_clip

    clip = make_clip(tmp_path / "clip", hidden_size=32, image_size=112, layers=2)
    bundle = hf("llava-1.5-llama")
    with pytest.raises(TextEncoderError, match="32 wide, and the model's is 64"):
        prune(bundle.model, get_method("cdpruner", r_max=0.5), clip_text=clip)
    assert "llava_hvp" not in vars(bundle.model)
