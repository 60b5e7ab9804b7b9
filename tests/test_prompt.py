"""The prompt in the conversation, and how related patches are to it."""

import logging

import pytest
import torch
from llava.conversation import SeparatorStyle, conv_templates
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from llava_hvp import HiPrunePlus, prune
from llava_hvp.encoder.text import ClipText, cosine_relevance
from llava_hvp.hosts.llava.host import attach
from llava_hvp.hosts.llava.prompt import IMAGE_MARKS, read_prompt, rows_of_images, templates
from llava_hvp.pruning.turns import last_user_turn

QUESTION = "Is there a red car, or a USER manual?"
CHATS = {name: t for name, t in conv_templates.items() if t.sep_style != SeparatorStyle.PLAIN}


def turn(text):
    return last_user_turn(text, templates(), IMAGE_MARKS)


def conversation(template, *turns):
    chat = template.copy()
    chat.messages = []
    for number, turn in enumerate(turns):
        chat.append_message(chat.roles[number % 2], turn)
    chat.append_message(chat.roles[len(turns) % 2], None)
    return chat.get_prompt()


@pytest.mark.parametrize("name", CHATS)
def test_last_user_turn_in_every_template(name):
    one = conversation(CHATS[name], "<image>\n" + QUESTION)
    assert turn(one) == QUESTION
    several = conversation(CHATS[name], "<image>\nWho?", "Nobody, I think.", QUESTION)
    assert turn(several) == QUESTION


@pytest.mark.parametrize("name", ["vicuna_v1", "mistral_instruct", "chatml_direct", "v0_mmtag"])
def test_a_message_that_quotes_a_role_stays_whole(name):
    template = CHATS[name]
    marks = {SeparatorStyle.MPT: template.roles[1].strip(), SeparatorStyle.LLAMA_2: "[/INST]"}
    mark = marks.get(template.sep_style, template.roles[1] + ":")
    question = f"What does {mark} mean here?"
    assert turn(conversation(template, "<image>\n" + question)) == question


def test_special_tokens_decoded_with_a_space_after_them():
    text = (
        "<|im_start|> system\nAnswer.<|im_end|> <|im_start|> user\n<image>\nWhat is it?<|im_end|>"
    )
    assert turn(text + " <|im_start|> assistant\n") == "What is it?"


