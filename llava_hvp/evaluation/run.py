"""One benchmark from its data to its number: check, answer what is missing, score, report."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_hvp import config
from llava_hvp.checkpoints.before_loading import check_before_loading
from llava_hvp.checkpoints.conversation import default_template
from llava_hvp.checkpoints.naming import model_name
from llava_hvp.config import Request
from llava_hvp.console import say
from llava_hvp.errors import EvaluationError, OptionError
from llava_hvp.evaluation import workers
from llava_hvp.evaluation.benchmarks import Benchmark
from llava_hvp.evaluation.data import Data, find_data
from llava_hvp.evaluation.digests import CACHE, digests_of
from llava_hvp.evaluation.files import RESULT
from llava_hvp.evaluation.results import make_result
from llava_hvp.evaluation.scores import score
from llava_hvp.evaluation.settings import (
    is_next,
    method_name,
    settings_of,
)
from llava_hvp.evaluation.store import Store
from llava_hvp.files import write_json, write_whole

# Flags of the stock scripts that the driver has to know about.
OURS = ("--question-file", "--image-folder", "--annotation-file", "--answers-file", "--model-base")
REFUSED = ("--num-chunks", "--chunk-idx")


@dataclass(frozen=True)
class Job:
    """What `llava-hvp eval` was asked to do.

    data, out : folder of the data, folder of the results
    gpus : names of GPUs, a process on each; on a CPU only their number counts
    ocr : whether TextVQA's prompts hold OCR tokens; None for what the model's paper has
    restart : throw answers away that are there
    stock : arguments for the stock script
    """

    benchmark: Benchmark
    model_path: str
    request: Request
    data: Path
    out: Path
    gpus: tuple[str, ...] = ("0",)
    ocr: bool | None = None
    restart: bool = False
    stock: tuple[str, ...] = ()

    @property
    def without_ocr(self) -> bool:
        """TextVQA without OCR tokens: LLaVA-1.6 was measured so, 1.5 with them."""
        if self.benchmark.name != "textvqa":
            return False
        return is_next(self.model_path) if self.ocr is None else not self.ocr

    @property
    def folder(self) -> Path:
        """Where everything of this run lies."""
        name = self.benchmark.name + "-no-ocr" * self.without_ocr
        return self.out / model_name(self.model_path) / method_name(self.request.pruning) / name


def evaluate(job: Job) -> dict[str, Any]:
    """Run to the end, or go on where an earlier run stopped; gives the content of its results file.

    Raises LlavaHvpError. Nothing is loaded and nothing written before the data is complete.
    """
    own, stock = _split(job.stock)
    check_before_loading(job.model_path, [job.request.method])
    data = find_data(
        job.benchmark,
        job.data,
        question_file=own.question_file,
        image_folder=own.image_folder,
        annotation_file=own.annotation_file,
        without_ocr=job.without_ocr,
    )
    stock = [*_defaults(job, stock), *stock]
    settings = settings_of(
        job.benchmark,
        job.request,
        model_path=job.model_path,
        model_base=own.model_base,
        stock=stock,
        questions=data.questions,
        cache=job.out / CACHE,
    )
    store = Store(job.folder, data.questions, all_rounds="--all-rounds" in stock)
    with store.locked():
        if job.restart:
            store.restart()
        store.check_settings(settings)
        store.collect()
        _say_begin(job, store)
        complete = not store.remaining
        try:
            _answer(job, own, stock, data, store)
        finally:
            with contextlib.suppress(EvaluationError):  # the one that is under way says more
                store.collect()
        if store.remaining:
            raise EvaluationError(
                f"{len(store.remaining)} of {len(data.questions)} questions have no answer, though "
                f"every process ended well: see {store.parts}"
            )
        if not complete:
            digests = digests_of(job.model_path, own.model_base, job.out / CACHE)
            store.check_again(settings, digests)
        result = _finish(job, data, store, settings)
    if own.answers_file is not None:
        own.answers_file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(own.answers_file, store.answers_file.read_bytes())
    return result


def _split(stock: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags of the stock script that concern the driver, and those that do not."""
    parser = config.parser()
    for flag in OURS[:-1]:
        parser.add_argument(flag, type=Path)
    parser.add_argument(OURS[-1])
    own, rest = parser.parse_known_args(stock)
    for argument in rest:
        name = argument.partition("=")[0]
        if name in REFUSED:
            raise OptionError(f"{name}: the pieces are cut by --gpus, as --gpus 0,1,2,3")
    return own, rest


def _defaults(job: Job, stock: Sequence[str]) -> list[str]:
    """The flags of LLaVA's own shell script, and the template that fits the checkpoint."""
    given = {argument.partition("=")[0] for argument in stock}
    flags = list(job.benchmark.flags)
    if "--temperature" in given:
        at = flags.index("--temperature")
        del flags[at : at + 2]
    if "--conv-mode" not in given:
        flags += ["--conv-mode", default_template(model_name(job.model_path))]
    return flags


def _say_begin(job: Job, store: Store) -> None:
    pruning = job.request.pruning
    what = "unpruned" if pruning is None else str(pruning)
    say(
        f"{job.benchmark.title}: {len(store.questions)} questions, {len(store.answers)} answered; "
        f"{model_name(job.model_path)}, {what}; {store.folder}"
    )
    if job.benchmark.name == "textvqa":
        say(
            "TextVQA without OCR tokens in its prompts, as LLaVA-1.6 was measured (--ocr for them)"
            if job.without_ocr
            else "TextVQA with OCR tokens in its prompts, as LLaVA-1.5 was measured (--no-ocr "
            "for none)"
        )


def _answer(job: Job, own: argparse.Namespace, stock: list[str], data: Data, store: Store) -> None:
    rows = store.remaining
    if not rows:
        return
    arguments = ["--model-path", job.model_path]
    arguments += ["--model-base", own.model_base] if own.model_base else []
    arguments += ["--image-folder", str(data.images)] if data.images is not None else []
    workers.answer(
        job.benchmark.module,
        data.questions,
        rows,
        store.parts,
        [*arguments, *stock],
        job.request,
        job.gpus,
        done=len(store.answers),
    )


def _finish(job: Job, data: Data, store: Store, settings: dict[str, Any]) -> dict[str, Any]:
    found = score(job.benchmark, data, store)
    notes = list(found.notes)
    if job.benchmark.name == "textvqa":
        notes.append(f"prompts {'without' if job.without_ocr else 'with'} OCR tokens")
    result = make_result(job.benchmark, settings, found, store, notes, command=shlex.join(sys.argv))
    write_json(store.folder / RESULT, result)
    return result
