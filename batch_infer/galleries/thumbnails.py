"""Make thumbnails and previews of images."""

from __future__ import annotations

import io

from PIL import Image, ImageFilter

from batch_infer.errors import RowError, first_line
from batch_infer.images import opened_image

MAX_PIXELS = 1 << 26
"""Maximum number of pixels of an image to decode, as many as the largest that a run renders (8192 x 8192)."""
THUMBNAIL_QUALITY = 80
PREVIEW_QUALITY = 90
WEBP_METHOD = 2
"""Effort of the WebP encoder, from 0 to 6. The default is 4."""
REDUCING_GAP = 2.0
"""How far an image may first be reduced by a fast method. A JPEG file is then decoded at a fraction of its size."""
BLUR_SHARE = 1 / 12
"""Radius of the blur of a flagged image's thumbnail, as a share of the longer side. It hides faces and details."""


def make_pictures(content: bytes, size: int, *, is_blurred: bool, needs_preview: bool) -> tuple[bytes, bytes | None]:
    """Return a thumbnail of at most `size` pixels on the longer side, never enlarged, and a preview if needed.

    The preview has the size of the image. Both are WebP files without metadata. Raises RowError.
    """
    with opened_image(content) as image:
        if image.width * image.height > MAX_PIXELS:
            raise RowError(f"its image has {image.width} x {image.height} pixels, which is too large")
        if needs_preview or image.mode not in ("RGB", "L"):
            picture = image.convert("RGB")
        else:  # a JPEG image must not be loaded before, so that it is decoded at a fraction of its size
            _reduce(image, size)
            picture = image.convert("RGB")
    preview = _encode(picture, PREVIEW_QUALITY) if needs_preview else None
    _reduce(picture, size)
    if is_blurred:
        picture = picture.filter(ImageFilter.GaussianBlur(max(picture.size) * BLUR_SHARE))
    return _encode(picture, THUMBNAIL_QUALITY), preview


def _reduce(picture: Image.Image, size: int) -> None:
    """Reduce a larger picture in place to `size` pixels on the longer side."""
    picture.thumbnail((size, size), Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)


def _encode(picture: Image.Image, quality: int) -> bytes:
    """Encode a picture as WebP. Raises RowError, for example for more than 16,383 pixels on a side."""
    stream = io.BytesIO()
    try:
        picture.save(stream, "webp", quality=quality, method=WEBP_METHOD, exif=b"", xmp=b"", icc_profile=b"")
    except (OSError, ValueError) as error:
        raise RowError(f"its copy for the page cannot be encoded ({first_line(error)})") from error
    return stream.getvalue()
