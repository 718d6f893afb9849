"""Encode and decode image files, and apply the policy for flagged images."""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFilter
from PIL.PngImagePlugin import PngInfo

from batch_infer.errors import RowError, first_line
from batch_infer.records import PromptRequest
from batch_infer.settings import IMAGE_SUFFIXES, ImageFormat, OnFlagged

FORMAT_BY_SUFFIX: dict[str, ImageFormat] = {suffix: image_format for image_format, suffix in IMAGE_SUFFIXES.items()}
PNG_LEVEL = 4
QUALITY = {"jpeg": 95, "webp": 90}
MAX_TEXT_LENGTH = 50_000
"""Maximum number of characters in a PNG text, at most 200 kB in UTF-8. Pillow rejects files with a text over 1 MiB."""
MAX_EXIF_LENGTH = 15_000
"""Maximum number of characters in Exif, at most 60 kB in UTF-16. A JPEG can contain 64 KiB of Exif."""
MAX_LAST_LINE_LENGTH = 1_000

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DECODING_ERRORS = (OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, struct.error, zlib.error)
"""Exceptions that Pillow raises for damaged files and for files that are not images."""

XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""
"""Marks an image as generated, with the Digital Source Type of the IPTC Photo Metadata Standard."""


def format_parameters(request: PromptRequest, scheduler: str, model_hash: str) -> str:
    """Format a row's parameters like AUTOMATIC1111's web UI, so that other programs can read them.

    The text contains the model's fingerprint, but not the name of its folder or the version of this package, so that
    image bytes do not depend on these.
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
        "Lora hashes": f"{request.lora.path.stem}: {request.lora.fingerprint[:12]}" if request.lora else None,
        "Lora weight": f"{request.lora.weight:g}" if request.lora else None,
        "CFG rescale": f"{params.guidance_rescale:g}" if params.guidance_rescale else None,
        "Version": "batch-infer",
    }
    lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in fields.items() if value is not None))
    return "\n".join(lines)


def _quote(value: Any) -> str:
    """Return a value as text, quoted as JSON if AUTOMATIC1111's parser would otherwise split it."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(character in text for character in ",:\n") else text


def encode(pixels: np.ndarray, image_format: ImageFormat, parameters: str | None, *, has_mark: bool = True) -> bytes:
    """Encode an image (H, W, 3) uint8 as a file that also contains its parameters, shortened if too long, and XMP.

    `parameters` is None if the file must not contain them. XMP is the mark of a generated image.
    """
    image, stream = Image.fromarray(pixels), io.BytesIO()
    if image_format == "png":
        text = PngInfo()
        if parameters is not None:
            text.add_text("parameters", _shorten(parameters, MAX_TEXT_LENGTH))  # as iTXt if it is not Latin-1
        if has_mark:
            text.add_itxt("XML:com.adobe.xmp", XMP)
        image.save(stream, image_format, pnginfo=text, compress_level=PNG_LEVEL)
    else:
        metadata: dict[str, Any] = {"xmp": XMP.encode()} if has_mark else {}
        if parameters is not None:
            metadata["exif"] = exif = Image.Exif()
            comment = _shorten(parameters, MAX_EXIF_LENGTH).encode("utf-16-be", "replace")
            exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + comment
        image.save(stream, image_format, quality=QUALITY[image_format], **metadata)
    return stream.getvalue()


def decode(content: bytes) -> np.ndarray:
    """Decode an image file to pixels (H, W, 3) uint8. Raises RowError if it cannot be opened.

    Text in a PNG is skipped, because Pillow rejects files with more than 64 MiB of text.
    """
    with opened_image(content) as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def opened_image(content: bytes) -> Iterator[Image.Image]:
    """Open an image file, without its text if it is a PNG. Raises RowError, also for errors of decoding in the context.

    Pillow decodes the pixels when they are first used.
    """
    try:
        with Image.open(io.BytesIO(_without_text(content))) as image:
            yield image
    except (*_DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise RowError(f"its image cannot be opened ({first_line(error)})") from error


def _without_text(content: bytes) -> bytes:
    """Return a PNG without its text chunks, and other content unchanged."""
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


def compute_psnr(image: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images of equal shape in dB, or infinity if they are equal."""
    error = float(np.mean((image.astype(np.float64) - other.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def hash_pixels(pixels: np.ndarray) -> str:
    """Return the SHA-256 of an image's mode, size and pixels (H, W, 3) uint8.

    It does not depend on the file format, the text in the file or the version of the encoder.
    """
    height, width, _ = pixels.shape
    digest = hashlib.sha256(f"RGB {width}x{height}\n".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _shorten(text: str, length: int) -> str:
    """Shorten a text to at most `length` characters: replace its end with `…`, but keep a short last line."""
    if len(text) <= length:
        return text
    start, _, last = text.rpartition("\n")
    end = f"…\n{last}" if start and len(last) <= MAX_LAST_LINE_LENGTH else "…"
    return text[: length - len(end)] + end


def apply_policy(pixels: np.ndarray, on_flagged: OnFlagged) -> np.ndarray | None:
    """Return the pixels to store for a flagged image, or None to store no image.

    `blank` is a black image, as in diffusers. `blur` uses a radius of 1/16 of the longer side, which hides details.
    """
    match on_flagged:
        case "blank":
            return np.zeros_like(pixels)
        case "blur":
            radius = max(pixels.shape[:2]) / 16
            return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
        case "drop":
            return None
        case "keep" | "quarantine":
            return pixels
