"""Stored images on their way past their judges, and what is stored of them then."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from batch_infer import images
from batch_infer.errors import RowBroken
from batch_infer.jobs.job import settle_compute
from batch_infer.jobs.recovery import is_whole
from batch_infer.manifest import Manifest
from batch_infer.models import ModelCard
from batch_infer.records import PromptRequest, ResultRow, Status, StoredImage, Verdict, now
from batch_infer.safety import Gate, Judge, gate_of
from batch_infer.settings import RunSettings
from batch_infer.sinks import FolderSink
from batch_infer.worker.rows import why_flagged, with_file, with_verdict, worker_name

READING_THREADS = 8
NOT_KEPT = "its image was not kept and cannot be judged again"
GONE = "its image is missing or not whole, and cannot be judged again"


@dataclass(frozen=True, slots=True)
class Stored:
    """A result as it is, and the request by which it will be known."""

    request: PromptRequest
    row: ResultRow


@dataclass(slots=True)
class Rescored:
    """What became of results: `judged` images, of which `flagged` are flagged now; of `changed` it was said otherwise.

    `unjudged` were flagged or blocked and have no image that could be judged; `failed` have none that is whole, or no
    answer.
    """

    judged: int = 0
    flagged: int = 0
    changed: int = 0
    unjudged: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class _File:
    """An image as it is stored, and its pixels (H, W, 3) uint8."""

    content: bytes
    pixels: np.ndarray


class Rejudging:
    """The judges that a run's settings name; `rescored` counts what they have said."""

    def __init__(
        self, settings: RunSettings, card: ModelCard, record: Mapping[str, Any], stop: Callable[[], bool]
    ) -> None:
        """Loads the checker, where it is to be asked. Raises ModelError, SettingsError."""
        self._settings, self._card = settings, card
        self._sink = FolderSink(settings.out, images.SUFFIX[settings.output.image_format])
        self._manifest, self._name = Manifest(settings.out), worker_name(0)
        asks_checker = settings.safety.asks_checker(has_checker=card.has_checker)
        self._judge = _load_judge(settings, card, record) if asks_checker else None
        self._gate = gate_of(settings.safety.service, stop)
        self.rescored = Rescored()
        self._rows: list[ResultRow] = []
        self._written: list[str] = []
        self._obsolete: list[str] = []

    def judge(self, entries: Sequence[Stored]) -> None:
        """Judge images that are stored as they were rendered, and store of them what the policy says.

        Raises ServiceError, SettingsError, Interrupted, StorageError: nothing of these has then been judged.
        """
        with ThreadPoolExecutor(READING_THREADS) as pool:
            files = list(pool.map(self._read, entries))
        whole = [(entry, file) for entry, file in zip(entries, files, strict=True) if file is not None]
        verdicts = self._ask([file.pixels for _, file in whole])
        for (entry, file), verdict in zip(whole, verdicts, strict=True):
            if isinstance(verdict, RowBroken):
                self._fail(entry, str(verdict))
            else:
                self._store(entry, file, verdict)
        for entry, found in zip(entries, files, strict=True):
            if found is None:
                self._fail(entry, GONE)

    def leave(self, entries: Sequence[Stored]) -> None:
        """Keep what was said of results that have no image to judge; what has failed fails as before."""
        for entry in entries:
            if entry.row.status == "failed":
                self._fail(entry, entry.row.error or "")
                continue
            self.rescored.unjudged += 1
            told = (entry.row.error or "").removesuffix(f"; {NOT_KEPT}")
            self._add(entry, replace(entry.row, error=f"{told}; {NOT_KEPT}"))

    def commit(self, carried: pa.Schema) -> None:
        """Raises StorageError."""
        self._sink.settle(self._written)
        if self._rows:
            self._manifest.commit(self._rows, carried)
        for path in self._obsolete:
            self._sink.remove(path)
        for done in (self._rows, self._written, self._obsolete):
            done.clear()

    def close(self) -> None:
        if self._gate is not None:
            self._gate.close()

    def _read(self, entry: Stored) -> _File | None:
        row, out = entry.row, self._settings.out
        if row.generated_image is None or not is_whole(out, row.generated_image, row.sha256, row.image_bytes):
            return None
        content = (out / row.generated_image).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            return _File(content, np.asarray(image.convert("RGB")))

    def _ask(self, pixels: Sequence[np.ndarray]) -> list[Verdict | RowBroken]:
        """What all judges say of images."""
        found: list[Verdict | RowBroken] = [Verdict()] * len(pixels)
        if self._judge is not None:
            for shape in {image.shape for image in pixels}:
                alike = [k for k, image in enumerate(pixels) if image.shape == shape]
                for k, verdict in zip(alike, self._judge.judge([pixels[k] for k in alike]), strict=True):
                    found[k] = verdict
        if self._gate is not None:
            with ThreadPoolExecutor(self._gate.at_once) as pool:
                words = list(pool.map(_answer, [self._gate] * len(pixels), pixels))
            found = [_both(first, word) for first, word in zip(found, words, strict=True)]
        return found

    def _store(self, entry: Stored, file: _File, verdict: Verdict) -> None:
        before, flagged = entry.row, bool(verdict.nsfw)
        self.rescored.judged += 1
        self.rescored.flagged += flagged
        self.rescored.changed += flagged != (before.status == "flagged")
        stored = self._stored(entry, file, flagged=flagged)
        status: Status = "flagged" if flagged else "ok"
        row = replace(with_verdict(before, verdict), status=status, error=why_flagged(verdict) if flagged else None)
        row = with_file(row, stored)
        if before.generated_image not in (None, row.generated_image):
            self._obsolete.append(str(before.generated_image))
        self._add(entry, row)

    def _stored(self, entry: Stored, file: _File, *, flagged: bool) -> StoredImage | None:
        """The image as it is to be, written where it is another one or stands elsewhere."""
        policy, row = self._settings.safety.on_flagged, entry.row
        pixels = images.by_policy(file.pixels, policy) if flagged else file.pixels
        path = self._sink.path_of(entry.request, quarantine=flagged and policy == "quarantine")
        if pixels is None:
            return None
        if pixels is file.pixels and path == row.generated_image:
            return StoredImage(path, row.sha256 or "", row.image_bytes or 0)
        self._written.append(path)
        if pixels is file.pixels:
            return self._sink.write(path, file.content)
        parameters = images.parameters_text(entry.request, self._card.scheduler_name, self._card.title)
        return self._sink.write(path, images.encode(pixels, self._settings.output.image_format, parameters))

    def _fail(self, entry: Stored, error: str) -> None:
        """No answer, no image: it is rendered anew by the next run."""
        self.rescored.failed += 1
        if entry.row.generated_image is not None:
            self._obsolete.append(entry.row.generated_image)
        row = with_file(with_verdict(entry.row, Verdict()), None)
        self._add(entry, replace(row, status="failed", error=error))

    def _add(self, entry: Stored, row: ResultRow) -> None:
        source, attempt = entry.request.source, entry.row.attempt + 1
        row = replace(row, attempt=attempt, worker=self._name, finished_at=now(), fingerprint=entry.request.fingerprint)
        self._rows.append(replace(row, source_file=source.file, source_row=source.row))


def _answer(gate: Gate, pixels: np.ndarray) -> Verdict | RowBroken:
    try:
        return gate.check_image(pixels)
    except RowBroken as error:
        return error


def _both(first: Verdict | RowBroken, second: Verdict | RowBroken) -> Verdict | RowBroken:
    if isinstance(first, RowBroken):
        return first
    return second if isinstance(second, RowBroken) else first.joined(second)


def _load_judge(settings: RunSettings, card: ModelCard, record: Mapping[str, Any]) -> Judge:
    from batch_infer.engines.devices import find_device  # these import torch, which a service alone does without
    from batch_infer.worker.loading import load_judge

    return load_judge(card, settle_compute(settings, card, find_device(settings.model.device), record))
