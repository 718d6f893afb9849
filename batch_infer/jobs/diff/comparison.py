"""Compare the results of two runs: their settings, statuses, image bytes and pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np

from batch_infer.carried import shorten_float32
from batch_infer.errors import StoppedError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.diff.images import ImageComparison, compare_images
from batch_infer.jobs.diff.rows import (
    SOURCE_COLUMNS,
    ResultPairs,
    find_unequal,
    iterate_pairs,
    iterate_unmatched,
    make_diff_schema,
)
from batch_infer.jobs.diff.settings import compare_records
from batch_infer.jobs.run_json import find_lora_column
from batch_infer.jobs.summary import JsonStruct
from batch_infer.manifest import Manifest, ManifestIndex
from batch_infer.sinks import Sink, make_sink
from batch_infer.store import Out, Store, open_store, to_absolute

MAX_DIFFERENCES = 1000
"""Maximum number of results to list."""
READING_THREADS = 8
_MAX_VALUE_LENGTH = 60

OnProgress = Callable[[int, int], None]
"""Receives the number of compared results and the number of results in A."""


class Difference(JsonStruct):
    """A result that differs. `kinds` contains only_a, only_b, status, settings, bytes and pixels, as they apply.

    `largest` and `psnr` are those of `ImageComparison`.
    """

    id: str
    image_index: int
    kinds: list[str]
    detail: str
    largest: int | None = None
    psnr: float | None = None


class SettingsDifferences(JsonStruct):
    """`run` maps the option or name of each setting that differs to its values in A and B.

    `columns` counts, for each column, the results whose values differ.
    """

    run: dict[str, tuple[Any, Any]] = {}
    columns: dict[str, int] = {}


class Diff(JsonStruct):
    """Differences between two runs, as numbers of results.

    `rows` counts the results in both. `equal` results have the same status, settings and image bytes; the others may
    count several times. `only_a` and `only_b` count results in one run only. `pixels` counts images of `bytes` whose
    pixels differ. `largest` is the largest difference of a channel value and `psnr_min` the lowest PSNR in dB of all
    compared images, or None if no pixels differ. `differences` lists the first MAX_DIFFERENCES results that differ, in
    the order of the tables.
    """

    rows: int = 0
    equal: int = 0
    only_a: int = 0
    only_b: int = 0
    status: int = 0
    settings: SettingsDifferences = msgspec.field(default_factory=SettingsDifferences)
    bytes: int = 0
    pixels: int = 0
    largest: int | None = None
    psnr_min: float | None = None
    differences: list[Difference] = []

    @property
    def is_equal(self) -> bool:
        """Whether both runs have the same results. Settings of runs may differ without an effect on results."""
        return self.difference_count == 0

    @property
    def difference_count(self) -> int:
        """Number of results that differ or are in one run only."""
        return self.rows - self.equal + self.only_a + self.only_b

    def add_image(self, comparison: ImageComparison) -> None:
        self.pixels += bool(comparison.differs)
        if comparison.largest is not None and comparison.psnr is not None:
            self.largest = max(comparison.largest, self.largest or 0)
            self.psnr_min = comparison.psnr if self.psnr_min is None else min(comparison.psnr, self.psnr_min)


def diff_runs(
    out_a: Out, out_b: Out, on_progress: OnProgress = lambda done, total: None, stop: Callable[[], bool] = lambda: False
) -> Diff:
    """Compare the results of two runs. Nothing is written, and neither OUT is locked.

    Raises UsageError if one OUT contains no run or a damaged part, StorageError, StoppedError.
    """
    stores = open_store(to_absolute(out_a)), open_store(to_absolute(out_b))
    records = [outdir.read_existing_run(store) for store in stores]
    with ExitStack() as stack:
        indexes = [stack.enter_context(Manifest(store).index()) for store in stores]
        return _RunComparison(stores, records, indexes, on_progress, stop).execute()


class _RunComparison:
    """Compares results batch by batch, so that memory does not grow with their number."""

    def __init__(
        self,
        stores: Sequence[Store],
        records: Sequence[Mapping[str, Any]],
        indexes: Sequence[ManifestIndex],
        on_progress: OnProgress,
        stop: Callable[[], bool],
    ) -> None:
        self._sinks: Sequence[Sink] = [make_sink(store) for store in stores]
        self._indexes, self._on_progress, self._stop = indexes, on_progress, stop
        self._tables: Sequence[str] = records[0].get("tables", ())
        self._positions = {name: position for position, name in enumerate(self._tables)}
        self._schema = make_diff_schema({name for record in records if (name := find_lora_column(record)) is not None})
        self._done, self._total = 0, indexes[0].count_statuses().total()
        self._diff = Diff(settings=SettingsDifferences(run=compare_records(*records)))
        self._listed: list[tuple[Any, Difference]] = []

    def execute(self) -> Diff:
        diff, (index_a, index_b) = self._diff, self._indexes
        pool = ThreadPoolExecutor(READING_THREADS)
        try:
            for pairs in iterate_pairs(index_a, index_b, self._tables, self._schema):
                self._compare(pairs, pool)
        finally:  # after a stop, do not compare the rest of the batch
            pool.shutdown(cancel_futures=True)
        diff.only_b = index_b.count_statuses().total() - diff.rows
        for row in iterate_unmatched(index_b, index_a, self._tables, min(diff.only_b, MAX_DIFFERENCES)):
            self._list(row, Difference(row["id"], row["image_index"], ["only_b"], f"only in B, {row['status']}"))
        self._sort()
        diff.differences = [difference for _, difference in self._listed]
        return diff

    def _compare(self, pairs: ResultPairs, pool: ThreadPoolExecutor) -> None:
        """Compare the results of a batch column by column, then those that differ one by one."""
        diff, unequal = self._diff, find_unequal(pairs)
        diff.rows += len(pairs.a)
        diff.only_a += len(pairs.only_a)
        diff.status += int(unequal["status"].sum())
        diff.bytes += int(unequal["bytes"].sum())
        columns = {name: values for name, values in unequal.items() if name not in ("status", "bytes") and values.any()}
        for name, values in columns.items():
            diff.settings.columns[name] = diff.settings.columns.get(name, 0) + int(values.sum())
        is_unequal = np.logical_or.reduce([*columns.values(), unequal["status"], unequal["bytes"]])
        indices = np.flatnonzero(is_unequal)
        diff.equal += len(pairs.a) - len(indices)
        for row in pairs.only_a.slice(0, MAX_DIFFERENCES).select(SOURCE_COLUMNS).to_pylist():
            self._list(row, Difference(row["id"], row["image_index"], ["only_a"], f"only in A, {row['status']}"))
        self._advance(len(pairs.a) + len(pairs.only_a) - len(indices))
        rows_a, rows_b = (table.take(indices).to_pylist() for table in (pairs.a, pairs.b))
        comparisons = self._compare_images(rows_a, rows_b, unequal["bytes"][indices].tolist(), pool)
        for index, row_a, row_b, image in zip(indices, rows_a, rows_b, comparisons, strict=True):
            names = [name for name, values in columns.items() if values[index]]
            self._add(row_a, row_b, names, image)
            self._advance(1)

    def _compare_images(
        self,
        rows_a: Sequence[Mapping[str, Any]],
        rows_b: Sequence[Mapping[str, Any]],
        are_unequal: Sequence[bool],
        pool: ThreadPoolExecutor,
    ) -> Iterator[ImageComparison | None]:
        """Compare images whose bytes differ in a thread pool. For other rows, yield None. Raises StorageError."""
        sink_a, sink_b = self._sinks

        def compare(row_a: Mapping[str, Any], row_b: Mapping[str, Any], is_unequal: bool) -> ImageComparison | None:
            return compare_images(sink_a, row_a, sink_b, row_b) if is_unequal else None

        return pool.map(compare, rows_a, rows_b, are_unequal)

    def _add(
        self,
        row_a: Mapping[str, Any],
        row_b: Mapping[str, Any],
        names: Sequence[str],
        image: ImageComparison | None,
    ) -> None:
        """Count and list a result that differs. `names` are the request columns that do."""
        kinds, details = [], []
        if row_a["status"] != row_b["status"]:
            kinds.append("status")
            details.append(f"{row_a['status']} in A, {row_b['status']} in B")
        if image is not None:
            self._diff.add_image(image)
            kinds += ["bytes", "pixels"] if image.differs else ["bytes"]
            details.append(image.detail)
        if names:
            kinds.append("settings")
            details += [_format_cells(name, row_a[name], row_b[name]) for name in names]
        largest, psnr = (image.largest, image.psnr) if image is not None else (None, None)
        self._list(row_a, Difference(row_a["id"], row_a["image_index"], kinds, "; ".join(details), largest, psnr))

    def _list(self, row: Mapping[str, Any], difference: Difference) -> None:
        """List a difference if it may be among the first MAX_DIFFERENCES in the order of the tables."""
        position = self._positions.get(row["source_file"], len(self._positions))
        order = position, row["source_file"], row["source_row"], row["id"], row["image_index"]
        self._listed.append((order, difference))
        if len(self._listed) >= 2 * MAX_DIFFERENCES:
            self._sort()

    def _sort(self) -> None:
        self._listed.sort(key=lambda entry: entry[0])
        del self._listed[MAX_DIFFERENCES:]

    def _advance(self, count: int) -> None:
        """Report progress. Raises StoppedError."""
        if self._stop():
            raise StoppedError("stopped; run the same command again")
        self._done += count
        self._on_progress(self._done, self._total)


def _format_cells(name: str, value: Any, other: Any) -> str:
    return f"{name} {_format_value(value)} in A, {_format_value(other)} in B"


def _format_value(value: Any) -> str:
    """Return a cell as a short text."""
    if isinstance(value, float):
        value = shorten_float32(value)
    elif isinstance(value, list):  # safety scores
        value = {score["category"]: shorten_float32(score["score"]) for score in value}
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[:_MAX_VALUE_LENGTH]}…"
