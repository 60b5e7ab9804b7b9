"""The page of `llava-hvp show`, opened from disk in a real headless Chromium."""

import base64
import json
import re

import pytest
from browser import Browser, find_chromium

from llava_hvp.cli import main

NASTY = "</script><img src=x onerror=alert(1)> {{DATA}} & “quoted”"
BUDGETS = "0.75,0.5,0.25"


@pytest.fixture(scope="module")
def page(checkpoints, photos, tmp_path_factory):
    """A page with answers, of a photo whose name and prompt would break out of a careless one."""
    folder = tmp_path_factory.mktemp("page")
    name = NASTY.replace("/", "_")
    photos[0].save(folder / f"{name}.png")
    arguments = ["--model-path", str(checkpoints("llava-next-llama")), "--r-max", BUDGETS]
    arguments += ["--image-file", str(folder / f"{name}.png"), "--prompt", NASTY]
    arguments += ["--methods", "hivtp,hiprune", "--new-tokens", "4", "--device", "cpu"]
    assert main(["show", *arguments, "--html", str(folder / "page.html")]) == 0
    return folder / "page.html"


@pytest.fixture(scope="module")
def data(page):
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text()
    )
    return json.loads(text)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium (.ci/run does)")
    browser = Browser(chromium, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, page):
    browser.open(page)
    yield browser
    assert browser.problems == []


def budget_of(data, method, label):
    (found,) = (m for m in data["methods"] if m["name"] == method)
    (budget,) = (b for b in found["budgets"] if b["label"] == label)
    return budget


def shows(browser, data, method, label):
    """Whether status, key and answer are those of a method and budget."""
    budget = budget_of(data, method, label)
    kept = f"{method}, {label}: {budget['kept']} of {budget['stock']} tokens kept"
    counts = [f"{n} {c}" for n, c in budget["counts"].items() if n != "cut"]
    return (
        browser.text("status").startswith(kept)
        and all(count in browser.text("key") for count in counts)
        and browser.text("answer").split() == budget["answer"].split()
    )


def test_it_is_one_small_file_that_asks_for_nothing(page, opened):
    assert page.stat().st_size < 5 * 2**20
    assert all(u.startswith(("file:", "data:")) for u in opened.requests), opened.requests
    assert sum(u.startswith("file:") for u in opened.requests) == 1
    assert "://" not in page.read_text()


def test_foreign_text_stays_text(opened):
    assert opened.text("prompt") == NASTY
    assert opened.eval("document.querySelectorAll('img').length") == 0
    assert opened.eval("data.prompt") == NASTY
    assert NASTY.replace("/", "_") in opened.eval("document.title")


def test_the_policy_lets_no_other_script_run(browser, page):
    browser.open(page)
    browser.eval(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.bad = 1';"
        "document.body.append(s) })()"
    )
    assert browser.eval("window.bad === undefined")
    assert any("Content Security Policy" in str(problem) for problem in browser.problems)


def test_the_policy_lets_nothing_be_fetched(browser, page):
    browser.open(page)
    browser.eval("void fetch('https://example.invalid/a').catch(() => { window.refused = true })")
    browser.wait("window.refused")
    browser.eval("void (new Image().src = 'https://example.invalid/b.png')")
    told = [str(problem) for problem in browser.problems]
    assert any("example.invalid/a" in x and "Content Security Policy" in x for x in told)
    assert any("example.invalid/b" in x and "Content Security Policy" in x for x in told)


def test_the_slider_changes_counts_and_answer_by_keyboard(opened, data):
    opened.eval("document.getElementById('budget').focus()")
    assert shows(opened, data, "hivtp", "r_max 0.5")
    opened.press("ArrowRight")
    assert shows(opened, data, "hivtp", "r_max 0.25")
    assert opened.eval("document.getElementById('budget').getAttribute('aria-valuetext')") == (
        "r_max 0.25"
    )
    opened.press("Home")
    assert shows(opened, data, "hivtp", "r_max 0.75")
    assert opened.eval("document.querySelector('tr[aria-current] th').innerText") == "r_max 0.75"
    assert opened.text("unpruned").split() == data["unpruned"].split()


