"""`llava-hvp show` as it is typed: pictures and pages out, or one line that says what is wrong."""

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
from llava_hvp.show.colours import heat
from llava_hvp.show.heatmap import even_shares
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
    from llava_hvp.host.viewer import Viewer

    return Viewer.load(str(checkpoints("llava-1.5-llama")), None, "cpu", bits=None)


def test_an_overlay_is_that_of_python(show, viewer, photo, photos):
    assert show("--prune-method", "hivtp", "--r-max", "0.5", "-o", "kept.png") == 0
    report = viewer.look(HIVTP(r_max=0.5), photos[3], viewer.prompt("?"))
    drawn, same = Image.open("kept.png"), report.overlay(photos[3])
    side = min(drawn.width, same.width, 448)
    assert drawn.crop((0, 0, side, side)).tobytes() == same.crop((0, 0, side, side)).tobytes()


def test_a_grid_has_a_column_a_method_and_a_row_a_budget(show):
    assert show("--methods", "hivtp,hiprune,random", "--r-max", "0.5,0.25", "-o", "g.png") == 0
    assert show("--methods", "hivtp", "--r-max", "0.5,0.25", "-o", "column.png") == 0
    grid, column = Image.open("g.png"), Image.open("column.png")
    assert grid.width > 2.5 * column.width
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


# --- heat maps ---


def test_the_layers_are_those_that_methods_read(viewer, photos):
    """The heat maps' scores, given to a method by hand, select what the model keeps."""
    received = viewer.received(photos[0])
    assert sorted(received) == list(range(1, viewer.select + 1))
    side = round(received[1].shape[1] ** 0.5)
    context = VisionContext(
        grid=(side, side), received=received, depth=viewer.select + 1, select=viewer.select
    )
    for method in (HIVTP(r_max=0.5), HiPrune(r_max=0.3)):
        report = viewer.look(method, photos[0], viewer.prompt("?"))
        assert torch.equal(method.select(context).keep, report.selection.keep)


@pytest.mark.parametrize("scale", ["own", "shared"])
def test_heat_maps_have_the_colours_of_their_scores(show, viewer, photos, scale):
    assert show("--layers", "2,3", "--scale", scale, "-o", "layers.png") == 0
    sheet = np.asarray(Image.open("layers.png"))
    received = {n: even_shares(s)[0].numpy() for n, s in viewer.received(photos[3], (2, 3)).items()}
    side = round(len(received[2]) ** 0.5)
    step = 250 // side
    cell = side * step
    both = np.concatenate(list(received.values()))
    top = next(y for y in range(200) if (sheet[y, 12 + cell // 2] != 255).any() and y > 36)
    for number, values in enumerate(received.values(), 1):
        ends = both if scale == "shared" else values
        least, most = ends.min(), np.quantile(ends, 0.99)
        level = np.clip(np.round((values - least) / (most - least) * 255), 0, 255).astype(int)
        left = 12 + number * (cell + 12)
        for patch in range(side * side):
            y, x = top + patch // side * step + 5, left + patch % side * step + 5
            wanted = heat()[max(0, level[patch] - 1) : level[patch] + 2].tolist()
            assert sheet[y, x].tolist() in wanted, (number, patch)


def test_layers_are_those_of_the_tower(show, viewer, capsys):
    assert show("--layers", "99", "-o", "layers.png") == 2
    assert f"--layers 99: give layers from 1 to {viewer.select}, or all" in capsys.readouterr().err
    with pytest.raises(LayerError):
        viewer.received(Image.new("RGB", (9, 9)), (0,))


# --- wrong input ---


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "nothing to write: give -o FILE.png, --html FILE.html, or both"),
        (("-o", "k.png"), "give --prune-method or --methods for what is kept, or --layers"),
        (("--prune-method", "hivtp", "--layers", "all", "-o", "k.png"), "-o draws one thing"),
        (("--prune-method", "hivtpp", "-o", "k.png"), "unknown method 'hivtpp': give some of"),
        (("--prune-method", "floor", "-o", "k.png"), "unknown method 'floor'"),  # the bench's own
        (("--prune-method", "hivtp", "-o", "k.jpg"), "k.jpg: give a name that ends in .png"),
        (("--prune-method", "hivtp", "-o", "no/k.png"), "give a file in a folder that is there"),
        (("--prune-method", "hivtp", "--r-max", "1.5", "-o", "k.png"), "1.5"),
        (("--prune-method", "hivtp", "--r-max", "x", "-o", "k.png"), "--r-max x: give numbers"),
        (("--prune-method", "hivtp", "--num-tokens", "0", "-o", "k.png"), "num_tokens=0"),
        (("--methods", "none", "-o", "k.png"), "--methods none: give some of"),
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
