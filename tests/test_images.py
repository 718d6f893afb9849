"""Image files: pixels, parameters, the mark of generated images, and the policies for flagged images."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from batch_infer import __version__, images
from batch_infer.records import PromptRequest, SamplingParams, Source
from batch_infer.settings import IMAGE_SUFFIXES, ImageFormat
from batch_infer.sinks.folder import FolderSink
from batch_infer.table.fields import MAX_TEXT_LENGTH
from batch_infer.table.rows import RowCells, make_requests
from tests.tables import RULES

FORMATS = get_args(ImageFormat)
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
REQUEST = PromptRequest(
    "a", 0, "a red circle", "blurry", 2**63 - 1, SamplingParams(512, 768, 30, 7.5, 0.0), Source("t.csv", 0), "f"
)
PROMPTS = {
    "ASCII": "a red circle, (large:1.2)",
    "Latin-1": "café à la crème",
    "other": "赤い丸 🎨 красный круг",
    "lines": "two\nlines\r\nand\ta tab",
    "long": "word " * 1000,
}


def parameters_of(content: bytes) -> str:
    """Return the parameters as other programs read them: PNG text, or Exif's UserComment."""
    image = Image.open(io.BytesIO(content))
    if image.format == "PNG":
        return str(image.info["parameters"])
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    return str(comment[8:].decode("utf-16-be"))


def mark_of(content: bytes) -> str:
    packet = (
        Image.open(io.BytesIO(content)).info.get("XML:com.adobe.xmp") or Image.open(io.BytesIO(content)).info["xmp"]
    )
    return packet if isinstance(packet, str) else packet.decode()


def test_parameters_have_the_format_of_a1111() -> None:
    """Prompt, negative prompt, and one line that begins with the steps, as programs that read A1111's images expect."""
    text = images.format_parameters(replace(REQUEST, params=replace(REQUEST.params, guidance_rescale=0.7)), "S", "a1b2")
    lines = text.split("\n")
    assert lines[:2] == ["a red circle", "Negative prompt: blurry"]
    assert re.match(
        rf"Steps: 30, Sampler: S, CFG scale: 7.5, Seed: {2**63 - 1}, Size: 768x512, Model hash: a1b2, "
        "CFG rescale: 0.7, ",
        lines[2],
    )


def test_absent_parameters_are_not_written() -> None:
    text = images.format_parameters(replace(REQUEST, negative_prompt=None), "DDIMScheduler", "m")
    assert "Negative" not in text
    assert "rescale" not in text


def test_bytes_do_not_depend_on_the_version_of_this_package() -> None:
    text = images.format_parameters(REQUEST, "DDIMScheduler", "a1b2")
    assert text.endswith("Version: batch-infer")
    assert __version__ not in text