def test_the_slider_moves_by_mouse(opened, data):
    left, top, width, height = opened.box("document.getElementById('budget')")
    opened.mouse(left + width - 4, top + height / 2, click=True)
    assert shows(opened, data, "hivtp", "r_max 0.25")


def test_the_method_is_switched_by_keyboard(opened, data):
    opened.eval("document.querySelector('input[name=method]').focus()")
    opened.press("ArrowRight")
    assert shows(opened, data, "hiprune", "r_max 0.5")


def test_everything_is_reached_by_tab(opened):
    opened.eval("document.activeElement.blur()")
    reached = []
    for _ in range(6):
        opened.press("Tab")
        here = "document.activeElement"
        reached.append(opened.eval(f"{here}.name || {here}.id || {here}.tagName"))
        assert opened.eval(f"getComputedStyle({here}).outlineStyle") == "solid"
    assert reached == ["method", "budget", "show", "CANVAS", "CANVAS", "scale"]


def pixel(browser, panel, row, column, inside=0.5, of="canvas"):
    """The canvas's colour `inside` a patch, as shares of its side, [r, g, b]."""
    return browser.eval(
        # On a copy: Chromium warns of canvases that are read often.
        f"(() => {{ const p = panels[{panel}], copy = layerOf(p.{of}, p.{of});"
        f"const at = (i) => Math.floor((i + {inside}) * p.step), context = copy.getContext('2d');"
        f"return [...context.getImageData(at({column}), at({row}), 1, 1).data].slice(0, 3) }})()"
    )


def test_the_canvas_has_the_colours_of_the_states(opened, data):
    """Against the states in the file, read here and not by the page's own code."""
    method = data["methods"][0]
    states = base64.b64decode(budget_of(data, "hivtp", "r_max 0.5")["states"])
    seen = set()
    for number, panel in enumerate(data["panels"]):
        raw = base64.b64decode(panel["patches"])
        for row in range(0, panel["rows"], 3):
            for column in range(panel["columns"]):
                at = 4 * (row * panel["columns"] + column)
                state = states[int.from_bytes(raw[at : at + 4], "little")]
                shown = pixel(opened, number, row, column)
                seen.add(state)
                if state == data["cut"]:
                    assert shown in ([250] * 3, [222] * 3)
                elif state == 0:
                    assert len(set(shown)) == 1
                    assert shown[0] <= 0.36 * 255
                else:
                    assert shown == pixel(opened, number, row, column, of="photo")
                    corner = pixel(opened, number, row, column, inside=0.01)
                    # The first row and column of a panel border on no patch.
                    if row == 0 or column == 0:
                        assert corner == method["roles"][state - 1]["colour"]
    assert seen == {0, 1, 2, data["cut"]}


def test_a_patch_tells_its_score_and_role(opened, data):
    left, top, width, height = opened.box("panels[0].canvas")
    panel = data["panels"][0]
    row, column = 2, 5
    opened.mouse(
        left + width * (column + 0.5) / panel["columns"], top + height * (row + 0.5) / panel["rows"]
    )
    told = opened.text("patch")
    patch = row * panel["columns"] + column
    state = base64.b64decode(budget_of(data, "hivtp", "r_max 0.5")["states"])[patch]
    fate = "pruned" if state == 0 else f"kept: {data['methods'][0]['roles'][state - 1]['name']}"
    assert told.startswith(f"row 3, column 6 of the base tile (tile 0): {fate}. Received attention")
    for number in data["methods"][0]["layers"]:
        (layer,) = (x for x in data["layers"] if x["layer"] == number)
        levels = base64.b64decode(layer["levels"])
        level = int.from_bytes(levels[2 * patch : 2 * patch + 2], "little")
        value = layer["least"] + (layer["most"] - layer["least"]) * level / 65535
        assert f"layer {number}: {value:.2f} times the even share" in told


