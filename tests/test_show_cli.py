"""`llava-hvp show` as it is typed: pictures and pages out, or one line that says what is wrong."""

import base64
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_hvp import HIVTP, HiPrune, VisionContext
from llava_hvp.cli import main
from llava_hvp.errors import LayerError, PictureError
from llava_hvp.runtime import PruningConfig
from llava_hvp.show.colours import heat
from llava_hvp.show.frame import counts_of
from llava_hvp.show.heatmap import even_shares
from llava_hvp.show.overlay import enlarged, original_of, scale_for
from llava_hvp.show.pictures import open_picture


@pytest.fixture
def photo(photos, tmp_path):
    photos[3].save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def show(checkpoints, photo, monkeypatch):
    """A function from arguments to the exit code; a 1.5 model, a photo, the current folder."""
    monkeypatch.chdir(photo.parent)

    def run(*arguments, model="llava-1.5-llama", image=photo):
        path = ["--model-path", str(checkpoints(model)), "--image-file", str(image)]
        return main(["show", *path, "--device", "cpu", *arguments])

    return run


@pytest.fixture
def viewer(checkpoints):
    from llava_hvp.checkpoints.viewer import Viewer

    return Viewer.load(str(checkpoints("llava-1.5-llama")), None, "cpu", bits=None)


def test_an_overlay_is_that_of_python(show, viewer, photo, photos):
    assert show("--prune-method", "hivtp", "--r-max", "0.5", "-o", "kept.png") == 0
    report = viewer.look(PruningConfig(HIVTP(r_max=0.5)), photos[3], viewer.prompt("?"))
    same = report.overlay(photos[3])
    drawn, high = untitled(Image.open("kept.png"), same), 448
    assert drawn.crop((0, 0, same.width, high)).tobytes() == (
        same.crop((0, 0, same.width, high)).tobytes()
    )


def untitled(drawn, sheet):
    """What the command drew without its title and margins, of the size of the sheet alone."""
    assert drawn.width == sheet.width + 48
    top = drawn.height - 24 - sheet.height
    assert 24 < top < 100
    return drawn.crop((24, top, 24 + sheet.width, top + sheet.height))


def test_both_answers_stand_below_the_pictures(show, monkeypatch):
    """In the words that were drawn, unpruned first."""
    from llava_hvp.checkpoints.viewer import Viewer
    from llava_hvp.show import overlay

    drawn, words = [], overlay.words

    def recorded(text, *arguments, **named):
        drawn.append(text)
        return words(text, *arguments, **named)

    monkeypatch.setattr(overlay, "words", recorded)
    monkeypatch.setattr(
        Viewer,
        "answer",
        lambda viewer, by, image, ids, new: (
            (f"with {by.name}", viewer.look(by, image, ids)) if by.prunes else ("with all", None)
        ),
    )
    asked = ("--prompt", "Is there a cat?")
    assert show("--prune-method", "hivtp", *asked, "-o", "one.png") == 0
    assert drawn[-1] == "Is there a cat?"
    assert [text for text in drawn if "answer" in text] == [
        "answer: with hivtp",
        "answer: with all",
    ]
    drawn.clear()
    assert show("--methods", "none,hivtp,random", *asked, "-o", "grid.png") == 0
    told = [text.removeprefix("answer: with ") for text in drawn if "answer" in text]
    assert sorted(told) == ["all", "all", "hivtp", "random"]


def test_a_grid_has_a_column_a_method_and_a_row_a_budget(show):
    assert show("--methods", "hivtp,hiprune,random", "--r-max", "0.5,0.25", "-o", "g.png") == 0
    assert show("--methods", "hivtp", "--r-max", "0.5,0.25", "-o", "column.png") == 0
    grid, column = Image.open("g.png"), Image.open("column.png")
    assert grid.width > 1.9 * column.width  # each has the original at its left too
    assert abs(grid.height - column.height) < 80  # legends may take another line


def test_a_page_without_a_prompt_has_no_answers(show, photo):
    assert show("--html", "page.html", "--r-max", "0.5,0.25") == 0
    page = (photo.parent / "page.html").read_text()
    assert '"prompt":""' in page
    assert '"name":"hiprune"' in page


def test_both_files_at_once(show, photo):
    arguments = ("--prune-method", "uniform", "-o", "a.png", "--html", "b.html")
    assert show(*arguments) == 0
    assert sorted(p.name for p in photo.parent.iterdir()) == ["a.png", "b.html", "photo.png"]


