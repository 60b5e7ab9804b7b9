"""One benchmark from its data to its number: check, answer what is missing, score, report."""

from __future__ import annotations

import contextlib
import shlex
import sys
from typing import Any

from llava_hvp.checkpoints.before_loading import check_before_loading, check_llavas_form
from llava_hvp.checkpoints.naming import model_name
from llava_hvp.console import say
from llava_hvp.errors import EvaluationError
from llava_hvp.evaluation import workers
from llava_hvp.evaluation.data import Data, find_data
from llava_hvp.evaluation.digests import CACHE, digests_of
from llava_hvp.evaluation.files import RESULT
from llava_hvp.evaluation.job import Job
from llava_hvp.evaluation.results import make_result
from llava_hvp.evaluation.scores import score
from llava_hvp.evaluation.settings import settings_of
from llava_hvp.evaluation.store import Store
from llava_hvp.files import write_json, write_whole


def evaluate(job: Job) -> dict[str, Any]:
    """Run to the end, or go on where an earlier run stopped; gives the content of its results file.

    Raises LlavaHvpError. Nothing is loaded and nothing written before the data is complete.
    """
    flags = job.flags
    check_llavas_form(job.model_path)
    check_before_loading(job.model_path, [job.request.pruning])
    data = find_data(
        job.benchmark,
        job.data,
        question_file=flags.question_file,
        image_folder=flags.image_folder,
        annotation_file=flags.annotation_file,
        without_ocr=job.without_ocr,
    )
    settings = settings_of(
        job.benchmark,
        job.request,
        model_path=job.model_path,
        model_base=flags.model_base,
        stock=flags.rest,
        questions=data.questions,
        cache=job.out / CACHE,
    )
    store = Store(job.folder, data.questions, all_rounds="--all-rounds" in flags.rest)
    with store.locked():
        if job.restart:
            store.restart()
        store.check_settings(settings)
        store.collect()
        _say_begin(job, store)
        if store.remaining:
            _answer(job, data, store)
            digests = digests_of(job.model_path, flags.model_base, job.out / CACHE)
            store.check_again(settings, digests)
        result = _finish(job, data, store, settings)
    if flags.answers_file is not None:
        flags.answers_file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(flags.answers_file, store.answers_file.read_bytes())
    return result


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


def _answer(job: Job, data: Data, store: Store) -> None:
    """Have what is missing answered; raises EvaluationError where some of it is not."""
    try:
        workers.answer(job, store, data.images)
    finally:
        with contextlib.suppress(EvaluationError):  # the one that is under way says more
            store.collect()
    if store.remaining:
        raise EvaluationError(
            f"{len(store.remaining)} of {len(data.questions)} questions have no answer, though "
            f"every process ended well: see {store.parts}"
        )


def _finish(job: Job, data: Data, store: Store, settings: dict[str, Any]) -> dict[str, Any]:
    found = score(job.benchmark, data, store)
    notes = list(found.notes)
    if job.benchmark.name == "textvqa":
        notes.append(f"prompts {'without' if job.without_ocr else 'with'} OCR tokens")
    result = make_result(job.benchmark, settings, found, store, notes, command=shlex.join(sys.argv))
    write_json(store.folder / RESULT, result)
    return result
