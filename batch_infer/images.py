"""Encode and decode image files, and apply the policy for flagged images."""

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

FORMAT_BY_SUFFIX: dict[str, ImageFormat] = {suffix: image_format for image_format, suffix in IMAGE_SUFFIXES.items()}
PNG_LEVEL = 4
JPEG_QUALITY = 95
WEBP_QUALITY = 90
EXIF_USER_COMMENT = 0x9286
EXIF_IFD = 0x8769
MAX_TEXT = 50_000
"""Maximum number of characters of text in a PNG, at most 200 kB. Pillow rejects files with a text over 1 MiB."""
MAX_EXIF = 15_000
"""Maximum number of characters in Exif, at most 60 kB as UTF-16. A JPEG can hold 64 KiB of Exif."""
MAX_LAST_LINE = 1_000

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DECODING_ERRORS = (OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, struct.error, zlib.error)
"""Exceptions that Pillow raises for damaged files and for files that are not images."""

XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""
"""Marks an image as generated: IPTC Photo Metadata Standard, Digital Source Type `trainedAlgorithmicMedia`."""


def format_parameters(request: PromptRequest, scheduler: str, model_hash: str) -> str:
    """Format a row's parameters like AUTOMATIC1111's web UI, so that other programs can read them.

    The text has the model's fingerprint and no version of this package, so that image bytes depend neither on the name
    of the model's folder nor on the release.
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
    lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in fields.items() if value is not None))
    return "\n".join(lines)


def _quote(value: Any) -> str:
    """Return a value as JSON if it contains a separator at which A1111's parser would split the line."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(character in text for character in ",:\n") else text


def encode(pixels: np.ndarray, image_format: ImageFormat, parameters: str) -> bytes:
    """Encode an image (H, W, 3) uint8 as a file that also contains its parameters and XMP."""
    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    parameters = _shorten(parameters, MAX_TEXT)
    match image_format:
        case "png":
            text = PngInfo()
            text.add_text("parameters", parameters)  # as iTXt if it is not Latin-1
            text.add_itxt("XML:com.adobe.xmp", XMP)
            image.save(stream, "PNG", pnginfo=text, compress_level=PNG_LEVEL)
        case "jpeg":
            image.save(stream, "JPEG", quality=JPEG_QUALITY, xmp=XMP.encode(), exif=_exif(parameters))
        case "webp":
            image.save(stream, "WEBP", quality=WEBP_QUALITY, xmp=XMP.encode(), exif=_exif(parameters))
    return stream.getvalue()


def decode(content: bytes) -> np.ndarray:
    """Decode an image file to pixels (H, W, 3) uint8. Raises RowError if it cannot be opened.

    PNG text is skipped, since Pillow rejects files with more than 64 MiB of text.
    """
    try:
        with Image.open(io.BytesIO(_without_text(content))) as image:
            return np.asarray(image.convert("RGB"))
    except (*_DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise RowError(f"its image cannot be opened ({first_line(error)})") from error


def _without_text(content: bytes) -> bytes:
    """Return a PNG without its text chunks. Other content is unchanged."""
    if not content.startswith(_PNG_SIGNATURE):
        return content
    chunks, offset = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while offset + 12 <= len(content):
        length = int.from_bytes(content[offset : offset + 4], "big")
        chunk = content[offset : offset + length + 12]
        if chunk[4:8] not in (b"tEXt", b"zTXt", b"iTXt"):
            chunks.append(chunk)
        offset += length + 12
    return b"".join(chunks)


def hash_pixels(pixels: np.ndarray) -> str:
    """Return the SHA-256 of an image's mode, size and pixels (H, W, 3) uint8.

    It does not depend on the file format, the text in the file or the encoder version.
    """
    height, width, _ = pixels.shape
    digest = hashlib.sha256(f"RGB {width}x{height}\n".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _shorten(text: str, length: int) -> str:
    """Shorten a text to `length` characters: replace its end with `…`, but keep a short last line with the fields."""
    if len(text) <= length:
        return text
    start, _, last = text.rpartition("\n")
    end = f"…\n{last}" if start and len(last) <= MAX_LAST_LINE else "…"
    return text[: length - len(end)] + end


def _exif(parameters: str) -> Image.Exif:
    """Return Exif with the parameters as UserComment."""
    exif = Image.Exif()
    comment = _shorten(parameters, MAX_EXIF).encode("utf-16-be", "replace")
    exif.get_ifd(EXIF_IFD)[EXIF_USER_COMMENT] = b"UNICODE\0" + comment
    return exif


def apply_policy(pixels: np.ndarray, on_flagged: OnFlagged) -> np.ndarray | None:
    """Return the pixels to store for a flagged image, or None to store no image."""
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
    """Return a black image of the same size, as diffusers does for a flagged image."""
    return np.zeros_like(pixels)


def blur(pixels: np.ndarray) -> np.ndarray:
    """Blur an image until no shape is recognisable, with a radius of 1/16 of its longer side."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(max(pixels.shape[:2]) / 16)))
