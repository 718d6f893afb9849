"""Render a random sample of committed results again, and compare it with what the manifest records."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batch_infer.errors import DamagedPartError, StoppedError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.description import find_environment, has_one_set_of_marks
from batch_infer.jobs.diff import ImageComparison, compare_environments, compare_images
from batch_infer.jobs.progress import Progress
from batch_infer.jobs.recovery import read_intact
from batch_infer.jobs.rescorer import IMAGE_NOT_KEPT
from batch_infer.jobs.run import render_tables
from batch_infer.jobs.run_json import find_lora_column, read_settings
from batch_infer.jobs.summary import JsonStruct
from batch_infer.jobs.verify.problems import Problem
from batch_infer.jobs.verify.sample_run import (
    CELLS,
    make_sample_id,
    make_sample_settings,
    refuse_other_model,
    write_sample_table,
)
from batch_infer.manifest import SCHEMA, CommittedImage, Manifest, ManifestIndex, read_part, run_number
from batch_infer.provenance import is_signed
from batch_infer.sinks import make_sink
from batch_infer.store import Store, open_store, prefetch, temporary_folder

MIN_PSNR = 30.0
"""Lowest PSNR in dB of a reproduced image if the device, a setting of it or a version of a library differs.

With the demo model at 20 steps, 16 images in bfloat16 have a PSNR of at least 49.8 dB against those in float32, and
images of other seeds 12 to 46 dB. Large models amplify rounding differences, so the limit is lower than 49.8 dB.
Similar images pass even if their seeds differ.
"""
STATUSES = ("ok", "flagged")
"""Statuses of results with an image."""
_RECORDED_COLUMNS = (
    *("id", "image_index", *CELLS, "generated_image", "status", "sha256", "pixels_sha256", "image_bytes"),
    *("fingerprint", "slots"),
)
_COMPARED_COLUMNS = (
    *("id", "generated_image", "status", "error", "sha256", "pixels_sha256", "image_bytes", "fingerprint", "slots"),
)
_RUN_NUMBER = "run_number"
_NAMES = ("OUT", "the new image")


class Sample(JsonStruct):
    """Outcome of rendering a sample again.

    `rendered` results were compared. `equal_bytes` and `equal_pixels` count those whose image has the recorded bytes or
    pixels. `largest` is the largest difference of a channel value and `psnr_min` the lowest PSNR in dB of the others,
    or None if there are none. `environment` maps the device settings and versions that differ from those of the run
    that rendered an image to their values then and now. With any of them, an image is reproduced if
    its PSNR is at least MIN_PSNR, otherwise only if its bytes are equal.
    """

    rendered: int = 0
    equal_bytes: int = 0
    equal_pixels: int = 0
    largest: int | None = None
    psnr_min: float | None = None
    environment: dict[str, tuple[Any, Any]] = {}
    problems: list[Problem] = []

    def add(self, comparison: ImageComparison) -> None:
        self.equal_pixels += comparison.differs is False
        if comparison.largest is not None and comparison.psnr is not None:
            self.largest = max(comparison.largest, self.largest or 0)
            self.psnr_min = comparison.psnr if self.psnr_min is None else min(comparison.psnr, self.psnr_min)


def choose_sample(index: ManifestIndex, count: int, seed: int) -> list[CommittedImage]:
    """Return `count` random results with an image, or all if there are fewer, in the order of parts.

    `seed` and the id and index of an image decide whether it is chosen, but not the parts, so that merging or adding
    parts does not change the sample more than necessary. At most `count` results are in memory. Raises StorageError.
    """
    if count <= 0:
        return []
    chosen: list[tuple[int, str, int, CommittedImage]] = []  # a heap, whose first entry has the largest digest
    columns = ("id", "image_index", "status", "generated_image", "error")
    for part in prefetch(index.parts.values()):
        table = read_part(part, columns)
        for number, (name, image_index, status, path, error) in enumerate(_iterate_rows(table, columns)):
            order = -_digest(seed, name, image_index)
            is_original = path is not None and status in STATUSES and IMAGE_NOT_KEPT not in (error or "")
            if not is_original or (len(chosen) >= count and order <= chosen[0][0]):
                continue
            image = index.find((name, image_index))
            if image is not None and (image.part, image.row) == (part.name, number):  # else a later attempt counts
                heapq.heappush(chosen, (order, name, image_index, image))
            if len(chosen) > count:
                heapq.heappop(chosen)
    return sorted((image for *_, image in chosen), key=lambda image: (image.part, image.row))


def reproduce(
    store: Store,
    record: Mapping[str, Any],
    index: ManifestIndex,
    images: Sequence[CommittedImage],
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
) -> Sample:
    """Render results of OUT again from their recorded cells, and compare them with the manifest.

    They are rendered into a temporary folder, with the settings and, if possible, the device settings of run.json. OUT
    is only read. Results of damaged parts are left out. Raises SettingsError if the model or its scheduler is not that
    of the run, the errors of `render_tables`, StorageError and StoppedError.
    """
    rows = list(_read_rows(index, images, find_lora_column(record)))
    if not rows:
        return Sample()
    with temporary_folder() as folder:
        settings = make_sample_settings(record, store.location, Path(folder))
        refuse_other_model(store.location, record, settings)
        write_sample_table(rows, find_lora_column(record), settings)
        with outdir.locked(settings.out) as new_store:  # a run that continues another one keeps its device settings
            outdir.write_run(new_store, {"compute": record.get("compute", {})})
        summary = render_tables(settings, progress, stop)
        if summary.unfinished:
            raise StoppedError("stopped before the sample was rendered. Run the same command again")
        return _SampleComparison(store, record, open_store(settings.out)).compare(rows)


def _digest(seed: int, name: str, image_index: int) -> int:
    text = f"{seed} {image_index} {name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _iterate_rows(table: pa.Table, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in columns), strict=True)


def _read_rows(
    index: ManifestIndex, images: Sequence[CommittedImage], lora_column: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the recorded columns of results, except those of damaged parts, which other checks report."""
    schema = pa.schema([SCHEMA.field(name) for name in _RECORDED_COLUMNS])
    if lora_column is not None:
        schema = schema.append(pa.field(lora_column, pa.string()))
    for part, group in groupby(images, lambda image: image.part):
        try:
            rows = index.read_results(list(group), schema).to_pylist()
        except DamagedPartError:
            continue
        yield from ({**row, _RUN_NUMBER: run_number(index.parts[part])} for row in rows)


