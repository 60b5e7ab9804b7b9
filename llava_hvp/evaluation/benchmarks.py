"""The benchmarks: which stock script answers one, on which files, and what its number is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llava_hvp.errors import OptionError

JSONL, JSON, TSV = "jsonl", "json", "tsv"
Flags = tuple[str, ...]
GREEDY = ("--temperature", "0")
# Where the files come from: a section of LLaVA's docs/Evaluation.md.
GUIDE = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark of LLaVA's evaluation; all paths are relative to the data folder.

    Parameters
    ----------
    name, title : str
        on the command line, in sentences
    section : str
        of LLaVA's Evaluation.md
    module : str
        the stock script
    questions : tuple[str, ...]
        places of the question file, in the order in which they are looked for
    format : str
        of the question file
    images : str | None
        folder of the pictures; None where the question file holds them
    scoring : dict[str, tuple[str, ...]]
        name -> places of a file or folder that the scorer needs
    extras : dict[str, tuple[str, ...]]
        the same, for what is used if it is there
    flags : tuple[str, ...]
        of the stock shell script
    metric : str
        the number that is reported
    pictures : int
        images of the published split, for estimates
    """

    name: str
    title: str
    section: str
    module: str
    questions: tuple[str, ...]
    format: str
    images: str | None
    scoring: dict[str, tuple[str, ...]] = field(default_factory=dict)
    extras: dict[str, tuple[str, ...]] = field(default_factory=dict)
    flags: tuple[str, ...]
    metric: str
    pictures: int


def _loader(*, title: str, questions: str, section: str = "", **rest: Any) -> Benchmark:
    """One that model_vqa_loader answers."""
    return Benchmark(
        title=title,
        section=section or title,
        module="llava.eval.model_vqa_loader",
        questions=(questions,),
        format=JSONL,
        flags=GREEDY,
        **rest,
    )


def _mmbench(*, name: str, title: str, file: str, pictures: int, flags: Flags = ()) -> Benchmark:
    # Evaluation.md has the Chinese file in mmbench/, the stock script looks in mmbench_cn/.
    folders = dict.fromkeys((name, "mmbench"))
    return Benchmark(
        name=name,
        title=title,
        section=title,
        module="llava.eval.model_vqa_mmbench",
        questions=tuple(f"{folder}/{file}" for folder in folders),
        format=TSV,
        images=None,
        flags=(*flags, "--single-pred-prompt", *GREEDY),
        metric="circular_accuracy",
        pictures=pictures,
    )


_GQA = "testdev_balanced_questions.json"
_ALL = (
    _loader(
        name="mme",
        title="MME",
        questions="MME/llava_mme.jsonl",
        images="MME/MME_Benchmark_release_version",
        metric="perception",
        pictures=2374,
        extras={"calculation": ("MME/eval_tool/calculation.py",)},
    ),
    _loader(
        name="pope",
        title="POPE",
        questions="pope/llava_pope_test.jsonl",
        images="pope/val2014",
        metric="f1",
        pictures=8910,
        scoring={"annotations": ("pope/coco",)},
    ),
    _loader(
        name="textvqa",
        title="TextVQA",
        questions="textvqa/llava_textvqa_val_v051_ocr.jsonl",
        images="textvqa/train_images",
        metric="accuracy",
        pictures=5000,
        scoring={"annotations": ("textvqa/TextVQA_0.5.1_val.json",)},
    ),
    _mmbench(name="mmbench", title="MMBench", file="mmbench_dev_20230712.tsv", pictures=4377),
    _mmbench(
        name="mmbench_cn",
        title="MMBench-CN",
        file="mmbench_dev_cn_20231003.tsv",
        pictures=4329,
        flags=("--lang", "cn"),
    ),
    Benchmark(
        name="scienceqa",
        title="ScienceQA",
        section="ScienceQA",
        module="llava.eval.model_vqa_science",
        questions=("scienceqa/llava_test_CQM-A.json",),
        format=JSON,
        images="scienceqa/images/test",
        scoring={
            "splits": ("scienceqa/pid_splits.json",),
            "problems": ("scienceqa/problems.json",),
        },
        flags=("--single-pred-prompt", *GREEDY),
        metric="image_accuracy",
        pictures=2017,
    ),
    _loader(
        name="gqa",
        title="GQA",
        questions="gqa/llava_gqa_testdev_balanced.jsonl",
        images="gqa/data/images",
        metric="accuracy",
        pictures=12578,
        scoring={
            "questions": tuple(f"gqa/data/{d}{_GQA}" for d in ("", "questions1.2/", "questions/"))
        },
        extras={"eval": ("gqa/data/eval/eval.py", "gqa/data/eval.py")},
    ),
    _loader(
        name="vqav2",
        title="VQAv2",
        questions="vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
        images="vqav2/test2015",
        metric="accuracy",
        pictures=107394,
        scoring={"upload": ("vqav2/llava_vqav2_mscoco_test2015.jsonl",)},
    ),
    _loader(
        name="vizwiz",
        title="VizWiz",
        questions="vizwiz/llava_test.jsonl",
        images="vizwiz/test",
        metric="accuracy",
        pictures=8000,
        section="VisWiz",  # as the file spells it
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
THROUGH_LMMS = ("ocrbench", "ai2d")


def get_benchmark(name: str) -> Benchmark:
    """Raises OptionError, which names those that there are."""
    if name in THROUGH_LMMS:
        raise OptionError(
            f"LLaVA has no script for {name!r}: run it through lmms-eval, as "
            f"lmms-eval --model llava_hvp --model_args pretrained=… --tasks {name}"
        )
    if name not in BENCHMARKS:
        raise OptionError(f"unknown benchmark {name!r}: give one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
