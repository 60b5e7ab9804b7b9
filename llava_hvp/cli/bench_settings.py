"""What `llava-hvp bench` measures: its flags as settings, checked with nothing loaded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from llava_hvp.bench import subject
from llava_hvp.checkpoints.before_loading import check_before_loading, check_inside
from llava_hvp.checkpoints.dtypes import dtype_of
from llava_hvp.checkpoints.geometry import get_geometry, list_geometries
from llava_hvp.checkpoints.naming import named_path
from llava_hvp.checkpoints.variants import Variant, variants, with_tuned
from llava_hvp.cli.arguments import (
    at_least,
    bits_of,
    budgets,
    check_folder,
    device_of,
    exclude,
    listed,
    tuned_of,
    whole,
)
from llava_hvp.cli.extras import can_plot, need
from llava_hvp.errors import OptionError
from llava_hvp.hosts.hf.versions import check_release
from llava_hvp.lazy import torch
from llava_hvp.methods import NONE
from llava_hvp.options import unpruned

BUDGETS = "0.75,0.5,0.4,0.25"  # of r_max
METHODS = "none,hivtp,hiprune,random"


@dataclass(frozen=True)
class BenchSettings:
    """What `llava-hvp bench` measures, and how often.

    Parameters
    ----------
    geometry, model_path : str | None
        a published shape with random weights, or a checkpoint; one is None
    hosts : tuple[str, ...]
        whose classes random weights are of
    bits : int | None
        4 or 8 to quantise
    tower_dtype : torch.dtype | None
        of random weights; None as LLaVA's scripts leave the tower
    variants : tuple[Variant, ...]
        what is compared; the first is unpruned
    all_attentions : bool
        each method that reads the encoder also as the released codes do it
    image_size : tuple[int, int]
        (width, height) of the pattern that is shown where `image_file` is None
    batches : tuple[int, ...]
        prompts at a time
    text_tokens : int
        of the prompt of random weights; `prompt` is a checkpoint's
    max_seconds : float
        shared by the batches
    processor_time : bool
        count what this process computes in place of the time that passes
    out : Path | None
        folder of the results
    plots : bool
        whether a plot can be drawn there
    """

    geometry: str | None
    hosts: tuple[str, ...]
    model_path: str | None
    model_base: str | None
    conv_mode: str | None
    bits: int | None
    device: str
    dtype: torch.dtype
    tower_dtype: torch.dtype | None
    variants: tuple[Variant, ...]
    all_attentions: bool
    image_file: str | None
    image_size: tuple[int, int]
    batches: tuple[int, ...]
    prompt: str
    text_tokens: int
    new_tokens: int
    rounds: int
    max_seconds: float
    processor_time: bool
    seed: int
    out: Path | None
    plots: bool


def parse(args: argparse.Namespace) -> BenchSettings:
    """The settings; raises OptionError or LayerError for what is wrong, with nothing loaded."""
    from llava_hvp.bench.measure import FEWEST

    _check_subject(args)
    bits = bits_of(args)
    exclude(args, "image_file", "image_size")
    for name, least in (("rounds", FEWEST), ("new_tokens", 1), ("text_tokens", 2)):
        at_least(args, name, least)
    if not args.max_seconds > 0:
        raise OptionError(f"--max-seconds {args.max_seconds}: give a time above 0")
    check_folder(args.out)
    need("bench", "PIL", "sentencepiece", "google.protobuf")
    device = device_of(args.device)
    half = bits is not None or torch.device(device).type == "cuda"
    settings = BenchSettings(
        geometry=args.geometry,
        hosts=_hosts(args),
        model_path=None if args.model_path is None else named_path(args.model_path),
        model_base=args.model_base,
        conv_mode=args.conv_mode,
        bits=bits,
        device=device,
        dtype=dtype_of(args.dtype or ("float16" if half else "float32")),
        tower_dtype=dtype_of(args.tower_dtype) if args.tower_dtype else None,
        batches=tuple(listed(args.batch, whole, "--batch")),
        variants=compared(args),
        all_attentions=args.all_attentions,
        image_file=args.image_file,
        image_size=_size(args.image_size or "640x480"),
        prompt=args.prompt,
        text_tokens=args.text_tokens,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        max_seconds=args.max_seconds,
        processor_time=args.processor_time,
        seed=args.seed,
        out=args.out,
        plots=args.out is not None and can_plot(),
    )
    _check_tower(settings)
    if settings.processor_time and (device != "cpu" or torch.get_num_threads() > 1):
        raise OptionError(
            f"--processor-time on {device} with {torch.get_num_threads()} threads: it is that of "
            "all threads of a CPU, so give --device cpu, and OMP_NUM_THREADS=1 before the command"
        )
    if settings.geometry is not None:
        layers = get_geometry(settings.geometry).language.layers
        for variant in settings.variants:
            check_inside(variant.pruning, layers)
    if settings.model_path is not None:
        check_before_loading(settings.model_path, [v.pruning for v in settings.variants])
    return settings


def _check_subject(args: argparse.Namespace) -> None:
    """Raise OptionError unless one model is asked for."""
    if (args.geometry is None) == (args.model_path is None):
        raise OptionError(
            "give --geometry NAME (random weights) or --model-path, one of them: geometries are "
            + ", ".join(list_geometries())
        )
    if args.geometry is not None:
        get_geometry(args.geometry)
    elif args.tower_dtype:
        raise OptionError("--tower-dtype goes with --geometry: a checkpoint's tower is as loaded")


def _hosts(args: argparse.Namespace) -> tuple[str, ...]:
    """Raises OptionError for unknown ones, UnsupportedVersionError on releases without them."""
    if args.host is None:
        return subject.HOSTS[:1]
    if args.model_path is not None:
        raise OptionError(f"--host {args.host} goes with --geometry: a checkpoint's form decides")
    hosts = tuple(args.host.split(","))
    if len(set(hosts)) < len(hosts) or not set(hosts) <= set(subject.HOSTS):
        raise OptionError(f"--host {args.host}: give one or both of {','.join(subject.HOSTS)}")
    if "transformers" in hosts:
        check_release()
    return hosts


def _check_tower(settings: BenchSettings) -> None:
    """Raise OptionError for a tower in another dtype than transformers' classes run it in."""
    asked = settings.tower_dtype
    if "transformers" in settings.hosts and asked not in (None, settings.dtype):
        raise OptionError(
            f"--tower-dtype {str(asked).removeprefix('torch.')}: --host transformers has the tower "
            f"in {str(settings.dtype).removeprefix('torch.')}, as all of the model: leave it out, "
            "or give that as --dtype"
        )


def compared(args: argparse.Namespace) -> tuple[Variant, ...]:
    """What is compared; the first is LLaVA's own code alone, whose packing is the checkpoint's."""
    tuned = tuned_of(args)
    names = args.methods or (METHODS if tuned is None else NONE)
    given = variants(names.split(","), budgets(args, BUDGETS), args.prune_opt or ())
    chosen = with_tuned(given, tuned)
    alone = unpruned({"tiling": chosen[0].runtime.tiling})
    return (Variant(alone), *chosen[1:])


def _size(text: str) -> tuple[int, int]:
    """(width, height); raises OptionError."""
    try:
        width, height = (whole(part) for part in text.lower().split("x"))
    except ValueError:
        raise OptionError(f"--image-size {text}: give WIDTHxHEIGHT, as 672x672") from None
    return width, height
