"""Draw the first rows of a run as a table with their images, as in the README.

batch-infer run examples/tour.csv -o tour-out
python examples/results_picture.py tour-out docs/images/results.png
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

MAX_ROWS = 8
SCALE = 2
"""Pixels of the picture per pixel at which it is shown."""
TILE, PADDING, HEADER = 56, 7, 28
COLUMNS = {
    "prompt": 220,
    "seed": 44,
    "steps": 46,
    "guidance": 66,
    "image": TILE + 2 * PADDING,
    "status": 72,
    "error": 200,
}
"""Widths of the columns."""
FIELDS = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
STATUS_COLOURS = {
    "ok": "#1a7f37",
    "flagged": "#bc4c00",
    "blocked": "#bc4c00",
    "invalid": "#cf222e",
    "failed": "#cf222e",
}
INK, RULE, SHADE = "#1f2328", "#d1d9e0", "#f6f8fa"
CHARACTER = 6.4
"""Mean width of a character."""


def draw_results(rows: list[dict[str, Any]], out: Path) -> Image.Image:
    """Return a picture of the rows."""
    tall = TILE + 2 * PADDING
    size = sum(COLUMNS.values()), HEADER + tall * len(rows) + 1
    picture = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13 * SCALE)
    pen.rectangle((0, 0, size[0] * SCALE, HEADER * SCALE), fill=SHADE)
    for number, row in enumerate([dict.fromkeys(COLUMNS), *rows]):
        top = HEADER + (number - 1) * tall if number else 0
        middle = top + (tall if number else HEADER) / 2
        left = 0
        for column, width in COLUMNS.items():
            if number and column == "image":
                _paste(picture, row, out, (left + PADDING, top + PADDING))
            else:
                text = _text(row, column) if number else column
                lines = "\n".join(textwrap.wrap(text, int(width / CHARACTER) - 1))
                colour = STATUS_COLOURS[row["status"]] if number and column == "status" else INK
                place = (left + PADDING) * SCALE, middle * SCALE
                pen.multiline_text(place, lines, fill=colour, font=font, anchor="lm", spacing=5 * SCALE)
            left += width
        pen.line((0, top * SCALE, size[0] * SCALE, top * SCALE), fill=RULE, width=SCALE)
    return picture


def _text(row: dict[str, Any], column: str) -> str:
    value = row[FIELDS.get(column, column)]
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def _paste(picture: Image.Image, row: dict[str, Any], out: Path, place: tuple[float, float]) -> None:
    """Paste the row's image, or leave its place empty."""
    if row["generated_image"]:
        with Image.open(out / row["generated_image"]) as image:
            tile = image.resize((TILE * SCALE, TILE * SCALE), Image.Resampling.BICUBIC)
        picture.paste(tile, (round(place[0] * SCALE), round(place[1] * SCALE)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of a finished run")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    options = parser.parse_args()
    columns = [*(FIELDS.get(column, column) for column in COLUMNS if column != "image"), "generated_image"]
    rows = pq.read_table(options.out / "results.parquet", columns=columns).to_pylist()
    draw_results(rows[:MAX_ROWS], options.out).save(options.picture, optimize=True)


if __name__ == "__main__":
    main()
