"""The pictures of `llava-hvp show`: read back pixel by pixel, and computed here by other means."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from llava_hvp import HIVTP, HiPrune, Random, prune
from llava_hvp.errors import PictureError
from llava_hvp.methods.base import Selection
from llava_hvp.pruning.report import ImageReport
from llava_hvp.runtime import Runtime
from llava_hvp.show.colours import colours_of, heat
from llava_hvp.show.frame import counts_of

SIDE, PATCH = 112, 14  # of the tiny towers
ROWS = SIDE // PATCH
SIZES = ((640, 427), (427, 640), (112, 112), (300, 100), (100, 300), (1000, 40), (37, 53), (2, 2))
# Written again and not imported.
COLOURS = {
    "global": (86, 180, 233),
    "local": (230, 159, 0),
    "anchor": (240, 228, 66),
    "buffer": (213, 94, 0),
    "register": (0, 158, 115),
    "random": (230, 159, 0),
}


def photo_of(size):
    """Noise over a ramp: no patch is like another."""
    width, height = size
    noise = np.random.default_rng(width).integers(0, 120, (height, width, 3))
    ramp = np.linspace(0, 135, width)[None, :, None]
    return Image.fromarray((noise + ramp).astype(np.uint8))


def report_on(bundle, method, image, **runtime):
    """The report of one call on a picture."""
    with prune(bundle.model, method, runtime=Runtime(**runtime)) as pruned:
        bundle.embeds(bundle.ids("What is it?"), bundle.pixels(image), [image.size])
        return pruned.last[0]


def seen_by_15(image, mode):
    """What LLaVA-1.5 sees, by PIL alone: padded or cropped to a square of SIDE pixels."""
    if mode == "pad":
        longest = max(image.size)
        square = Image.new("RGB", (longest, longest), (122, 116, 104))  # CLIP's mean colour
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        return square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    shortest = min(image.size)
    size = [int(SIDE * length / shortest) for length in image.size]
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((length - SIDE) // 2 for length in size)
    return resized.crop((left, top, left + SIDE, top + SIDE))


def best_of(size, pinpoints):
    """The resolution that keeps most of the picture's pixels, and wastes fewest."""

    def rating(resolution):
        scale = min(r / s for r, s in zip(resolution, size, strict=True))
        used = int(size[0] * scale) * int(size[1] * scale)
        used = min(used, size[0] * size[1])
        return -used, resolution[0] * resolution[1] - used

    return min(map(tuple, pinpoints), key=rating)


