"""Answers that are given, and what a model says of each of their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llava_hvp.checkpoints.checkpoint import Checkpoint


def in_one_pass(opened: Checkpoint, prepared: dict[str, Any], answers: Tensor) -> Tensor:
    """(B, n, V) float32 logits of each token of the answers, given the prompt and those before it.

    One forward pass of the language model, for models that nothing prunes inside it.

    Parameters
    ----------
    prepared : dict[str, Any]
        prompts with their pictures, as `Checkpoint.prepare` gives them; rows of unequal length
        padded on the left
    answers : Tensor
        (B, n) token ids; what follows the end of an answer is of no account
    """
    prompt, mask = prepared["inputs_embeds"], prepared.get("attention_mask")
    embed = opened.model.get_input_embeddings()
    said = embed(answers[:, :-1].to(prompt.device)).to(prompt)
    given: dict[str, Any] = {"inputs_embeds": torch.cat((prompt, said), 1), "use_cache": False}
    if mask is not None and not bool(mask.all()):
        whole = torch.cat((mask.long(), mask.new_ones(said.shape[:2]).long()), 1)
        given["attention_mask"] = whole
        given["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)
    states = opened.decoder(**given).last_hidden_state[:, prompt.shape[1] - 1 :]
    logits: Tensor = opened.head(states)
    return logits.float()


def step_by_step(
    opened: Checkpoint, ids: Tensor, images: Any, sizes: Any, answers: Tensor
) -> Tensor:
    """The same as `in_one_pass` by `generate`, a token at a time.

    For methods inside the language model, which tell a prompt from an answer by that.

    Parameters
    ----------
    ids, images, sizes : Tensor | Any | Any
        as `Checkpoint.generate` takes them
    """
    seen: list[Tensor] = []

    def force(_: Tensor, scores: Tensor) -> Tensor:
        token = answers[:, len(seen)].to(scores.device)
        seen.append(scores.float())
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0)

    opened.generate(
        ids,
        images=images,
        image_sizes=sizes,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=answers.shape[1],
        logits_processor=[force],
    )
    return torch.stack(seen, 1)
