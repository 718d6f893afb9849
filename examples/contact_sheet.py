"""Arrange the images of a run on one sheet, each above its prompt."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

COLUMNS, MAX_IMAGES = 10, 60
TILE, MARGIN, LINES = 112, 8, 3
CHARACTERS = 22
"""Characters per line of text."""
COLOURS = {"ok": "#444444", "flagged": "#b00020"}


def contact_sheet(results: list[dict[str, Any]], out: Path, path: Path) -> None:
    """Draw the images of some results and write them as PNG."""
    font = ImageFont.load_default(size=9)
    wide, tall = TILE + MARGIN, TILE + LINES * 11 + MARGIN
    sheet = Image.new("RGB", (COLUMNS * wide + MARGIN, -(-len(results) // COLUMNS) * tall + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for index, row in enumerate(results):
        x, y = index % COLUMNS * wide + MARGIN, index // COLUMNS * tall + MARGIN
        with Image.open(out / row["generated_image"]) as image:
            image.thumbnail((TILE, TILE))
            scale = TILE / max(image.size)
            tile = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        sheet.paste(tile, (x + (TILE - tile.width) // 2, y))
        text = row["prompt"] if row["status"] == "ok" else f"flagged: {row['prompt']}"
        for number, line in enumerate(textwrap.wrap(text, CHARACTERS)[:LINES]):
            pen.text((x, y + TILE + 2 + 11 * number), line, fill=COLOURS[row["status"]], font=font)
    sheet.quantize(200).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of a finished run")
    parser.add_argument("sheet", type=Path, nargs="?", help="PNG file to write (default: OUT/contact_sheet.png)")
    options = parser.parse_args()
    out, path = options.out, options.sheet or options.out / "contact_sheet.png"
    if not (out / "results.parquet").is_file():
        parser.error(f"{out} has no results.parquet: run `batch-infer run TABLE --out {out}` first")
    columns = ["prompt", "status", "generated_image"]
    rows = pq.read_table(out / "results.parquet", columns=columns).to_pylist()
    contact_sheet([row for row in rows if row["generated_image"]][:MAX_IMAGES], out, path)
    print(f"sheet    {path}")


if __name__ == "__main__":
    main()
