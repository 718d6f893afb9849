"""Embed and detect an invisible watermark in pixels, with the DWT-DCT-SVD codec of the library wmforge.

The codec works block by block, so its watermark is lost when an image is resized. Like TrustMark (Bui et al., arXiv
2311.18297), this module embeds into a copy of a fixed size, and adds the upscaled difference to the image. The detector
resizes to the same size.

Only a block's largest singular value carries a bit, as in the method dwtDctSvd of the library invisible-watermark. The
second value, which wmforge also uses, costs 5 dB and fails on drawings.
"""

from __future__ import annotations

import hashlib
from functools import cache
from types import ModuleType

import numpy as np
from PIL import Image

from batch_infer import images
from batch_infer.errors import SettingsError
from batch_infer.extras import install_command

INSTALL = f"the watermark needs wmforge: {install_command('provenance', 'wmforge')}"
VERSION = "dwtDctSvd 1"
"""The algorithm and its parameters, which decide the pixels of a marked image. Change it with any of them."""
MIN_SIDE = 256
"""Shortest side in pixels of an image that can be marked."""

_PAYLOAD = b"batch-infer/AI generated"
_SIDE = 128
"""Side in pixels of the fixed size, the first wavelet approximation of a 256x256 copy."""
_BLOCK = 4
_BLOCKS = _SIDE // _BLOCK
_BITS = _BLOCKS**2
_STEP = 32.0
"""Quantization step of a block's largest singular value, which is 8 times the block's mean luma if the block is flat.

With 32, the values of black (0) and white (2040) are not near the top of an interval, so that clipping costs few bits.
"""
_SECOND_STEP = 1e-3
"""Quantization step of the second singular value, so small that the value stays the same."""
_ORDER = np.tile(np.arange(_BLOCK**2), (_BITS, 1))
"""The order of the coefficients in each block, which wmforge can shuffle."""
_MIN_MATCHES = 600
"""Minimum number of the 1,024 bits that match in a marked image.

An unmarked image has 600 matches or more with a probability of 2e-8, since its bits do not depend on the pattern.
"""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in luma (ITU-R BT.601). Their sum is 1."""


def add_watermark(pixels: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) uint8 with the watermark.

    The same pixels give the same result on one machine with the same library versions. The image must have at least
    MIN_SIDE pixels on each side. Raises SettingsError if the library is not installed.
    """
    height, width, _ = pixels.shape
    before = _read_blocks(pixels)
    after = _load_codec().embed_blocks(before, _make_pattern(), _ORDER, _STEP, _SECOND_STEP)
    # The inverse wavelet transform spreads a change of the approximation over 2x2 pixels, and each gets half of it.
    difference = ((after - before) / 2).reshape(_BLOCKS, _BLOCKS, _BLOCK, _BLOCK).swapaxes(1, 2).reshape(_SIDE, _SIDE)
    change = Image.fromarray(difference).resize((width, height), Image.Resampling.BICUBIC)
    marked = np.rint(pixels + np.asarray(change, np.float32)[..., None])
    return marked.clip(0, 255).astype(np.uint8)


def count_matches(pixels: np.ndarray) -> int:
    """Return how many of the watermark's 1,024 bits an image (H, W, 3) uint8 contains. Raises SettingsError."""
    scores = _load_codec().extract_blocks(_read_blocks(pixels), _ORDER, _STEP, _SECOND_STEP)
    return int(((scores > 0.5) == _make_pattern()).sum())


def has_watermark(content: bytes) -> bool:
    """Return whether an image file contains the watermark. Raises RowError if it is not an image.

    Raises SettingsError if the library is not installed.
    """
    return count_matches(images.decode(content)) >= _MIN_MATCHES


def check_library() -> None:
    """Raise SettingsError if the library is not installed."""
    _load_codec()


def _read_blocks(pixels: np.ndarray) -> np.ndarray:
    """Return the blocks (N, 4, 4) float32 of the Haar approximation of the luma of a 256x256 copy, row by row.

    The approximation is twice the mean of each 2x2 pixels. A box filter keeps the means of an image that was halved.
    """
    luma = Image.fromarray(pixels.astype(np.float32) @ _LUMA)
    approximation = 2 * np.asarray(luma.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
    rows: np.ndarray = approximation.reshape(_BLOCKS, _BLOCK, _BLOCKS, _BLOCK).swapaxes(1, 2)
    return rows.reshape(_BITS, _BLOCK, _BLOCK)


@cache
def _make_pattern() -> np.ndarray:
    """Return the bits of the watermark, which spread the payload over all blocks."""
    digest = hashlib.shake_256(_PAYLOAD).digest(_BITS // 8)
    return np.unpackbits(np.frombuffer(digest, np.uint8))


@cache
def _load_codec() -> ModuleType:
    try:
        import wmforge.core
    except ImportError as error:
        raise SettingsError(f"{INSTALL} ({error})") from error
    module: ModuleType = wmforge.core
    return module
