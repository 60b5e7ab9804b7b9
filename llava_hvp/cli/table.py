"""`llava-hvp table RESULTS`: results of a folder, beside a paper's figures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llava_hvp.cli.extras import need
from llava_hvp.console import say
from llava_hvp.errors import OptionError
from llava_hvp.evaluation.compare import compare
from llava_hvp.evaluation.measured import read_results
from llava_hvp.evaluation.published import TABLES, get_table
from llava_hvp.evaluation.rendering import FORMATS, comparison, listing, plot


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "table", help="results of a folder, beside the papers' figures", allow_abbrev=False
    )
    parser.add_argument("results", type=Path, nargs="?", help="folder of results files")
    parser.add_argument("--against", metavar="NAME", help=f"one of {', '.join(TABLES)}")
    add_as_released(parser)
    parser.add_argument("--model", help="only results of this model")
    parser.add_argument("--format", default=FORMATS[0], help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="with --against")
    parser.set_defaults(main=main)


def add_as_released(parser: argparse.ArgumentParser) -> None:
    """Add --as-released."""
    have = [name for name in TABLES if get_table(name).as_released]
    parser.add_argument(
        "--as-released",
        action="store_true",
        help=f"prune as the released code, which departs from the paper ({', '.join(have)})",
    )


def main(found: argparse.Namespace) -> int:
    """Print the table; the exit code."""
    if found.format not in FORMATS:
        raise OptionError(f"--format {found.format}: give one of {', '.join(FORMATS)}")
    if found.against is None:
        if found.plot or found.as_released:
            flag = "--plot" if found.plot else "--as-released"
            raise OptionError(f"{flag} goes with --against NAME")
        if found.results is None:
            raise OptionError("give a folder of results, or --against NAME for a paper's figures")
        print(listing(read_results(found.results, found.model), found.format))
        return 0
    if found.plot:
        need("plots", "matplotlib")
    table = get_table(found.against)
    results = [] if found.results is None else read_results(found.results, found.model)
    shown = table.released(beside=True) if found.as_released else table
    compared = compare(shown, results)
    print(comparison(compared, found.format))
    if compared.other_model and found.format == "csv":  # which has no place for it
        say(compared.other_model)
    if found.plot:
        drawn = table.released(beside=False) if found.as_released else table
        plot(compare(drawn, results), found.plot)
    return 0