def test_values_with_commas_are_quoted() -> None:
    last = images.format_parameters(REQUEST, 'DPM:a=1,b="x"', "a\\b, c").split("\n")[-1]
    fields = dict(re.findall(r'\s*([\w ]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert fields["Sampler"] == r'"DPM:a=1,b=\"x\""'
    assert fields["Model hash"] == r'"a\\b, c"'
    assert fields["Size"] == "768x512"


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=list(PROMPTS))
@pytest.mark.parametrize("image_format", FORMATS)
def test_parameters_round_trip(image_format: ImageFormat, prompt: str) -> None:
    text = images.format_parameters(replace(REQUEST, prompt=prompt, negative_prompt=prompt), "DDIMScheduler", "model")
    assert parameters_of(images.encode(PIXELS, image_format, text)) == text


@pytest.mark.parametrize("image_format", FORMATS)
def test_parameters_of_any_length_fit(image_format: ImageFormat) -> None:
    """A mark replaces omitted text, the line of fields is kept, and no surrogate pair is split."""
    for fields in ("\nSteps: 30, Seed: 1", "", "\n" + "x" * 200_000):
        text = "x" + 20_000_000 * "🎨" + fields
        stored = parameters_of(images.encode(PIXELS, image_format, text))
        start, mark, end = stored.partition("…")
        assert text.startswith(start) and mark
        assert end == ("" if len(fields) > 1_000 else fields)
        assert len(stored) >= 10_000


LONG = st.tuples(st.sampled_from(["a", "é", "赤", "🎨", ".\n", "\\", "á\t"]), st.text(max_size=20)).map(
    lambda parts: (parts[1].replace("\0", "") + parts[0] * MAX_TEXT_LENGTH)[:MAX_TEXT_LENGTH]
)


@settings(max_examples=20)
@given(prompt=LONG, negative=LONG, scheduler=st.sampled_from(["DDIMScheduler", "D:" + "a=1," * 2_000]))
@pytest.mark.parametrize("image_format", FORMATS)
def test_the_longest_row_gives_a_file_that_opens(
    image_format: ImageFormat, prompt: str, negative: str, scheduler: str
) -> None:
    """It opens with Pillow's default limits, which other programs use."""
    cells = {"prompt": prompt, "negative_prompt": negative, "seed": 2**63 - 1, "height": 512, "width": 512}
    (request,) = make_requests(RowCells("a" * MAX_TEXT_LENGTH, Source("t.csv", 0), cells, {}), RULES)
    assert isinstance(request, PromptRequest)
    content = images.encode(PIXELS, image_format, images.format_parameters(request, scheduler, "f" * 64))
    with Image.open(io.BytesIO(content)) as image:
        assert image.convert("RGB").size == (40, 24)
    stored = parameters_of(content)
    assert stored.startswith(prompt[:10_000])
    if image_format == "png":
        assert f"\nNegative prompt: {negative}\nSteps: 20, Sampler: " in stored
    assert "Steps: 20" in stored or len(scheduler) > 1_000
    assert images.decode(content).shape == PIXELS.shape


def test_the_longest_id_has_a_short_path() -> None:
    assert len(FolderSink(Path(), ".png").path_of(replace(REQUEST, id="ä" * MAX_TEXT_LENGTH)).encode()) < 200


@pytest.mark.parametrize("image_format", FORMATS)
def test_images_are_marked_as_generated(image_format: ImageFormat) -> None:
    mark = mark_of(images.encode(PIXELS, image_format, "x"))
    assert "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia" in mark
    assert "DigitalSourceType" in mark


@pytest.mark.parametrize("image_format", FORMATS)
def test_pixels_round_trip(image_format: ImageFormat) -> None:
    smooth = np.repeat(np.linspace(0, 255, 40).astype(np.uint8)[None, :, None], 24, 0).repeat(3, 2)
    content = images.encode(smooth, image_format, "x")
    decoded = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert decoded.shape == smooth.shape
    assert np.abs(decoded.astype(int) - smooth).max() <= (0 if image_format == "png" else 4)
    assert content == images.encode(smooth, image_format, "x"), "the same bytes for the same pixels"


@pytest.mark.parametrize(("image_format", "suffix"), [("png", ".png"), ("jpeg", ".jpg"), ("webp", ".webp")])
def test_suffixes(image_format: ImageFormat, suffix: str) -> None:
    assert IMAGE_SUFFIXES[image_format] == suffix
    assert Image.registered_extensions()[suffix].lower() == image_format


def test_blank_is_black() -> None:
    black = images.apply_policy(PIXELS, "blank")
    assert black is not None
    assert (black.shape, black.dtype, black.max()) == (PIXELS.shape, np.dtype(np.uint8), 0)
    assert PIXELS.max() == 255, "the image itself is not changed"


@pytest.mark.parametrize("side", [64, 512])
def test_blur_keeps_colours_and_no_shapes(side: int) -> None:
    """At every size, a sharp checkerboard with cells of an eighth of the side becomes an even grey."""
    cells = np.indices((8, 8)).sum(0) % 2 * 255
    board = np.kron(cells, np.ones((side // 8, side // 8), int)).astype(np.uint8)[:, :, None].repeat(3, 2)
    blurred = images.apply_policy(board, "blur")
    assert blurred is not None
    middle = blurred[side // 4 : -side // 4, side // 4 : -side // 4].astype(int)
    assert (blurred.shape, blurred.dtype) == (board.shape, np.dtype(np.uint8))
    assert middle.max() - middle.min() < 64 < 255
    assert abs(int(middle.mean()) - 127) < 8
