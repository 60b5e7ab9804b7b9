"""Tokenizers of tiny checkpoints: a Llama sentencepiece model and a CLIP byte-level BPE."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

from llava_hvp.testing.weights import write_json

LLAMA_VOCAB_SIZE = 512
# <unk>, <s>, </s> and the 256 bytes of the byte fallback come before the first piece of text.
LLAMA_FIRST_TEXT_ID = 259
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_MAX_LENGTH = 77

# What a prompt to LLaVA holds (the system sentence, roles, questions, short answers), so that
# a prompt is tens of tokens long and not one token a byte.
_TEXT = """\
A chat between a curious human and an artificial intelligence assistant.
The assistant gives helpful, detailed, and polite answers to the human's questions.
A chat between a curious user and an artificial intelligence assistant.
USER: What is this? ASSISTANT: This is a photo of a dog on the grass.
USER: Describe the image in detail. ASSISTANT: The image shows a street with cars and people.
USER: Is there a cat in the image? ASSISTANT: No, there is no cat.
USER: How many birds are there? ASSISTANT: There are three birds on the water.
Answer the question using a single word or phrase.
Answer with the option's letter from the given choices directly.
Is there a person in the picture? Please answer yes or no. Yes. No.
What color is the car behind the tree? The car is red. The tree is green.
What is written on the sign? The sign says stop.
Where is the cup of coffee? It is on the table next to the book.
Who is standing on the left side of the picture? A woman with a white helmet.
What is the man doing? He is riding a horse along the beach.
Which animal is larger, the one on the left or the one on the right?
Why is the person ironing clothes on top of a moving car?
What are the things I should be cautious about when I visit this place?
The photo was taken at night, and the lights of the city shine over the river.
A small boat is near the wooden pier, and the mountains are far behind the lake.
Reference OCR token: A, B, C, D, E. Context: N/A. Options: (A) one (B) two (C) three (D) four.
The numbers on the clock are 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 12.
"""


def write_llama_tokenizer(
    folder: Path, *, model_max_length: int, text: str = _TEXT, vocab_size: int = LLAMA_VOCAB_SIZE
) -> None:
    """Write a slow Llama tokenizer (``tokenizer.model`` and two JSON files) into ``folder``.

    Its pieces are learned from ``text``.
    """
    (folder / "tokenizer.model").write_bytes(_llama_model(text, vocab_size))
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json",
        {
            **{
                name: {
                    "__type": "AddedToken",
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                }
                for name, token in specials.items()
            },
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            # With False the fast tokenizer of transformers 4.37 splits what follows a special
            # token otherwise than the slow one.
            "legacy": True,
            "model_max_length": model_max_length,
            "pad_token": "<unk>",
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        },
    )
    write_json(folder / "special_tokens_map.json", {**specials, "pad_token": "<unk>"})


def write_clip_tokenizer(folder: Path, *, text: str = _TEXT) -> int:
    """Write a CLIP tokenizer into ``folder``; return its vocabulary size (the end token's id + 1).

    The end token has the highest id: the text encoder's old rule (argmax of the ids) and its new
    one (first ``eos_token_id``) then pool the same position.
    """
    symbols = _byte_symbols()
    merges = _word_merges(text)
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += ["".join(pair) for pair in merges]
    tokens += [CLIP_START, CLIP_END]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    specials = {
        "bos_token": CLIP_START,
        "eos_token": CLIP_END,
        "pad_token": CLIP_END,
        "unk_token": CLIP_END,
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            **specials,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": CLIP_MAX_LENGTH,
            "tokenizer_class": "CLIPTokenizer",
        },
    )
    write_json(folder / "special_tokens_map.json", specials)
    return len(tokens)


@lru_cache(maxsize=2)
def _llama_model(text: str, vocab_size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    # The options Llama's own tokenizer was trained with.
    SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _byte_symbols() -> list[str]:
    """One printable character for each byte, in the order of OpenAI's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _word_merges(text: str) -> list[tuple[str, str]]:
    """Merges that build each word of the text from left to right."""
    merges: dict[tuple[str, str], None] = {}
    for word in text.lower().split():
        if not (word.isascii() and word.isalpha()):
            continue
        left = word[0]
        for position, letter in enumerate(word[1:], start=1):
            right = letter + "</w>" if position == len(word) - 1 else letter
            merges[left, right] = None
            left += right
    return list(merges)