def test_special_tokens_that_are_role_marks(loaded):
    """As in LLaVA-1.6-34B, whose tokenizer has the marks of its template as special tokens."""
    from transformers import AutoTokenizer

    bundle = loaded("llava-1.5-llama")
    tokenizer = AutoTokenizer.from_pretrained(bundle.path, use_fast=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    text = conversation(CHATS["chatml_direct"], "What is this?", "A cup.", "What colour is it?")
    ids = torch.tensor(tokenizer(text).input_ids)
    assert read_prompt(ids, tokenizer) == "What colour is it?"


def test_text_in_no_template_is_the_prompt():
    assert turn("<image>\nA cat on a mat") == "A cat on a mat"


def test_training_text_with_its_answer():
    text = conversation(CHATS["vicuna_v1"], "<image>\n" + QUESTION) + " No, there is not.</s>"
    assert turn(text) == QUESTION


def test_prompt_from_ids(loaded):
    bundle = loaded("llava-1.5-llama")
    assert read_prompt(bundle.ids("What is this?")[0], bundle.tokenizer) == "What is this?"
    two = bundle.ids("Which is larger?", images=2)[0]
    assert read_prompt(two, bundle.tokenizer) == "Which is larger?"


@pytest.mark.parametrize("kind", ["llava-1.5-llama", "llava-next-mistral-unfrozen"])
def test_clip_relevance_is_the_cosine_in_clips_own_space(kind, loaded, photos):
    bundle = loaded(kind)
    tower = bundle.model.get_vision_tower()
    prompt = "Is there a rocket on the ground?"
    clip = CLIPModel.from_pretrained(tower.vision_tower_name)
    ids = CLIPTokenizer.from_pretrained(tower.vision_tower_name)(prompt, return_tensors="pt")
    with torch.no_grad():
        features = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
        text = clip.text_projection(clip.text_model(**ids).pooler_output)
        vit = getattr(tower.vision_tower, "vision_model", tower.vision_tower)
        patches = clip.visual_projection(vit.post_layernorm(features))
        expected = functional.cosine_similarity(patches, text[:, None], dim=-1)
    with prune(bundle.model, HiPrunePlus(r_max=0.5)) as pruned:
        ours = pruned.relevance((1,), [bundle.ids(prompt)[0]])(features)
    assert torch.allclose(ours, expected, atol=1e-6)


def test_long_prompts_are_chunked_and_averaged(loaded):
    tower = loaded("llava-1.5-llama").model.get_vision_tower()
    clip = ClipText.load(tower.vision_tower_name)
    words = "what is the colour of the third cup on the left " * 12
    ids = clip.tokenizer(words, add_special_tokens=False)["input_ids"]
    assert len(ids) > 2 * 75
    start, end = clip.tokenizer.bos_token_id, clip.tokenizer.eos_token_id
    chunks = [[start, *ids[at : at + 75], end] for at in range(0, len(ids), 75)]
    assert max(map(len, chunks)) == 77
    with torch.no_grad():
        embeddings = [
            clip.text_projection(clip.encoder(input_ids=torch.tensor([c])).pooler_output)
            for c in chunks
        ]
    assert torch.allclose(clip.embed(words), torch.cat(embeddings).mean(0), atol=1e-6)


def test_long_prompts_bring_no_warning_and_leave_transformers_its_own(loaded, monkeypatch):
    clip = ClipText.load(loaded("llava-1.5-llama").model.get_vision_tower().vision_tower_name)
    logger = logging.getLogger("transformers.tokenization_utils_base")
    before, said = list(logger.filters), []
    monkeypatch.setattr(logger, "handle", lambda record: said.append(record.getMessage()))
    words = "what is the colour of the third cup on the left " * 12
    clip.embed(words)
    assert said == []
    assert logger.filters == before
    clip.tokenizer(words)
    assert any("sequence length is longer than" in message for message in said)


def test_llm_relevance_compares_with_the_prompts_input_embeddings(loaded):
    bundle = loaded("llava-1.5-llama")
    model = bundle.model.get_model()
    features = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    ids = bundle.tokenizer("What is this?", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        mean = model.embed_tokens(torch.tensor(ids)).mean(0)
        expected = functional.cosine_similarity(model.mm_projector(features), mean, dim=-1)
    with prune(bundle.model, HiPrunePlus(r_max=0.5, text="llm")) as pruned:
        rows = [bundle.ids("What is this?")[0]] * 2
        ours = pruned.relevance((1, 1), rows)(features)
    assert torch.allclose(ours, expected, atol=1e-6)


def test_each_image_meets_its_own_rows_prompt():
    """A row with two images, and one without, for which LLaVA wants an image all the same."""
    rows = [torch.tensor([1, -200, 5]), torch.tensor([1, 9]), torch.tensor([1, -200, 6, -200, 7])]
    given = rows_of_images(rows, 4)
    assert [row[-1].item() for row in given] == [5, 9, 7, 7]


def test_the_question_decides_what_is_kept(loaded, photos):
    bundle = loaded("llava-1.5-336")
    roles = []
    with prune(bundle.model, HiPrunePlus(num_tokens=100)) as pruned:
        for question in ("Is there a rocket?", "Is there a rocket?", "What is written at the top?"):
            bundle.embeds(bundle.ids(question), bundle.pixels(photos[0]), None)
            roles.append(pruned.last[0].selection.roles)
    assert torch.equal(roles[0]["text"], roles[1]["text"])
    assert not torch.equal(roles[0]["text"], roles[2]["text"])
    assert torch.equal(roles[0]["anchor"], roles[2]["anchor"])


def test_relevance_is_a_cosine():
    patches = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]])
    assert torch.allclose(
        cosine_relevance(patches, torch.tensor([[2.0, 0.0]])), torch.tensor([[1.0, 0, -1]])
    )


def test_a_clip_encoder_at_hand_is_left_alone_by_what_reads_the_language_model(loaded):
    """As `show` has one, after a method that compares with CLIP's text."""
    bundle = loaded("llava-1.5-llama")
    rows, features = [bundle.ids(QUESTION)[0]], torch.randn(1, 64, 64)
    method = HiPrunePlus(r_max=0.5, text="llm")
    with prune(bundle.model, method) as pruned:
        expected = pruned.relevance((1,), rows)(features)
    clip = ClipText.load(bundle.model.get_vision_tower().vision_tower_name)
    with attach(bundle.model, method, clip_text=clip) as pruned:
        assert torch.equal(pruned.relevance((1,), rows)(features), expected)
