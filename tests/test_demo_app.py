"""`llava-hvp demo-app`: a page in a real headless Chromium, and what goes wrong, in words."""

import socket
import subprocess
import sys
from importlib.util import find_spec

import pytest
from browser import Browser, find_chromium
from evaluation import environment

from llava_hvp.app.cards import cards
from llava_hvp.app.comparing import Answer, answers
from llava_hvp.app.page import responder
from llava_hvp.checkpoints.convert import to_transformers
from llava_hvp.checkpoints.viewer import Viewer
from llava_hvp.cli import main
from llava_hvp.errors import OptionError
from llava_hvp.shapes import checkpoint


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("shapes"))


# --- in a browser ---


@pytest.fixture(scope="module")
def address():
    """The page of the shipped checkpoint, as the command serves it."""
    if find_spec("gradio") is None:
        pytest.skip("no gradio here: pip install '.[app]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llava_hvp", "demo-app", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--methods", "hivtp,fastv", "--r-max", "0.25", "--port", str(port)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    told = []
    for line in process.stderr:
        told.append(line)
        if "open http" in line:
            break
    assert f"open http://127.0.0.1:{port}/" in told[-1], told
    yield f"http://127.0.0.1:{port}/"
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def page(address, tmp_path_factory):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium (.ci/run does)")
    browser = Browser(chromium, tmp_path_factory.mktemp("profile"))
    browser.visit(address)
    browser.wait("document.querySelector('#compare') !== null")
    yield browser
    browser.close()


def press_compare(page):
    page.eval("document.querySelector('#compare').click()")


def test_without_a_picture_the_page_says_so(page):
    press_compare(page)
    page.wait("document.querySelector('#answers [role=alert]') !== null")
    assert page.text("answers").strip().startswith("There is no picture: drop one")


def test_an_example_is_answered_unpruned_and_pruned_side_by_side(page, address):
    page.wait("document.querySelectorAll('tr.tr-body').length === 4")
    page.eval("document.querySelector('tr.tr-body').click()")
    page.wait("document.querySelector('#picture img') !== null")
    page.wait("document.querySelector('#question textarea, #question input').value.endsWith('?')")
    press_compare(page)
    page.wait("document.querySelectorAll('.hvp-card').length === 3")
    page.wait("document.querySelector('#answers [role=status]') === null")
    headings = page.eval("[...document.querySelectorAll('.hvp-card h3')].map((h) => h.innerText)")
    assert headings == ["unpruned", "hivtp r_max=0.25", "fastv r_max=0.25"]
    facts = page.eval("[...document.querySelectorAll('.facts')].map((f) => f.innerText)")
    assert facts[0].startswith("144 of 144 visual tokens (100%)")
    assert facts[1].startswith("36 of 144 visual tokens (25%)")
    assert all("x unpruned), " in line for line in facts[1:])
    said = page.eval("[...document.querySelectorAll('.said')].map((s) => s.innerText)")
    assert said[0] == said[1] == "Yes"
    loaded = "[...document.querySelectorAll('.hvp-card img')].filter((i) => i.naturalWidth > 100)"
    page.wait(f"{loaded}.length === 3")
    assert page.problems == []
    elsewhere = [to for to in page.requests if not to.startswith((address, "data:", "blob:"))]
    assert elsewhere == []


# --- without one ---


@pytest.mark.parametrize("form", ["LLaVA's", "transformers'"])
def test_what_one_method_cannot_do_leaves_the_others_their_answers(form, shapes, photos, tmp_path):
    path = shapes if form == "LLaVA's" else to_transformers(shapes, tmp_path / "llava-shapes-hf")
    viewer = Viewer.load(str(path), None, "cpu", bits=None)
    found = list(answers(viewer, photos[0], "Is there a star?", ["fastv", "hivtp"], [0.05, 0.5], 2))
    assert [answer.label for answer in found if not answer.error] == [
        "unpruned", "fastv r_max=0.5", "hivtp r_max=0.05", "hivtp r_max=0.5",
    ]  # fmt: skip
    (refused,) = [answer for answer in found if answer.error]
    assert (refused.label, refused.error[:20]) == ("fastv r_max=0.05", "fastv: r_max=0.05 ca")
    assert 0 < found[-2].tokens <= 7
    assert found[-1].tokens == 72
    assert all(answer.drawn is not None for answer in found if not answer.error)


def test_errors_become_a_line_and_no_markup_of_others_gets_through(capsys):
    def fails(error):
        def ask(*given):
            yield Answer("unpruned", "<b>yes</b>", 1.0, 144.0, 144)
            raise error

        return list(responder(ask)(None, "", [], []))

    first, last = fails(OptionError("no <i>picture</i>"))
    assert "&lt;b&gt;yes&lt;/b&gt;" in first
    assert last == '<p class="hvp-error" role="alert">no &lt;i&gt;picture&lt;/i&gt;</p>'
    assert capsys.readouterr().err == ""
    *_, last = fails(RuntimeError("out of memory"))
    assert "RuntimeError: out of memory" in last
    assert "Traceback" not in last
    assert "Traceback" in capsys.readouterr().err  # for whoever serves the page


def test_an_answer_that_is_another_is_said_to_be():
    unpruned = Answer("unpruned", "Yes", 2.0, 144.0, 144)
    page = cards([unpruned, Answer("hivtp r_max=0.5", "No", 1.0, 72.0, 144)], waiting=1)
    assert "72 of 144 visual tokens (50%), 1.00 s (0.50 x unpruned), another answer" in page
    assert "1 more to come" in page


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--port 0", "--port 0: give one from 1 to 65535"),
        ("--methods hivtq", "unknown method 'hivtq'"),
        ("--r-max 2", "r_max=2"),
        ("--model-path /nowhere/llava", "--model-path /nowhere/llava: no such folder"),
    ],
)
def test_what_is_wrong_is_refused_in_a_line(flags, told, capsys, monkeypatch):
    monkeypatch.setattr("llava_hvp.cli.demo_app.need", lambda *names: None)
    assert main(["demo-app", "--device", "cpu", *flags.split()]) == 2
    assert told in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo-app"]) == 2
    assert "gradio is missing: pip install 'llava-hvp[app]'" in capsys.readouterr().err
