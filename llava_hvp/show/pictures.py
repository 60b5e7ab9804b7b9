"""Opening a picture file as LLaVA's commands do, with a clear word about what is wrong with it."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from llava_hvp.errors import PictureError
from llava_hvp.show.sheet import Image

MOST_BYTES = 256 * 2**20  # of a download
SECONDS = 30  # that a server may keep silent
ORIENTATION = 0x0112  # the EXIF tag


def open_picture(source: str) -> tuple[Image.Image, list[str]]:
    """The picture that LLaVA would be given, in RGB, and notes on what it does not see of the file.

    Memory is bounded: PIL refuses files of more than 179 megapixels, for LLaVA as well, before
    it decodes them.

    Parameters
    ----------
    source : str
        a path, or an address that begins with http:// or https://

    Raises
    ------
    PictureError
        no such file, no picture, broken or cut short, or too large
    """
    is_address = source.startswith(("http://", "https://"))
    file: Any = io.BytesIO(_download(source)) if is_address else Path(source)
    if not is_address and not Path(source).is_file():
        raise PictureError(f"--image-file {source}: no such file")
    try:
        with warnings.catch_warnings():
            # Above 89 megapixels, which LLaVA takes.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                notes = _notes(opened)
                return opened.convert("RGB"), notes
    except Image.DecompressionBombError:
        raise PictureError(
            f"--image-file {source}: more than 179 megapixels, which PIL and so LLaVA refuses: "
            "shrink it first"
        ) from None
    except Exception as error:  # PIL's readers raise what they like on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(
            f"--image-file {source}: not a picture that PIL can read ({reason}): is it whole?"
        ) from error


def _notes(opened: Image.Image) -> list[str]:
    notes = []
    if opened.getexif().get(ORIENTATION, 1) not in (0, 1):
        notes.append("EXIF says that this picture is to be turned; LLaVA does not turn it.")
    if "A" in opened.getbands() or "transparency" in opened.info:
        notes.append("The picture has transparency, which LLaVA drops: hidden colours are seen.")
    if opened.mode.startswith(("I", "F")):
        notes.append("More than 8 bits a channel: LLaVA's conversion cuts values above 255.")
    if getattr(opened, "n_frames", 1) > 1:
        notes.append(f"The first of {getattr(opened, 'n_frames', 1)} frames.")
    return notes


def _download(address: str) -> bytes:
    import requests

    try:
        with requests.get(address, stream=True, timeout=SECONDS) as response:
            response.raise_for_status()
            content = b""
            for part in response.iter_content(2**20):
                content += part
                if len(content) > MOST_BYTES:
                    raise PictureError(
                        f"--image-file {address}: more than {MOST_BYTES >> 20} MiB: "
                        "download and shrink it first"
                    )
            return content
    except requests.RequestException as error:
        raise PictureError(f"--image-file {address}: {error}") from error
