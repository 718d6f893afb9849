"""Carried columns that are named almost as a field is: probably meant for it, and of no effect."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping

from batch_infer.settings import FIELDS
from batch_infer.table.carrying import Opened

SYNONYMS = {
    "id": ("uid", "rowid", "promptid", "customid"),
    "negative_prompt": ("negative", "neg", "negprompt", "negativetext", "uncond"),
    "seed": ("seeds", "randomseed", "rngseed", "noiseseed"),
    "height": ("h", "imageheight"),
    "width": ("w", "imagewidth"),
    "num_inference_steps": ("steps", "numsteps", "nsteps", "inferencesteps", "samplingsteps", "ddimsteps"),
    "guidance_scale": ("guidance", "cfg", "cfgscale"),
    "guidance_rescale": ("rescale", "cfgrescale"),
    "num_images_per_prompt": ("n", "numimages", "nimages", "imagesperprompt", "numsamples", "nsamples", "numoutputs"),
}
"""What other tools call the fields, in lower case and without spaces, hyphens and underscores."""
LIKE = 0.8
"""difflib's ratio from which a name of the same first letter counts as misspelt: `heigth`, and not `weight`."""
SHORTEST = 5
"""Letters of a name that may be misspelt: of fewer, too many other words are near."""


def near_fields(files: Iterable[Opened], columns: Mapping[str, str]) -> list[str]:
    """A sentence for each carried column that seems to be meant for a field which its table does not have.

    `columns` are the user's own names for fields; a field that is to have none is not missed.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for opened in files:
        missed = [field for field in FIELDS if field not in opened.layout.fields and columns.get(field) != ""]
        for field, name in _near(missed, opened.layout.carried):
            found.setdefault((field, name), []).append(opened.file.name)
    return [
        f"{_some(names)}: column {name!r} is carried and has no effect; if it is the {field}, add "
        f"--column {shlex.quote(f'{field}={name}')}"
        for (field, name), names in found.items()
    ]


def _near(missed: list[str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each missed field with the first column that is near it."""
    keys = {name: _key(name) for name in names}
    for field in missed:
        wanted = _key(field)
        alike = {name for name, key in keys.items() if key == wanted or key in SYNONYMS.get(field, ())}
        if not alike and len(wanted) >= SHORTEST:
            alike = {name for name, key in keys.items() if _is_like(key, wanted)}
        if alike:
            yield field, next(name for name in keys if name in alike)


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _is_like(key: str, wanted: str) -> bool:
    return len(key) >= SHORTEST and key[0] == wanted[0] and difflib.SequenceMatcher(None, key, wanted).ratio() >= LIKE


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
