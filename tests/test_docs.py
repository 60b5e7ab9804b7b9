"""The pages tell the truth of today: flags, methods, options, names, files."""

import argparse
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

import llava_hvp
from llava_hvp.config import add_flags

ROOT = Path(llava_hvp.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
OURS = [
    n
    for n in llava_hvp.list_methods()
    if type(llava_hvp.get_method(n)).__module__[:9] == "llava_hvp"
]


def test_the_commands_page_names_every_flag():
    page = (DOCS / "commands.md").read_text()
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser, device=True)
    for flag in parser._option_string_actions:
        assert f"| `{flag}`" in page


@pytest.mark.parametrize("name", OURS)
def test_the_methods_page_has_every_method_with_its_options(name):
    page = (DOCS / "methods.md").read_text()
    assert f"| `{name}` |" in page
    for kind in (llava_hvp.get_method(name), llava_hvp.Runtime):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in page, field.name


@pytest.mark.parametrize("name", OURS)
def test_the_readme_names_every_method(name):
    assert f"`{name}`" in (ROOT / "README.md").read_text()


def test_the_readme_is_short_and_begins_with_a_picture_and_results():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    first = [
        next(n for n, line in enumerate(lines) if line.startswith(what)) for what in ("![", "|")
    ]
    assert first == sorted(first)
    assert first[1] < 25
    # Whose figure each is.
    table = [line for line in lines[first[1] + 2 :][:4] if line.startswith("|")]
    assert len(table) == 4
    assert all(line.startswith(("| **published**", "| **measured here**")) for line in table)


def test_both_papers_are_cited_with_all_their_authors():
    cited = (ROOT / "CITATION.cff").read_text()
    (bibtex,) = re.findall(r"```bibtex\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for title in re.findall(r'title: "(H[^"]+)"', cited):
        assert title in bibtex
    for name in re.findall(r"family-names: (\w+)", cited):
        assert f"{name}, " in bibtex


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_names_lead_somewhere(page):
    text = page.read_text()
    paths = (f.relative_to(ROOT).with_suffix("").parts for f in (ROOT / "llava_hvp").rglob("*.py"))
    modules = {".".join(p for p in path if p != "__init__") for path in paths}
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    for name in re.findall(r"llava_hvp(?:\.\w+)+", text):
        if name.endswith((".pth", ".start", ".methods", ".last")):
            continue
        parts = name.split(".")
        # As far as it is modules, and then attributes.
        count = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules)
        found = importlib.import_module(".".join(parts[:count]))
        for part in parts[count:]:
            assert hasattr(found, part), f"{page.name}: {name}"
            found = getattr(found, part)


def test_files_that_the_pages_name_are_there():
    for page in (ROOT / "tests" / "README.md", DOCS / "architecture.md", ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"\btest_\w+\.py\b", page.read_text()):
            assert (ROOT / "tests" / name).exists(), f"{page.name}: {name}"
    listed = (ROOT / "tests" / "README.md").read_text()
    for file in (ROOT / "tests").glob("test_*.py"):
        assert file.name in listed, f"tests/README.md does not name {file.name}"
