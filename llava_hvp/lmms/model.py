"""LLaVA-1.5 and LLaVA-NeXT for lmms-eval, pruned by any method or not at all."""

from __future__ import annotations

import functools
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lmms_eval import utils
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from llava_hvp.checkpoints.before_loading import check_before_loading
from llava_hvp.checkpoints.dtypes import DTYPES, dtype_of
from llava_hvp.console import say
from llava_hvp.errors import LlavaHvpError, OptionError, PrunedStateError
from llava_hvp.evaluation.model_args import pruning_of
from llava_hvp.evaluation.results import precisions, speed, visual_tokens
from llava_hvp.hosts import host_of

# What LLaVA's own generate is given where a task says nothing.
DEFAULTS = {"max_new_tokens": 1024, "temperature": 0, "top_p": None, "num_beams": 1}


def _or_exit(step: Callable[..., Any]) -> Callable[..., Any]:
    """Let an error end the process: lmms-eval prints it, goes on, and exits with 0."""

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except Exception as error:
            if not isinstance(error, LlavaHvpError):
                traceback.print_exc()
            say(f"error: {error}")
            sys.exit(1)

    return wrapper


class LlavaHvp(lmms):
    """Answers `generate_until` tasks; an answer is never cut, as with lmms-eval's own `llava`.

    Parameters are `--model_args`, beside lmms-eval's own `batch_size` and `device`.

    Parameters
    ----------
    pretrained, model_base, conv_template, load_4bit, load_8bit : str | str | None | bool
        as LLaVA's commands take them
    device : str | None
        cuda where there is one, else cpu; with several processes each takes its own GPU
    device_map : str | None
        auto spreads the model over GPUs
    dtype : str | None
        float16, bfloat16 or float32; float16 as LLaVA loads it by default, on a CPU float32
    prune_method, r_max, num_tokens, the options of the method and of Runtime : as `r_max=0.5`;
        items of a tuple are joined by +, as `layers=7+8+9`
    prune_inside : a second method, inside the language model; its options as `inside_r_max=0.5`
    """

    is_simple = True

    @_or_exit
    def __init__(
        self,
        pretrained: str = "liuhaotian/llava-v1.5-7b",
        model_base: str | None = None,
        conv_template: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        load_4bit: bool = False,
        load_8bit: bool = False,
        prune_method: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        pruning = pruning_of(prune_method, options)
        if dtype is not None and dtype not in DTYPES:
            raise OptionError(f"dtype={dtype}: give one of {', '.join(DTYPES)}")
        if load_4bit and load_8bit:
            raise OptionError("load_4bit and load_8bit exclude each other: give one of them")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise OptionError(f"batch_size={batch_size}: give a whole number")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self._device = self._choose_device(device)
        check_before_loading(pretrained, [pruning])
        # LLaVA comes only now: whatever was typed wrong has been said.
        from llava_hvp.checkpoints.opening import open_checkpoint

        self.checkpoint = open_checkpoint(
            pretrained,
            str(self._device),
            base=model_base,
            bits=4 if load_4bit else 8 if load_8bit else None,
            dtype=None if dtype is None else dtype_of(dtype),
            conv_mode=conv_template,
            # One GPU unless asked otherwise, also for device=cuda: each process has its own.
            device_map=device_map or str(self._device),
        )
        if pruning is not None:
            attach = host_of(self.model).attach
            attach(self.model, **pruning.arguments, tokenizer=self.checkpoint.reader)
        elif "llava_hvp" in vars(self.model):
            raise PrunedStateError(
                "the model was loaded pruned, as LLAVA_HVP asks, where unpruned LLaVA was wanted: "
                "unset LLAVA_HVP, or name its method here"
            )
        if self._rank == 0:
            what = f"pruning on: {pruning}"
            if pruning is None or not pruning.prunes:
                what = f"unpruned{'' if pruning is None else f' ({pruning})'}"
            say(f"{what}; {self._world_size} process(es), {self._device}")

    def _choose_device(self, wanted: str | None) -> torch.device:
        if self._world_size > 1:
            return self.accelerator.device
        has_cuda = torch.cuda.is_available()
        device = torch.device(wanted or ("cuda:0" if has_cuda else "cpu"))
        if device.type == "cuda" and not has_cuda:
            raise OptionError(f"device={wanted}: no CUDA on this machine, give device=cpu")
        return device

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._device

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.checkpoint.tokenizer

    @property
    def model(self) -> Any:
        """The LLaVA model."""
        return self.checkpoint.model

    @_or_exit
    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests. An error ends the run."""

        def longest_first(request: tuple[Any, ...]) -> tuple[int, str]:
            return -len(self.tokenizer.encode(request[0], add_special_tokens=False)), request[0]

        answers: list[str] = [""] * len(requests)
        calls: dict[str, list[dict[str, Any]]] = {}
        rows: dict[str, list[int]] = defaultdict(list)
        for row, request in enumerate(requests):
            rows[request.args[4]].append(row)
        bar = tqdm(total=len(requests), disable=self._rank != 0, desc="llava_hvp")
        # Task by task, so that each has its own measurements.
        for task, own in rows.items():
            order = utils.Collator([requests[r].args for r in own], longest_first, grouping=True)
            listed = calls[task] = []
            texts: list[str] = []
            for batch in order.get_batched(n=self.batch_size, batch_fn=None):
                texts += self._answer(batch, functools.partial(_note, calls, listed))
                bar.update(len(batch))
            for row, text in zip(own, order.get_original(texts), strict=True):
                answers[row] = text
        bar.close()
        self._report(calls)
        return answers

    def _answer(
        self, batch: Sequence[tuple[Any, ...]], on_call: Callable[[Any], None]
    ) -> list[str]:
        contexts, wanted, to_visual, doc_ids, tasks, splits = zip(*batch, strict=True)
        images = [
            list(visual(self.task_dict[task][split][doc]) or ())
            for visual, task, split, doc in zip(to_visual, tasks, splits, doc_ids, strict=True)
        ]
        found = self.checkpoint.answer(contexts, images, on_call, **generation_arguments(wanted[0]))
        for context, text in zip(contexts, found, strict=True):
            self.cache_hook.add_partial("generate_until", (context, wanted[0]), text)
        return found

    def _report(self, calls: dict[str, list[dict[str, Any]]]) -> None:
        """Put time to first token and kept tokens, of all processes, into the results."""
        gathered = gather_object([dict(calls)]) if self._world_size > 1 else [dict(calls)]
        by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for each in gathered:
            for task, own in each.items():
                by_task[task] += own
        listed = [call for own in by_task.values() for call in own]
        if not listed:
            return
        metrics = visual_tokens(listed) | speed(listed) | precisions(listed)
        if len(by_task) > 1:
            for task, own in by_task.items():
                metrics |= {f"{task}/{n}": v for n, v in (visual_tokens(own) | speed(own)).items()}
        seconds, tokens = (sum(call[n] for call in listed) for n in ("seconds", "tokens"))
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds,
            additional_metrics={n: v for n, v in metrics.items() if v is not None},
        )

    @_or_exit
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not there: every task of the papers generates."""
        raise NotImplementedError(
            "llava_hvp answers tasks with output_type generate_until only: take a generating "
            "variant of this task"
        )

    @_or_exit
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not there: no task of the papers has rounds."""
        raise NotImplementedError("llava_hvp answers tasks of one round only")


def _note(calls: dict[str, Any], listed: list[dict[str, Any]], call: Any) -> None:
    """Note a measurement; the first of a process is no measure of the method."""
    listed.append({**vars(call), "warmup": not any(calls.values())})


def generation_arguments(wanted: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as LLaVA's own scripts would give them to `generate`."""
    known = {name: wanted.get(name, value) for name, value in DEFAULTS.items()}
    sampling = (known["temperature"] or 0) > 0
    if not sampling:
        known |= {"temperature": None, "top_p": None}
    return {**known, "do_sample": sampling, "use_cache": True}