def test_patches_are_walked_by_arrow_keys(opened, data):
    opened.eval("panels[1].canvas.focus()")
    opened.press("ArrowRight")
    middle = data["panels"][1]["rows"] // 2 + 1
    assert opened.text("patch").startswith(f"row {middle}, column ")
    opened.press("ArrowUp")
    assert opened.text("patch").startswith(f"row {middle - 1}, column ")
    for _ in range(30):
        opened.press("ArrowUp")
    assert opened.text("patch").startswith("row 1, column ")


def test_a_layer_is_shown_large_on_either_scale(opened):
    before = pixel(opened, 0, 0, 0)
    opened.eval("document.querySelectorAll('#thumbs button')[3].click()")
    number = opened.eval("data.layers[3].layer")
    assert f"layer {number}" in opened.text("bar")
    own = opened.text("most")
    assert pixel(opened, 0, 0, 0) != before
    opened.eval("document.querySelector('input[name=scale][value=shared]').click()")
    assert opened.text("most") != own
    assert opened.eval("document.querySelectorAll('#thumbs [aria-pressed=true]').length") == 1


def test_a_screen_reader_finds_names(opened):
    names = opened.names()
    roles = {role for role, _ in names}
    assert {"slider", "radio", "status", "heading", "main"} <= roles
    assert all(name for role, name in names if role in ("slider", "radio", "button", "application"))
    assert ("slider", "Budget, fewer patches to the right") in names


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [375, 1280])
def test_it_fits_phone_and_desktop_light_and_dark(browser, page, tmp_path, width, dark):
    browser.open(page, width=width, dark=dark)
    assert browser.eval("document.documentElement.scrollWidth") <= width
    paper = browser.eval("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(23, 23, 27)") == dark
    smallest = browser.eval(
        "Math.min(...panels.map((p) => p.canvas.getBoundingClientRect().width))"
    )
    assert smallest >= 200
    if width == 1280:  # side by side with the controls, and as large as the window lets it be
        room = browser.eval("document.getElementById('panels').getBoundingClientRect().width")
        used = browser.eval(
            "panels.map((p) => p.canvas.getBoundingClientRect().width).reduce((a, b) => a + b)"
        )
        assert used > 0.95 * room > 0.6 * width
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert browser.problems == []


def test_none_is_the_photo_and_leaves_the_slider_alone(browser, checkpoints, photos, tmp_path):
    photos[0].save(tmp_path / "photo.png")
    arguments = ["--model-path", str(checkpoints("llava-1.5-llama"))]
    arguments += ["--image-file", str(tmp_path / "photo.png"), "--device", "cpu"]
    arguments += ["--methods", "none,hivtp", "--r-max", BUDGETS]
    assert main(["show", *arguments, "--html", str(tmp_path / "page.html")]) == 0
    browser.open(tmp_path / "page.html")
    status = "none, everything kept: 64 of 64 tokens kept (100.0 %)"
    assert browser.text("status").startswith(status)
    assert "unpruned 64" in browser.text("key")
    same = (
        "(() => { const p = panels[0], of = (c) => [...layerOf(c, c).getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data].join();"
        "return of(p.canvas) === of(p.photo) })()"
    )
    assert browser.eval(same)
    browser.eval("document.querySelectorAll('input[name=method]')[1].click()")
    assert browser.text("status").startswith("hivtp, r_max 0.5: ")
    assert not browser.eval(same)
    browser.eval("document.getElementById('budget').focus()")
    browser.press("ArrowRight")
    assert browser.text("status").startswith("hivtp, r_max 0.25: ")
    browser.eval("document.querySelectorAll('input[name=method]')[0].click()")
    assert browser.text("status").startswith(status)
    browser.eval("document.querySelectorAll('input[name=method]')[1].click()")
    assert browser.text("status").startswith("hivtp, r_max 0.25: ")
    assert browser.problems == []