def seen_by_next(image, pinpoints):
    """(base tile, mosaic) by PIL alone."""
    best = best_of(image.size, pinpoints)
    scale = [b / s for b, s in zip(best, image.size, strict=True)]
    wide, high = best
    if scale[0] < scale[1]:
        high = min(int(np.ceil(image.height * scale[0])), best[1])
    else:
        wide = min(int(np.ceil(image.width * scale[1])), best[0])
    mosaic = Image.new("RGB", best)
    mosaic.paste(image.resize((wide, high)), ((best[0] - wide) // 2, (best[1] - high) // 2))
    return image.resize((SIDE, SIDE)), mosaic


def roles_at(report, tile, row, column):
    patch = row * ROWS + column
    return [role for role, mask in report.selection.roles.items() if bool(mask[tile, patch])]


def check_pixels(shown, photo, role_of):
    """Every pixel of a drawn panel against the photo and what became of its patch and of those
    around it: photo, one pixel of the role's colour where another state begins, or grey."""
    shown, photo = (np.asarray(picture).astype(int) for picture in (shown, photo))
    assert shown.shape == photo.shape
    rows, columns = photo.shape[0] // PATCH, photo.shape[1] // PATCH
    roles = {(r, c): role_of(r, c) for r in range(rows) for c in range(columns)}
    for row in range(rows):
        for column in range(columns):
            at = np.s_[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            role = roles[row, column]
            if role == "cut":
                assert set(np.unique(shown[at])) <= {222, 250}
            elif role is None:
                grey = photo[at] @ (299, 587, 114) * 35 // 100_000
                assert (shown[at] == grey[..., None]).all()
            else:
                wanted = photo[at].copy()
                for step, line in (
                    ((-1, 0), np.s_[0]),
                    ((1, 0), np.s_[-1]),
                    ((0, -1), np.s_[:, 0]),
                    ((0, 1), np.s_[:, -1]),
                ):
                    if roles.get((row + step[0], column + step[1]), "outside") != role:
                        wanted[line] = COLOURS[role]
                assert (shown[at] == wanted).all(), (row, column, role)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_every_pixel_of_llava_15(loaded, monkeypatch, size, mode):
    bundle = loaded("llava-1.5-llama")
    monkeypatch.setattr(bundle.model.config, "image_aspect_ratio", mode)
    image = photo_of(size)
    method = {"pad": HIVTP(r_max=0.5), "square": Random(r_max=0.3)}[mode]
    report = report_on(bundle, method, image)
    sheet = report.overlay(image, scale=1, original=False)
    seen = set()

    def role_of(row, column):
        roles = roles_at(report, 0, row, column)
        seen.update(roles or [None])
        return roles[0] if roles else None

    check_pixels(sheet.crop((0, 0, SIDE, SIDE)), seen_by_15(image, mode), role_of)
    assert seen == {*report.selection.roles, None}
    assert sheet.height > SIDE  # the legend
    both = report.overlay(image, scale=1)
    left, right = (both.crop((x, 0, x + SIDE, SIDE)) for x in (0, SIDE + 12))
    assert left.tobytes() == seen_by_15(image, mode).tobytes()
    assert right.tobytes() == sheet.crop((0, 0, SIDE, SIDE)).tobytes()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_pixel_of_llava_next(loaded, size):
    bundle = loaded("llava-next-llama")
    image = photo_of(size)
    report = report_on(bundle, HiPrune(r_max=0.4, alpha=0.3), image)
    base, mosaic = seen_by_next(image, bundle.model.config.image_grid_pinpoints)
    sheet = report.overlay(image, scale=1, original=False)
    gap = 12
    right = sheet.crop((SIDE + gap, 0, SIDE + gap + mosaic.width, mosaic.height))
    across, rows, columns = mosaic.width // SIDE, mosaic.height // PATCH, mosaic.width // PATCH
    # unpad, in patches: what the photo's own shape leaves of the mosaic, centred.
    cut_rows = cut_columns = 0
    if image.width / image.height > columns / rows:
        cut_rows = (rows - int(image.height * columns / image.width)) // 2
    else:
        cut_columns = (columns - int(image.width * rows / image.height)) // 2
    kept = 0

    def role_in_mosaic(row, column):
        nonlocal kept
        inside = cut_rows <= row < rows - cut_rows and cut_columns <= column < columns - cut_columns
        if not inside:
            return "cut"
        tile = 1 + row // ROWS * across + column // ROWS
        roles = roles_at(report, tile, row % ROWS, column % ROWS)
        kept += len(roles)
        return roles[0] if roles else None

    def role_in_base(row, column):
        nonlocal kept
        roles = roles_at(report, 0, row, column)
        kept += len(roles)
        return roles[0] if roles else None

    check_pixels(sheet.crop((0, 0, SIDE, SIDE)), base, role_in_base)
    check_pixels(right, mosaic, role_in_mosaic)
    assert kept == report.kept_patches
    counts = counts_of(report)
    assert sum(counts.values()) == report.sent.numel()
    assert counts.get("cut", 0) == rows * columns - (rows - 2 * cut_rows) * (
        columns - 2 * cut_columns
    )


def test_a_larger_overlay_has_the_same_patches(loaded, photos):
    report = report_on(loaded("llava-1.5-llama"), HIVTP(r_max=0.5), photos[0])
    sheet = np.asarray(report.overlay(photos[0], scale=3, original=False)).astype(int)
    for row in range(ROWS):
        for column in range(ROWS):
            step = 3 * PATCH
            patch = sheet[row * step : (row + 1) * step, column * step : (column + 1) * step]
            roles = roles_at(report, 0, row, column)
            is_grey = bool((patch == patch[..., :1]).all())
            assert is_grey == (not roles)


def test_spatial_merge_cuts_nothing_off(loaded):
    image = photo_of((300, 100))
    report = report_on(loaded("llava-next-llama"), HIVTP(r_max=0.5), image, patch_merge="spatial")
    assert "cut" not in counts_of(report)


def test_what_is_shown_is_what_the_model_gets(loaded, photos):
    """The embeddings sent are stock's, at the patches that have a colour in the picture."""
    bundle, image = loaded("llava-1.5-llama"), photos[3]
    ids, pixels = bundle.ids("What is it?"), bundle.pixels(image)
    stock = bundle.embeds(ids, pixels, [image.size])[0][0]
    with prune(bundle.model, HiPrune(r_max=0.3)) as pruned:
        sent = bundle.embeds(ids, pixels, [image.size])[0][0]
        sheet = np.asarray(pruned.last[0].overlay(image, scale=1, original=False))
    drawn = sheet[:SIDE, :SIDE].reshape(ROWS, PATCH, ROWS, PATCH, 3)
    coloured = (drawn != drawn[..., :1]).any((1, 3, 4)).flatten()
    first = ids[0].tolist().index(-200)
    kept = first + np.flatnonzero(coloured)
    expected = torch.cat((stock[:first], stock[kept], stock[first + ROWS * ROWS :]))
    torch.testing.assert_close(sent, expected)


def test_another_picture_is_refused(loaded, photos):
    report = report_on(loaded("llava-1.5-llama"), HIVTP(r_max=0.5), photos[0])
    with pytest.raises(PictureError, match=r"512 x 512.*640 x 427"):
        report.overlay(photos[1])


def test_a_picture_that_llava_would_blow_up_is_refused(loaded, photos):
    report = report_on(loaded("llava-1.5-llama"), HIVTP(r_max=0.5), photos[0])
    with pytest.raises(PictureError, match="blow it up to 400 megapixels"):
        report.view.frame(Image.new("RGB", (20_000, 10)))
    view = report_on(loaded("llava-next-llama"), HIVTP(r_max=0.5), photos[0]).view
    assert len(view.frame(Image.new("RGB", (20_000, 10)))) == 2  # AnyRes makes no square


def test_one_pixel_is_drawn_or_refused_in_words(loaded):
    """transformers 4 takes the height of a 1 x 1 picture for its channels."""
    bundle, image = loaded("llava-next-llama"), Image.new("RGB", (1, 1), (10, 200, 30))
    report = report_on(bundle, HIVTP(r_max=0.5), image)
    assert report.overlay(image).width > SIDE
    view = report_on(loaded("llava-1.5-llama"), HIVTP(r_max=0.5), photo_of((2, 2))).view
    try:
        photo = view.frame(image)[0].photo
    except PictureError as error:
        assert "1 x 1" in str(error)  # noqa: PT017 - either way is right
    else:
        assert photo[50, 50].tolist() == [10, 200, 30]


def test_a_report_without_a_view_draws_no_photo():
    mask = torch.ones(1, 4, dtype=torch.bool)
    report = ImageReport("m", 1, 4, 4, mask, (2, 2), None, Selection(mask, {"m": mask}))
    with pytest.raises(PictureError, match=r"pruned\.last"):
        report.overlay(Image.new("RGB", (2, 2)))
    assert Image.open(io.BytesIO(report._repr_png_())).size == (20, 20)


def test_reports_show_themselves_in_a_notebook(loaded, photos):
    report = report_on(loaded("llava-next-llama"), HIVTP(r_max=0.5), photos[0])
    image = Image.open(io.BytesIO(report._repr_png_()))
    across, down = 2, 2
    assert image.size == (10 * ROWS * (1 + across) + 12, 10 * ROWS * down)
    # One pixel of the base tile's first patches against the masks.
    for column in range(ROWS):
        roles = roles_at(report, 0, 0, column)
        colour = COLOURS[roles[0]] if roles else (60, 60, 60)
        assert image.getpixel((10 * column + 5, 5)) == colour
    shown = report._repr_html_()
    assert "data:image/png;base64," in shown
    assert f"global {counts_of(report)['global']}" in shown
    assert repr(report).strip("<>") in shown


def test_a_pruning_shows_its_last_reports(loaded, photos):
    bundle = loaded("llava-1.5-llama")
    with prune(bundle.model, HIVTP(r_max=0.5)) as pruned:
        assert "no image seen yet" in pruned._repr_html_()
        bundle.embeds(bundle.ids("?"), bundle.pixels(photos[0]), [photos[0].size])
        assert pruned._repr_html_().count("<figure>") == 1


def test_heat_rises_evenly_in_lightness():
    """CIE L* of the colours: monotonous, in steps of about the same size."""
    colours = heat().double() / 255
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ torch.tensor((0.2126, 0.7152, 0.0722), dtype=torch.double)
    lightness = 116 * luminance.clamp(min=0.008856) ** (1 / 3) - 16
    per_16 = lightness[::15].diff()
    assert (per_16 > 0).all()
    assert per_16[1:].max() / per_16[1:].min() < 2


def test_strangers_get_colours_of_their_own():
    colours = colours_of(["global", "one", "two", "three"])
    assert len(set(colours.values())) == 4


def seen_by_the_colour_blind(colour, kind):
    """sRGB as a dichromat sees it (F. Vienot, H. Brettel and J. Mollon, 1999), linear."""
    srgb = np.array(colour) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    shares = {
        "protanope": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "deuteranope": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    }
    seen = np.clip(np.array(shares[kind]) @ linear, 0, 1)
    return np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["protanope", "deuteranope"])
@pytest.mark.parametrize("roles", [("global", "local"), ("anchor", "buffer", "register", "text")])
def test_colour_blind_readers_tell_roles_apart(kind, roles):
    """The paper's green and red, (0, 170, 60) and (230, 30, 40), are 0.21 apart to the second."""
    seen = [seen_by_the_colour_blind(colour, kind) for colour in colours_of(roles).values()]
    apart = [np.abs(a - b).max() for n, a in enumerate(seen) for b in seen[:n]]
    assert min(apart) > 0.3
