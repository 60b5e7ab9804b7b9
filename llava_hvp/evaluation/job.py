"""What a run of a benchmark is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llava_hvp import config
from llava_hvp.checkpoints.conversation import default_template
from llava_hvp.checkpoints.naming import model_name
from llava_hvp.config import Request
from llava_hvp.errors import OptionError
from llava_hvp.evaluation.benchmarks import Benchmark
from llava_hvp.evaluation.settings import is_next, method_name

# Flags of the stock scripts that the driver has to know about, the last one of text.
PATHS = ("--question-file", "--image-folder", "--annotation-file", "--answers-file")
REFUSED = ("--num-chunks", "--chunk-idx")


@dataclass(frozen=True)
class StockFlags:
    """The arguments for a stock script, those that concern the driver sorted out.

    Parameters
    ----------
    question_file, image_folder, annotation_file : Path | None
        instead of the data folder's own
    answers_file : Path | None
        where the answers are wanted as well
    model_base : str | None
        as LLaVA's commands take it
    rest : tuple[str, ...]
        all others, after the flags of LLaVA's own shell script
    """

    question_file: Path | None
    image_folder: Path | None
    annotation_file: Path | None
    answers_file: Path | None
    model_base: str | None
    rest: tuple[str, ...]

    @classmethod
    def of(cls, arguments: Sequence[str], benchmark: Benchmark, template: str) -> StockFlags:
        """Raises OptionError for what is the driver's own to say.

        Parameters
        ----------
        template : str
            of the conversation, where the arguments name none
        """
        parser = config.parser()
        for flag in PATHS:
            parser.add_argument(flag, type=Path)
        parser.add_argument("--model-base")
        args, rest = parser.parse_known_args(arguments)
        given = {argument.partition("=")[0] for argument in rest}
        for name in REFUSED:
            if name in given:
                raise OptionError(f"{name}: the pieces are cut by --gpus, as --gpus 0,1,2,3")
        flags = list(benchmark.flags)
        if "--temperature" in given:
            at = flags.index("--temperature")
            del flags[at : at + 2]
        if "--conv-mode" not in given:
            flags += ["--conv-mode", template]
        return cls(**vars(args), rest=(*flags, *rest))


@dataclass(frozen=True)
class Job:
    """What `llava-hvp eval` was asked to do.

    Parameters
    ----------
    data, out : Path
        folder of the data, folder of the results
    gpus : tuple[str, ...]
        names of GPUs, a process on each; on a CPU only their number counts
    ocr : bool | None
        whether TextVQA's prompts hold OCR tokens; None for what the model's paper has
    restart : bool
        throw answers away that are there
    stock : tuple[str, ...]
        arguments for the stock script
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

    @cached_property
    def flags(self) -> StockFlags:
        """`stock` sorted out, with the template that fits the checkpoint; raises OptionError."""
        template = default_template(model_name(self.model_path))
        return StockFlags.of(self.stock, self.benchmark, template)

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