def test_a_prompt_aware_method(show, capsys):
    arguments = ("--prune-method", "hiprune++", "--num-tokens", "20", "-o", "k.png")
    assert show(*arguments, "--prompt", "Is there a cat?") == 0
    assert show(*arguments) == 2
    assert "hiprune++ reads the prompt: give --prompt" in capsys.readouterr().err


def test_a_budget_that_is_an_option(show):
    options = ("--prune-opt", "k=25", "--prune-opt", "window=2")
    assert show("--prune-method", "hivtp", *options, "-o", "k.png") == 0
    assert show("--prune-method", "hivtp", *options, "--html", "k.html") == 0


# --- none: the picture unpruned ---


def panel_of(sheet, viewer, image):
    """The part of an overlay where the base tile or the only one is, and the same of the photo."""
    panels = viewer.view.frame(image)
    seen = enlarged(panels[0], scale_for((panels[0], *panels)))
    height, width = seen.shape[:2]
    left = width + 12 if len(panels) == 1 else original_of(image, panels, width // 112).width + 12
    return np.asarray(sheet)[:height, left : left + width], seen.numpy()


@pytest.mark.parametrize("flag", ["--prune-method", "--methods"])
def test_none_is_the_picture_as_the_model_sees_it(show, viewer, photos, flag):
    assert show(flag, "none", "-o", "none.png") == 0
    report = viewer.look(PruningConfig(HIVTP(r_max=1)), photos[3], viewer.prompt("?"))
    sheet = untitled(Image.open("none.png"), report.overlay(photos[3]))
    drawn, seen = panel_of(sheet, viewer, photos[3])
    assert np.array_equal(drawn, seen)
    assert show(flag, "hivtp", "-o", "kept.png") == 0
    sheet = untitled(Image.open("kept.png"), report.overlay(photos[3]))
    assert not np.array_equal(panel_of(sheet, viewer, photos[3])[0], seen)


@pytest.mark.parametrize("name", ["llava-1.5-llama", "llava-next-llama"])
def test_none_keeps_what_unpruned_llava_sends(checkpoints, loaded, photos, name):
    from llava_hvp.checkpoints.viewer import Viewer

    viewer, stock = Viewer.load(str(checkpoints(name)), None, "cpu", bits=None), loaded(name)
    ids = viewer.prompt("Why?")
    report = viewer.look(None, photos[3], ids)
    embeds = stock.embeds(ids, stock.pixels(photos[3]), [photos[3].size])[0]
    assert embeds.shape[1] == ids.shape[1] - 1 + report.kept_tokens
    assert report.kept_tokens == report.stock_tokens
    sent = report.selection.keep.flatten() if report.stock is None else report.stock.flatten()
    assert torch.equal(report.sent.flatten(), sent)
    counts = counts_of(report)
    assert counts["unpruned"] == int(sent.sum())
    assert counts["pruned"] == 0
    drawn, seen = panel_of(report.overlay(photos[3]), viewer, photos[3])
    assert np.array_equal(drawn, seen)
    assert "unpruned" in report._repr_html_()
    assert "llava_hvp" not in vars(viewer.model)


@pytest.mark.parametrize(
    "names", ["none,hivtp,hiprune", "hivtp,none,hiprune", "hivtp,hiprune,none"]
)
def test_none_in_any_place_of_a_grid_stands_in_every_row(show, names):
    assert show("--methods", names, "--r-max", "0.5,0.25", "-o", "g.png") == 0
    assert show("--methods", "none,hivtp", "--r-max", "0.5", "-o", "two.png") == 0
    grid, two = (np.asarray(Image.open(name)) for name in ("g.png", "two.png"))
    # A line across the photo, which the overlay of no method has; once it is the original's.
    line = two[200, 24 : 24 + 336]
    first, *found = sorted(places_of_line(grid, line), key=lambda place: place[1])
    assert len(found) == 2, found
    assert first[1] == 24
    column = names.split(",").index("none")
    assert {x * 4 // grid.shape[1] for _, x in found} == {1 + column}
    assert sorted(y * 2 // grid.shape[0] for y, _ in found) == [0, 1]


def places_of_line(sheet, line):
    """(y, x) of every place where a sheet has these pixels side by side."""
    width = sheet.shape[1] - len(line) + 1
    return [
        (y, x)
        for y, x in np.argwhere((sheet[:, :width] == line[0]).all(-1))
        if np.array_equal(sheet[y, x : x + len(line)], line)
    ]


def page_data(path):
    (text,) = re.findall(r'id="data">(.*?)</script>', path.read_text())
    return json.loads(text)


@pytest.mark.parametrize("names", ["none", "none,hivtp", "hivtp,none,hiprune"])
@pytest.mark.parametrize("prompt", [(), ("--prompt", "Is there a cat?", "--new-tokens", "4")])
def test_none_on_a_page(show, photo, names, prompt):
    page = photo.parent / "k.html"
    assert show("--methods", names, "--r-max", "0.5,0.25", "--html", str(page), *prompt) == 0
    data = page_data(page)
    assert [m["name"] for m in data["methods"]] == names.split(",")
    assert [len(m["budgets"]) for m in data["methods"]] == [
        1 if name == "none" else 2 for name in names.split(",")
    ]
    (none,) = (m for m in data["methods"] if m["name"] == "none")
    (budget,) = none["budgets"]
    assert none["roles"] == [{"name": "unpruned", "colour": None}]
    assert budget["kept"] == budget["stock"] == budget["counts"]["unpruned"] == 64
    assert set(base64.b64decode(budget["states"])) == {1}
    assert bool(budget["answer"]) == bool(prompt)
    assert budget["answer"] == data["unpruned"]


def test_none_beside_heat_maps_on_a_page(show, photo):
    page = photo.parent / "k.html"
    assert show("--prune-method", "none", "--layers", "2,3", "--html", str(page)) == 0
    assert [layer["layer"] for layer in page_data(page)["layers"]] == [2, 3]
    assert show("--layers", "2", "-o", "k.png", "--methods", "none") == 2


# --- heat maps ---


def test_the_layers_are_those_that_methods_read(viewer, photos):
    """The heat maps' scores, given to a method by hand, select what the model keeps."""
    received = viewer.received_attention(photos[0])
    assert sorted(received) == list(range(1, viewer.select + 1))
    side = round(received[1].shape[1] ** 0.5)
    context = VisionContext(
        grid=(side, side),
        received_attention=received,
        depth=viewer.select + 1,
        feature_layer=viewer.select,
    )
    for method in (HIVTP(r_max=0.5), HiPrune(r_max=0.3)):
        report = viewer.look(PruningConfig(method), photos[0], viewer.prompt("?"))
        assert torch.equal(method.select(context).keep, report.selection.keep)


@pytest.mark.parametrize("scale", ["own", "shared"])
def test_heat_maps_have_the_colours_of_their_scores(show, viewer, photos, scale):
    assert show("--layers", "2,3", "--scale", scale, "-o", "layers.png") == 0
    sheet = np.asarray(Image.open("layers.png"))
    received = {
        n: even_shares(s)[0].numpy()
        for n, s in viewer.received_attention(photos[3], (2, 3)).items()
    }
    side = round(len(received[2]) ** 0.5)
    step = 250 // side
    cell = side * step
    both = np.concatenate(list(received.values()))
    top = next(y for y in range(200) if (sheet[y, 12 + cell // 2] != 255).any() and y > 36)
    photo = Image.fromarray(viewer.view.frame(photos[3])[0].photo.numpy())
    grey = np.asarray(photo.resize((cell, cell), Image.Resampling.BICUBIC).convert("L"))
    for number, values in enumerate(received.values(), 1):
        ends = both if scale == "shared" else values
        least, most = ends.min(), np.quantile(ends, 0.99)
        level = np.clip(np.round((values - least) / (most - least) * 255), 0, 255).astype(int)
        left = 12 + number * (cell + 12)
        for patch in range(side * side):
            y, x = top + patch // side * step + 5, left + patch % side * step + 5
            # Seven parts heat, three parts the picture in grey.
            wanted = heat()[max(0, level[patch] - 1) : level[patch] + 2].numpy()
            near = np.abs(
                0.7 * wanted + 0.3 * grey[y - top, x - 12 - number * (cell + 12)] - sheet[y, x]
            )
            assert near.max(axis=1).min() < 1.6, (number, patch)


def test_layers_are_those_of_the_tower(show, viewer, capsys):
    assert show("--layers", "99", "-o", "layers.png") == 2
    assert f"--layers 99: give layers from 1 to {viewer.select}, or all" in capsys.readouterr().err
    with pytest.raises(LayerError):
        viewer.received_attention(Image.new("RGB", (9, 9)), (0,))


# --- wrong input ---


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "nothing to write: give -o FILE.png, --html FILE.html, or both"),
        (("-o", "k.png"), "give --prune-method, --methods or --prune-from for what is kept"),
        (("--prune-method", "hivtp", "--layers", "all", "-o", "k.png"), "-o draws one thing"),
        (("--prune-method", "hivtpp", "-o", "k.png"), "unknown method 'hivtpp': give some of"),
        (("--prune-method", "floor", "-o", "k.png"), "unknown method 'floor'"),  # the bench's own
        (("--prune-method", "hivtp", "-o", "k.jpg"), "k.jpg: give a name that ends in .png"),
        (("--prune-method", "hivtp", "-o", "no/k.png"), "give a file in a folder that is there"),
        (("--prune-method", "hivtp", "--r-max", "1.5", "-o", "k.png"), "1.5"),
        (("--prune-method", "hivtp", "--r-max", "x", "-o", "k.png"), "--r-max x: give numbers"),
        (("--prune-method", "hivtp", "--num-tokens", "0", "-o", "k.png"), "num_tokens=0"),
        (("--methods", "none", "--prune-opt", "k=25", "-o", "k.png"), "--prune-opt k=25: none is"),
        (
            ("--prune-method", "hivtp", "--r-max", "1", "--num-tokens", "9", "-o", "k.png"),
            "exclude",
        ),
        (("--prune-method", "hivtp", "--methods", "random", "-o", "k.png"), "exclude each other"),
        (("--load-4bit", "--load-8bit", "--html", "k.html"), "exclude each other"),
        (("--html", "k.html", "--device", "gpu"), "--device gpu:"),
        (("--html", "k.html", "--new-tokens", "0"), "--new-tokens 0: give at least 1"),
        (("--html", "k.html", "--conv-mode", "v9"), "--conv-mode v9: LLaVA knows"),
    ],
)
def test_wrong_arguments_end_in_one_line(show, photo, capsys, arguments, told):
    assert show(*arguments) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("llava-hvp")]
    assert line.startswith("llava-hvp: error: ")
    assert told in line
    assert [p.name for p in photo.parent.iterdir()] == ["photo.png"]


def test_a_model_that_is_not_there(photo, capsys, tmp_path):
    arguments = ["--model-path", str(tmp_path / "none"), "--image-file", str(photo)]
    assert main(["show", *arguments, "--html", str(tmp_path / "p.html"), "--device", "cpu"]) == 2
    assert "none: no such folder" in capsys.readouterr().err


def broken(kind, folder):
    path = folder / f"{kind}.png"
    if kind == "truncated":
        Image.effect_noise((300, 300), 90).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "bomb":  # says that it has 20,000 x 20,000 pixels
        header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
        data = b"IDAT" + zlib.compress(bytes(60_001))
        chunks = (
            struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
            for c in (header, data)
        )
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("truncated", "not a picture that PIL can read"),
        ("text", "not a picture that PIL can read"),
        ("empty", "not a picture that PIL can read"),
        ("missing", "no such file"),
        ("bomb", "more than 179 megapixels"),
    ],
)
def test_broken_pictures_end_in_one_line(show, capsys, tmp_path, kind, told):
    path = broken(kind, tmp_path)
    assert show("--html", "k.html", image=path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert str(path) in line
    assert not (tmp_path / "k.html").exists()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "RGB"])
