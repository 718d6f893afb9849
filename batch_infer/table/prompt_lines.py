"""Read prompt files of sd-scripts and AUTOMATIC1111's web UI, with one prompt and its options per line.

A line that starts with `--` has the format of the web UI's script "Prompts from file or textbox", in which values may
be quoted: `--prompt "a red circle" --steps 20`. Other lines have the format of sd-scripts: `a red circle --n blurred
--s 20`. Both are described in the programs' documentation and sources: `line_to_prompt_dict` of
https://github.com/kohya-ss/sd-scripts, and `scripts/prompts_from_file.py` of
https://github.com/AUTOMATIC1111/stable-diffusion-webui.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from batch_infer.errors import RowError, TableError
from batch_infer.settings import FIELDS, LORA_FIELD
from batch_infer.table.base import RawRow, Reader, Scratch, TableFile
from batch_infer.table.fields import format_value
from batch_infer.table.jsonl import open_objects
from batch_infer.table.streams import open_bytes, open_text, read_lines

COMMENT = "#"
OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
"""Matches the start of an option. ` -- ` and `--5` in a prompt are text."""
FIELD_OPTIONS = {
    **{field: field for field in (*FIELDS, LORA_FIELD)},
    **{"n": "negative_prompt", "w": "width", "h": "height", "s": "num_inference_steps", "l": "guidance_scale"},
    **{"d": "seed", "steps": "num_inference_steps", "cfg_scale": "guidance_scale"},
}
"""Fields by option: those of sd-scripts, of the web UI, and the names of the fields themselves."""
COUNT_OPTIONS = ("n_iter", "batch_size")
"""Options of the web UI whose product is the number of images. There too, image k has seed + k."""
CARRIED_OPTIONS = frozenset(
    {
        # sd-scripts: samples during training, then gen_img with SDXL's sizes, deep shrink and gradual latent
        *("ss", "cn", "ctr", "rcfg", "fs", "g", "i"),
        *("t", "nl", "c", "am", "ow", "oh", "nw", "nh", "ct", "cl", "dsd1", "dst1", "dsd2", "dst2", "dsr"),
        *("glt", "glr", "gle", "gls", "glsn", "glus"),
        # the web UI
        *("sd_model", "outpath_samples", "outpath_grids", "prompt_for_display", "styles", "sampler_name"),
        *("subseed", "subseed_strength", "seed_resize_from_h", "seed_resize_from_w", "sampler_index"),
        *("restore_faces", "tiling", "do_not_save_samples", "do_not_save_grid"),
    }
)
"""Options of these programs that have no effect here. Their values are carried to the results."""


def open_prompt_lines(file: TableFile, prompt_column: str, scratch: Scratch) -> Reader:
    """Open a prompt file and find its columns in one pass.

    Raises OSError, StorageError, and TableError if the file is empty or UTF-16.
    """
    with open_bytes(file) as stream:
        if not stream.peek(1):
            raise TableError(f"{file.name} is empty")
    return open_objects(file, lambda: _read_prompts(file), ("prompt",))


def _read_prompts(file: TableFile) -> Iterator[RawRow]:
    row_number = 0
    with open_text(file, newline=None) as stream:
        for line, text, error in read_lines(stream):
            text = text.strip()
            if text.startswith(COMMENT):
                continue
            cells = {"prompt": text}
            if not error:
                try:
                    cells = parse_prompt_line(text)
                except RowError as row_error:
                    error = str(row_error)
            yield RawRow(row_number, cells, error, line)
            row_number += 1


def parse_prompt_line(text: str) -> dict[str, str]:
    """Return the cells of a line by column. Raises RowError for unknown or repeated options and missing values."""
    cells, counts = dict[str, str](), dict[str, str]()
    for name, value in _split_quoted(text) if OPTION.match(text) else _split_plain(text):
        column = FIELD_OPTIONS.get(name, name)
        target = counts if name in COUNT_OPTIONS else cells
        if name not in FIELD_OPTIONS and name not in COUNT_OPTIONS and name not in CARRIED_OPTIONS:
            raise RowError(f"option {format_value(f'--{name}')} is unknown")
        if not value:
            raise RowError(f"option --{name} has no value")
        if column in target:
            raise RowError(f"option --{name} sets {column}, which the line has set before")
        target[column] = value
    if cells.get("seed") == "-1":  # a random seed in both programs; here, the seed is derived from the row's id
        del cells["seed"]
    if counts:
        if "num_images_per_prompt" in cells:
            raise RowError(f"option --{next(iter(counts))} sets num_images_per_prompt, which the line has set before")
        cells["num_images_per_prompt"] = _multiply(counts)
    return cells


def _multiply(counts: dict[str, str]) -> str:
    product = 1
    for name, text in counts.items():
        if not re.fullmatch("[0-9]{1,9}", text):
            raise RowError(f"option --{name} {format_value(text)} is not a whole number")
        product *= int(text)
    return str(product)


def _split_plain(text: str) -> Iterator[tuple[str, str]]:
    """Split a line of sd-scripts into options and their values. Only values of the web UI's options may be quoted."""
    prompt, *parts = OPTION.split(text)
    if prompt.strip():
        yield "prompt", prompt.strip()
    for part in parts:
        name, value = (re.split(r"[\s=]", part, maxsplit=1) + [""])[:2]
        value = value.strip()
        if len(name) > 1 and len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        yield name.lower(), value


def _split_quoted(text: str) -> Iterator[tuple[str, str]]:
    """Split a line of the web UI into options and their values. Raises RowError for a missing quote."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RowError(
            f"its options cannot be read ({str(error)[:1].lower()}{str(error)[1:]}): put values with a quote or an "
            "apostrophe in double quotes"
        ) from error
    name, values = words[0][2:], list[str]()
    for word in words[1:]:
        if word.startswith("--") and word[2:3].isalpha():
            yield name.lower(), " ".join(values)
            name, values = word[2:], []
        else:
            values.append(word)
    yield name.lower(), " ".join(values)
