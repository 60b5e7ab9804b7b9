"""How far a pruned model moves the answers of the unpruned one, which are the only labels here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_hvp.checkpoints.forced import in_one_pass, step_by_step
from llava_hvp.checkpoints.variants import Variant
from llava_hvp.encoder.vit import read_geometry
from llava_hvp.errors import EvaluationError
from llava_hvp.methods.base import Needs
from llava_hvp.pruning.shared import SharedRuns, together
from llava_hvp.runtime import PruningConfig
from llava_hvp.tune.questions import Sheet

if TYPE_CHECKING:
    from llava_hvp.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class Moved:
    """What one candidate did to the answers of a sheet.

    Parameters
    ----------
    kl : list[float]
        of each question: the Kullback-Leibler divergence of the pruned model's next token from the
        unpruned one's, in nats, summed over the unpruned answer's tokens
    same : list[bool]
        whether every token of the answer would be chosen again, greedily
    kept : float
        visual tokens of all images that enter a layer of the language model, averaged over all
    kept_of_patches : float
        sum over images of kept patches / (N x tiles)
    """

    kl: list[float]
    same: list[bool]
    kept: float
    kept_of_patches: float


class Answered:
    """The unpruned model's answers to a sheet, and what candidates make of them.

    Parameters
    ----------
    unpruned : Variant
        with the tiling and packing that the candidates have
    new_tokens : int
        of an answer, at most
    """

    def __init__(
        self, opened: Checkpoint, sheet: Sheet, unpruned: Variant, new_tokens: int
    ) -> None:
        self.opened, self.sheet, self.unpruned = opened, sheet, unpruned
        pictures = sheet.pictures()
        self.images = opened.images(pictures, unpruned)
        self.sizes = [picture.size for picture in pictures]
        self.answers, self.counts = self._said(new_tokens)
        self._references: dict[bool, Tensor] = {}

    def _said(self, new_tokens: int) -> tuple[Tensor, Tensor]:
        """(B, n) tokens of the answers, n the longest, and (B,) how many count of each."""
        steps: list[int] = []

        def count(_: Tensor, scores: Tensor) -> Tensor:
            steps.append(1)
            return scores

        with self.opened.pruned_by(self.unpruned), torch.inference_mode():
            said = self.opened.generate(
                self.sheet.ids,
                images=self.images,
                image_sizes=self.sizes,
                do_sample=False,
                num_beams=1,
                max_new_tokens=new_tokens,
                use_cache=True,
                logits_processor=[count],
            )
        # Older transformers puts a token that nobody generated before those of an embedded prompt.
        return _until_end(said[:, said.shape[1] - len(steps) :], _ends(self.opened))

    def moved_by(self, candidates: Sequence[PruningConfig]) -> Iterator[Moved]:
        """Of every candidate in its turn; the tower runs once for all of them that read it."""
        runs = SharedRuns(together([self._needs(each) for each in candidates]))
        for candidate in candidates:
            reference = self._reference(candidate.inside is not None)
            found, reports = self._logits(Variant(candidate), runs, candidate.inside is not None)
            yield self._compared(reference, found.log_softmax(-1), reports)

    def _needs(self, candidate: PruningConfig) -> Needs:
        geometry = read_geometry(self.opened.vit)
        feature_layer = geometry.normalised(self.opened.select_layer)
        return candidate.method.needs(geometry.depth, feature_layer)

    def _reference(self, stepwise: bool) -> Tensor:
        """(B, n, V) log probabilities of the unpruned model, by the candidate's own way."""
        if stepwise not in self._references:
            found, _ = self._logits(self.unpruned, SharedRuns(), stepwise)
            self._references[stepwise] = found.log_softmax(-1)
        return self._references[stepwise]

    @torch.inference_mode()
    def _logits(self, variant: Variant, runs: SharedRuns, stepwise: bool) -> tuple[Tensor, Any]:
        opened, ids = self.opened, self.sheet.ids
        with opened.pruned_by(variant) as pruning:
            if stepwise:
                found = step_by_step(opened, ids, self.images, self.sizes, self.answers)
            elif pruning is None:
                prepared = opened.prepare(ids, self.images, self.sizes)
                found = in_one_pass(opened, prepared, self.answers)
            else:
                with runs.on(pruning.host_model.encoder):
                    prepared = opened.prepare(ids, self.images, self.sizes)
                found = in_one_pass(opened, prepared, self.answers)
            return found, [] if pruning is None else pruning.last

    def _compared(self, reference: Tensor, found: Tensor, reports: Sequence[Any]) -> Moved:
        """Raises EvaluationError for logits that are not finite."""
        steps = torch.arange(reference.shape[1], device=reference.device)
        counted = steps < self.counts.to(steps.device)[:, None]
        kl = (reference.exp() * (reference - found)).sum(-1).masked_fill(~counted, 0).sum(1)
        if not bool(kl.isfinite().all()):
            raise EvaluationError(
                "the model's logits are not finite, pruned or unpruned: load it in bfloat16 or "
                "float32"
            )
        same = ((reference.argmax(-1) == found.argmax(-1)) | ~counted).all(1)
        return Moved(
            # Rounding may leave a sum of nothing a little below it.
            kl.clamp(min=0).tolist(),
            same.tolist(),
            sum(report.average_tokens for report in reports),
            sum(report.average_of_patches for report in reports),
        )


def _ends(opened: Checkpoint) -> list[int]:
    """Ids of tokens that end an answer."""
    ends = opened.model.generation_config.eos_token_id
    ends = opened.tokenizer.eos_token_id if ends is None else ends
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


def _until_end(said: Tensor, ends: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(B, n) answers, n the longest, and (B,) tokens of each, its end included."""
    is_end = torch.isin(said, torch.tensor(list(ends), device=said.device))
    before = (is_end.long().cumsum(1) - is_end.long()) == 0
    counts = before.sum(1)
    return said[:, : int(counts.max())], counts