class _SampleComparison:
    """Compares results with their new versions. The manifest and the images of both are read."""

    def __init__(self, store: Store, record: Mapping[str, Any], new_store: Store) -> None:
        self._sink, self._new_store, self._new_sink = make_sink(store), new_store, make_sink(new_store)
        self._record, self._new_record = record, outdir.read_existing_run(new_store)
        self._signs_images = "c2pa" in read_settings(record, store.location).output.provenance.marks
        self._has_one_set_of_marks = has_one_set_of_marks(record)
        self._sample = Sample()

    def compare(self, rows: Sequence[Mapping[str, Any]]) -> Sample:
        """Compare the recorded results with those in the new OUT. Raises StorageError."""
        schema = pa.schema([SCHEMA.field(name) for name in _COMPARED_COLUMNS])
        with Manifest(self._new_store).index() as index:
            for number, row in enumerate(rows):
                image = index.find((make_sample_id(number), 0))
                new = {} if image is None else index.read_results([image], schema).to_pylist()[0]
                if (detail := self._explain(row, new)) is not None:
                    if new.get("fingerprint") != row["fingerprint"]:
                        detail += "; the recorded cells do not match the fingerprint of the result"
                    self._sample.problems.append(
                        Problem("not_reproduced", row["id"], row["image_index"], row["generated_image"], detail)
                    )
        return self._sample

    def _explain(self, row: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
        """Count a result, and return why it is not reproduced, or None if it is."""
        sample = self._sample
        if new.get("status") not in STATUSES:
            return f"rendering it again ends with {new.get('status')}: {new.get('error')}"
        sample.rendered += 1
        may_differ = self._may_differ(row, new)
        if new["status"] != row["status"]:
            return f"its status is {row['status']}, and rendering it again gives {new['status']}"
        if new["sha256"] == row["sha256"]:
            sample.equal_bytes += 1
            sample.equal_pixels += 1
            return None
        comparison = compare_images(self._sink, row, self._new_sink, new, _NAMES)
        sample.add(comparison)
        if may_differ:
            is_close = comparison.is_unreadable or (comparison.psnr is not None and comparison.psnr >= MIN_PSNR)
            is_reproduced = comparison.differs is False or (is_close and _may_have_same_cells(row, new))
        else:
            is_unknown = comparison.differs is None and comparison.is_unreadable
            is_reproduced = is_unknown or (comparison.differs is False and self._may_have_other_bytes(row, new))
        if is_reproduced:
            return None
        prefix = "its pixels have another hash than the recorded one, and " if comparison.is_unreadable else ""
        return f"{prefix}{comparison.detail}"

    def _may_have_other_bytes(self, row: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        """Return whether the file of an image with equal pixels may differ. Raises StorageError.

        Another run may have used another --image-format or other marks, and a C2PA signature has other bytes each time.
        """
        path = row["generated_image"]
        if not self._has_one_set_of_marks or _suffix(path) != _suffix(new["generated_image"]):
            return True
        content = read_intact(self._sink, path, row["sha256"], row["image_bytes"])
        return self._signs_images if content is None else is_signed(content)

    def _may_differ(self, row: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        """Return whether the bytes may differ, because the environment does or another number of slots was used."""
        recorded = find_environment(self._record, row[_RUN_NUMBER] or self._record.get("run_number") or 0)
        differences = compare_environments(recorded, self._new_record)
        if row["slots"] != new["slots"]:
            differences["slots"] = (row["slots"], new["slots"])
        self._sample.environment.update(differences)
        return bool(differences)


def _may_have_same_cells(row: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether a result has the fingerprint of its new version.

    Also return True if it has a guidance value with more than six digits, which the manifest may have rounded.
    """
    values = [row[name] for name in ("guidance_scale", "guidance_rescale") if row[name] is not None]
    return row["fingerprint"] == new["fingerprint"] or any(np.float32(f"{value:.6g}") != value for value in values)


def _suffix(path: str) -> str:
    return path.rpartition(".")[2]
