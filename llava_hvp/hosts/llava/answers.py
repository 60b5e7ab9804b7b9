"""LLaVA's own way of comparing short answers: its port of the VQA evaluation."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from llava.eval.m4c_evaluator import EvalAIAnswerProcessor, TextVQAAccuracyEvaluator


def normalise(text: str) -> str:
    """An answer as the VQA servers compare it: lower case, no articles, digits for numbers."""
    return str(_processor()(text))


@functools.cache
def _processor() -> EvalAIAnswerProcessor:
    return EvalAIAnswerProcessor()


def accuracy(pairs: Sequence[tuple[str, list[str]]]) -> float:
    """Mean VQA accuracy of (answer, ten human answers)."""
    listed = [{"pred_answer": text, "gt_answers": truths} for text, truths in pairs]
    return float(TextVQAAccuracyEvaluator().eval_pred_list(listed))