def test_a_picture_is_read_as_llava_reads_it(tmp_path, photos, mode):
    from llava.serve.cli import load_image

    image, path = photos[3], tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 4)
    elif mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(image.convert("L"))
    else:
        image = image.convert(mode)
    image.save(path)
    opened, notes = open_picture(str(path))
    assert opened.tobytes() == load_image(str(path)).tobytes()
    assert any("transparency" in note for note in notes) == (mode in ("LA", "RGBA"))
    assert any("8 bits" in note for note in notes) == (mode == "I;16")


def test_a_turned_picture_is_shown_as_llava_sees_it(tmp_path, photos):
    exif = Image.Exif()
    exif[0x0112] = 6
    photos[3].save(tmp_path / "a.jpg", exif=exif)
    opened, notes = open_picture(str(tmp_path / "a.jpg"))
    assert opened.size == photos[3].size
    assert any("LLaVA does not turn it" in note for note in notes)


def test_an_address_that_does_not_answer():
    with pytest.raises(PictureError, match=r"--image-file http://127\.0\.0\.1:9/a\.png"):
        open_picture("http://127.0.0.1:9/a.png")


def test_a_write_that_fails_leaves_nothing_half_written(show, photo, monkeypatch, capsys):
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full"))
    )
    assert show("--prune-method", "uniform", "-o", "k.png") == 2
    assert "k.png: cannot be written: disk full" in capsys.readouterr().err
    assert [p.name for p in photo.parent.iterdir()] == ["photo.png"]
