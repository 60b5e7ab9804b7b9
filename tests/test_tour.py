"""The notebook of examples/ runs from its first cell to its last, in a kernel of its own."""

import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"


@pytest.fixture(scope="module")
def executed():
    if find_spec("nbclient") is None or find_spec("ipykernel") is None:
        pytest.skip("no Jupyter here: pip install nbclient ipykernel")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": TOUR.parent}}).execute()
    return notebook


def said(executed, word):
    """All that the cells with a word in them printed or gave, and their kinds of output."""
    outputs = [o for c in executed.cells if word in c.source for o in c.get("outputs", ())]
    texts = [o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs]
    return "".join(texts), {kind for o in outputs for kind in o.get("data", ())}


def test_it_comes_without_outputs():
    cells = json.loads(TOUR.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_it_shows_what_its_texts_say(executed):
    text, _ = said(executed, "HIVTP(r_max=0.5)) as pruned")
    assert "72 of 144 tokens (50.0%)" in text
    _, kinds = said(executed, "kept.overlay")
    assert "image/png" in kinds
    text, kinds = said(executed, "class Received")
    assert "of 4" in text
    assert "image/png" in kinds


def test_the_language_model_gets_fewer_tokens_behind_the_drop(executed):
    text, _ = said(executed, "FastV(r_max")
    layers = ast.literal_eval(text.strip().splitlines()[-1])
    assert layers[0] == 72
    assert layers[0] > layers[-1] > 0


def test_methods_are_compared_at_a_quarter(executed):
    text, _ = said(executed, "visionzip")
    *lines, last = text.splitlines()
    assert last.startswith("digits at a twentieth: ")
    rows = dict(line.split(maxsplit=1) for line in lines)
    assert rows.pop("unpruned") == "4 of 4"
    assert len(rows) == 6
    for row in rows.values():
        right, _, _, tokens, _ = row.replace(",", "").split()
        assert 0 <= int(right) <= 4
        assert 0 < int(tokens) <= 36
