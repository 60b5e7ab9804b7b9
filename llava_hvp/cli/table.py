"""`llava-hvp table RESULTS`: results of a folder, beside a paper's figures."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_hvp.cli.extras import need
from llava_hvp.cli.parser import add_command
from llava_hvp.console import say
from llava_hvp.errors import OptionError
from llava_hvp.evaluation.compare import compare
from llava_hvp.evaluation.measured import read_results
from llava_hvp.evaluation.plot import plot
from llava_hvp.evaluation.published import TABLES, Table, get_table
from llava_hvp.evaluation.rendering import FORMATS, comparison, listing

EXAMPLES = (
    "llava-hvp table results",
    "llava-hvp table results --against hivtp-1 --format markdown",
)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "table",
        "results of a folder, beside the papers' figures",
        "What is there of `eval` and `reproduce`, with differences to what a paper published.",
        EXAMPLES,
    )
    parser.add_argument("results", type=Path, nargs="?", help="folder of results files")
    parser.add_argument("--against", metavar="NAME", help=f"one of {', '.join(TABLES)}")
    add_as_released(parser)
    parser.add_argument("--model", help="only results of this model")
    parser.add_argument("--format", default=FORMATS[0], help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="with --against")
    parser.set_defaults(main=main)


def add_as_released(parser: argparse.ArgumentParser) -> None:
    """Add the flag --as-released to a parser."""
    have = [name for name in TABLES if get_table(name).as_released]
    parser.add_argument(
        "--as-released",
        action="store_true",
        help=f"prune as the released code, which departs from the paper ({', '.join(have)})",
    )


@dataclass(frozen=True)
class TableSettings:
    """What `llava-hvp table` prints.

    Parameters
    ----------
    results : Path | None
        folder of the results; None for a paper's figures alone
    against : Table | None
        the paper's table; None for the results alone
    as_released : bool
        beside what the paper's released code does
    model : str | None
        only results of this one; None for all
    format : str
        one of FORMATS
    plot : Path | None
        file to draw the comparison into
    """

    results: Path | None
    against: Table | None
    as_released: bool
    model: str | None
    format: str
    plot: Path | None


def parse(args: argparse.Namespace) -> TableSettings:
    """The settings; raises OptionError."""
    if args.format not in FORMATS:
        raise OptionError(f"--format {args.format}: give one of {', '.join(FORMATS)}")
    if args.against is None:
        if args.plot or args.as_released:
            flag = "--plot" if args.plot else "--as-released"
            raise OptionError(f"{flag} goes with --against NAME")
        if args.results is None:
            raise OptionError("give a folder of results, or --against NAME for a paper's figures")
    if args.plot:
        need("plots", "matplotlib")
    return TableSettings(
        results=args.results,
        against=None if args.against is None else get_table(args.against),
        as_released=args.as_released,
        model=args.model,
        format=args.format,
        plot=args.plot,
    )


def run(settings: TableSettings) -> int:
    """Print the table; the exit code."""
    results = [] if settings.results is None else read_results(settings.results, settings.model)
    table = settings.against
    if table is None:
        print(listing(results, settings.format))
        return 0
    compared = compare(table.released(beside=True) if settings.as_released else table, results)
    print(comparison(compared, settings.format))
    if compared.other_model and settings.format == "csv":  # which has no place for it
        say(compared.other_model)
    if settings.plot:
        drawn = table.released(beside=False) if settings.as_released else table
        plot(compare(drawn, results), settings.plot)
    return 0


def main(args: argparse.Namespace) -> int:
    """Parse and run."""
    return run(parse(args))
