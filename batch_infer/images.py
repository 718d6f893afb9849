"""Pixels to image files: formats, the parameters written into them, and what is done to a flagged image."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from PIL.PngImagePlugin import PngInfo

from batch_infer.errors import RowError, first_line
from batch_infer.records import PromptRequest
from batch_infer.settings import IMAGE_SUFFIXES, ImageFormat, OnFlagged

FORMATS: dict[str, ImageFormat] = {suffix: image_format for image_format, suffix in IMAGE_SUFFIXES.items()}
PNG_LEVEL = 4
JPEG_QUALITY = 95
WEBP_QUALITY = 90
EXIF_USER_COMMENT = 0x9286
EXIF_IFD = 0x8769
MOST_TEXT = 50_000
"""Characters of text in a PNG: at most 200 kB, where Pillow opens no file with a text of more than 1 MiB."""
MOST_EXIF = 15_000
"""Characters in Exif, which holds 64 KiB in a JPEG: at most 60 kB of UTF-16."""
MOST_FIELDS = 1_000

_PNG = b"\x89PNG\r\n\x1a\n"
_DECODING_ERRORS = (OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, struct.error, zlib.error)
"""What Pillow raises for a file that is no image, or a damaged one."""

XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""
"""The mark of a generated image: IPTC Photo Metadata Standard, Digital Source Type `trainedAlgorithmicMedia`."""


def parameters_text(request: PromptRequest, scheduler: str, model_hash: str) -> str:
    """Format a row's parameters as AUTOMATIC1111's web UI does, so that its readers take them up.

    The model is named by its fingerprint, and this package without its version: the same image then has the same bytes
    whatever its model's folder is called, and in the next release too.
    """
    params = request.params
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    fields = {
        "Steps": params.num_inference_steps,
        "Sampler": scheduler,
        "CFG scale": f"{params.guidance_scale:g}",
        "Seed": request.seed,
        "Size": f"{params.width}x{params.height}",
        "Model hash": model_hash,
        "CFG rescale": f"{params.guidance_rescale:g}" if params.guidance_rescale else None,
        "Version": "batch-infer",
    }
    return "\n".join([*lines, ", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v is not None)])


def _quoted(value: Any) -> str:
    """A1111's reader splits the line at commas and colons, and takes a value that holds one from a JSON string."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def encode(pixels: np.ndarray, image_format: ImageFormat, parameters: str) -> bytes:
    """An image (H, W, 3) uint8 as the bytes of a file that carries its parameters and the mark of a generated image."""
    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    parameters = _cut(parameters, MOST_TEXT)
    match image_format:
        case "png":
            text = PngInfo()
            text.add_itxt("parameters", parameters) if not _latin(parameters) else text.add_text(
                "parameters", parameters
            )
            text.add_itxt("XML:com.adobe.xmp", XMP)
            image.save(stream, "PNG", pnginfo=text, compress_level=PNG_LEVEL)
        case "jpeg":
            image.save(stream, "JPEG", quality=JPEG_QUALITY, xmp=XMP.encode(), exif=_exif(parameters))
        case "webp":
            image.save(stream, "WEBP", quality=WEBP_QUALITY, xmp=XMP.encode(), exif=_exif(parameters))
    return stream.getvalue()


def decode(content: bytes) -> np.ndarray:
    """Return the pixels (H, W, 3) uint8 of an image file. Raises RowError where it cannot be opened.

    The text in a PNG is skipped: Pillow refuses files with more than 64 MiB of it.
    """
    try:
        with Image.open(io.BytesIO(_without_text(content))) as image:
            return np.asarray(image.convert("RGB"))
    except (*_DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise RowError(f"its image cannot be opened ({first_line(error)})") from error


def _without_text(content: bytes) -> bytes:
    """Return a PNG without its text chunks, and anything else as it is."""
    if not content.startswith(_PNG):
        return content
    kept, place = [_PNG], len(_PNG)
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        chunk = content[place : place + length + 12]
        if chunk[4:8] not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(chunk)
        place += length + 12
    return b"".join(kept)


def pixels_sha256(pixels: np.ndarray) -> str:
    """Return the SHA-256 of an image (H, W, 3) uint8: of its mode, its size and its pixels before encoding.

    It does not depend on the file format, the text in the file, or the version of an encoder.
    """
    height, width, _ = pixels.shape
    found = hashlib.sha256(f"RGB {width}x{height}\n".encode())
    found.update(np.ascontiguousarray(pixels).data)
    return found.hexdigest()


def _latin(text: str) -> bool:
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return True


def _cut(text: str, most: int) -> str:
    """Shorten a text to so many characters: `…` marks where, and its last line, the fields, is kept."""
    if len(text) <= most:
        return text
    start, _, last = text.rpartition("\n")
    end = f"…\n{last}" if start and len(last) <= MOST_FIELDS else "…"
    return text[: most - len(end)] + end


def _exif(parameters: str) -> Image.Exif:
    """Return the parameters as Exif's UserComment."""
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[EXIF_USER_COMMENT] = b"UNICODE\0" + _cut(parameters, MOST_EXIF).encode(
        "utf-16-be", "replace"
    )
    return exif


def by_policy(pixels: np.ndarray, on_flagged: OnFlagged) -> np.ndarray | None:
    """What is stored or given of a flagged image, None for nothing."""
    match on_flagged:
        case "blank":
            return blank(pixels)
        case "blur":
            return blur(pixels)
        case "drop":
            return None
        case "keep" | "quarantine":
            return pixels


def blank(pixels: np.ndarray) -> np.ndarray:
    """A black image of the same size, which is what diffusers gives for a flagged one."""
    return np.zeros_like(pixels)


def blur(pixels: np.ndarray) -> np.ndarray:
    """The image blurred until no shape is left: by a sixteenth of its longer side."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(max(pixels.shape[:2]) / 16)))
