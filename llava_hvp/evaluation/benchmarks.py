"""The benchmarks: which stock script answers one, on which files, and what its number is."""

from __future__ import annotations

from dataclasses import dataclass

from llava_hvp.errors import OptionError

JSONL, JSON, TSV = "jsonl", "json", "tsv"
GREEDY = ("--temperature", "0")
# Where the files come from: a section of LLaVA's docs/Evaluation.md.
GUIDE = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of LLaVA's evaluation; all paths are relative to the data folder.

    name, title : on the command line, in sentences
    section : of LLaVA's Evaluation.md
    module : the stock script
    questions : places of the question file, in the order in which they are looked for
    format : of the question file
    images : folder of the pictures; None where the question file holds them
    scoring : name -> places of a file or folder that the scorer needs
    extras : the same, for what is used if it is there
    flags : of the stock shell script
    metric : the number that is reported
    pictures : images of the published split, for estimates
    """

    name: str
    title: str
    section: str
    module: str
    questions: tuple[str, ...]
    format: str
    images: str | None
    scoring: dict[str, tuple[str, ...]]
    extras: dict[str, tuple[str, ...]]
    flags: tuple[str, ...]
    metric: str
    pictures: int


def _loader(
    name: str,
    title: str,
    questions: str,
    images: str,
    metric: str,
    pictures: int,
    *,
    section: str = "",
    scoring: dict[str, tuple[str, ...]] | None = None,
    extras: dict[str, tuple[str, ...]] | None = None,
) -> Benchmark:
    return Benchmark(
        name,
        title,
        section or title,
        "llava.eval.model_vqa_loader",
        (questions,),
        JSONL,
        images,
        scoring or {},
        extras or {},
        GREEDY,
        metric,
        pictures,
    )


def _mmbench(name: str, title: str, file: str, pictures: int, *flags: str) -> Benchmark:
    # Evaluation.md has the Chinese file in mmbench/, the stock script looks in mmbench_cn/.
    folders = dict.fromkeys((name, "mmbench"))
    return Benchmark(
        name,
        title,
        title,
        "llava.eval.model_vqa_mmbench",
        tuple(f"{folder}/{file}" for folder in folders),
        TSV,
        None,
        {},
        {},
        (*flags, "--single-pred-prompt", *GREEDY),
        "circular_accuracy",
        pictures,
    )


_GQA = "testdev_balanced_questions.json"
_ALL = (
    _loader(
        "mme",
        "MME",
        "MME/llava_mme.jsonl",
        "MME/MME_Benchmark_release_version",
        "perception",
        2374,
        extras={"calculation": ("MME/eval_tool/calculation.py",)},
    ),
    _loader(
        "pope",
        "POPE",
        "pope/llava_pope_test.jsonl",
        "pope/val2014",
        "f1",
        8910,
        scoring={"annotations": ("pope/coco",)},
    ),
    _loader(
        "textvqa",
        "TextVQA",
        "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        "textvqa/train_images",
        "accuracy",
        5000,
        scoring={"annotations": ("textvqa/TextVQA_0.5.1_val.json",)},
    ),
    _mmbench("mmbench", "MMBench", "mmbench_dev_20230712.tsv", 4377),
    _mmbench("mmbench_cn", "MMBench-CN", "mmbench_dev_cn_20231003.tsv", 4329, "--lang", "cn"),
    Benchmark(
        "scienceqa",
        "ScienceQA",
        "ScienceQA",
        "llava.eval.model_vqa_science",
        ("scienceqa/llava_test_CQM-A.json",),
        JSON,
        "scienceqa/images/test",
        {
            "splits": ("scienceqa/pid_splits.json",),
            "problems": ("scienceqa/problems.json",),
        },
        {},
        ("--single-pred-prompt", *GREEDY),
        "image_accuracy",
        2017,
    ),
    _loader(
        "gqa",
        "GQA",
        "gqa/llava_gqa_testdev_balanced.jsonl",
        "gqa/data/images",
        "accuracy",
        12578,
        scoring={
            "questions": tuple(f"gqa/data/{d}{_GQA}" for d in ("", "questions1.2/", "questions/"))
        },
        extras={"eval": ("gqa/data/eval/eval.py", "gqa/data/eval.py")},
    ),
    _loader(
        "vqav2",
        "VQAv2",
        "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
        "vqav2/test2015",
        "accuracy",
        107394,
        scoring={"upload": ("vqav2/llava_vqav2_mscoco_test2015.jsonl",)},
    ),
    _loader(
        "vizwiz",
        "VizWiz",
        "vizwiz/llava_test.jsonl",
        "vizwiz/test",
        "accuracy",
        8000,
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
