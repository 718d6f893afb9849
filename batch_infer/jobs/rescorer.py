"""Check batches of stored images again, and apply the policy for flagged images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from batch_infer import images
from batch_infer.errors import FailedRowError, RowError
from batch_infer.jobs.job import choose_compute
from batch_infer.jobs.recovery import read_intact
from batch_infer.jobs.summary import JsonStruct
from batch_infer.manifest import CommittedImage, Manifest
from batch_infer.models import ModelCard
from batch_infer.records import PromptRequest, ResultRow, StoredImage, Verdict, utc_now
from batch_infer.safety import Gate, ImageChecker, make_gate
from batch_infer.settings import OnFlagged, RunSettings
from batch_infer.sinks import make_sink, resolve_path
from batch_infer.worker import commit_images, explain_flag, format_worker_name, with_image, with_verdict

READING_THREADS = 8
IMAGE_NOT_KEPT = "its image was not kept and cannot be judged again"
"""Part of the stored `error` that identifies such a row. Do not reword it."""
IMAGE_LOST = "its image is missing or damaged and cannot be checked again"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A committed result, its request under the new rules, and the policy under which it was stored."""

    request: PromptRequest
    row: ResultRow
    on_flagged: OnFlagged

    @property
    def is_original(self) -> bool:
        """Whether the stored image is the one that was rendered."""
        row = self.row
        is_kept = self.on_flagged in ("keep", "quarantine") and IMAGE_NOT_KEPT not in (row.error or "")
        return row.generated_image is not None and (row.status == "ok" or is_kept)


class RescoreCounts(JsonStruct, rename={"checked": "judged", "unchecked": "unjudged"}):
    """Number of results by outcome.

    `flagged` counts the checked images that are flagged now, and `changed` those whose flag changed. `unchecked` counts
    flagged results without an image to check, and `failed` those without a verdict or with a missing or damaged image.
    """

    checked: int = 0
    flagged: int = 0
    changed: int = 0
    unchecked: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class _ImageFile:
    """A stored image and its pixels, (H, W, 3) uint8."""

    content: bytes
    pixels: np.ndarray


class Rescorer:
    """Checks stored images with the configured checkers and commits the results. `counts` is the running total."""

    def __init__(
        self, settings: RunSettings, card: ModelCard, record: Mapping[str, Any], stop: Callable[[], bool]
    ) -> None:
        """Load the checker if the settings require it. Raises ModelError, SettingsError."""
        self._settings, self._card = settings, card
        self.sink = make_sink(settings.out, settings.output.image_format)
        self._manifest = Manifest(settings.out, record.get("run_number") or 0)
        has_checker = settings.safety.uses_checker(has_checker=card.has_checker)
        self._checker = _load_checker(settings, card, record) if has_checker else None
        service = settings.safety.service
        self._gate = None if service is None else make_gate(service, stop)
        self.counts = RescoreCounts()
        self._rows: list[ResultRow] = []
        self._written_paths: list[str] = []
        self._replaced_paths: list[str] = []

    def rescore(self, results: Sequence[StoredResult]) -> None:
        """Check the images that are stored as rendered, and apply the policy.

        A flagged image that was not kept stays flagged. A blocked prompt stays blocked if the service refuses it again;
        otherwise it gets no result and is left to `run`. Raises ServiceError, SettingsError, StoppedError and
        StorageError without changing any of these results.
        """
        self._rescore_images([result for result in results if result.is_original])
        without_original = [result for result in results if not result.is_original]
        self._rescore_blocked([result for result in without_original if result.row.status == "blocked"])
        for result in without_original:
            row = result.row
            if row.status == "flagged":
                self.counts.unchecked += 1
                reason = (row.error or "").removesuffix(f"; {IMAGE_NOT_KEPT}")
                self._add(result, replace(row, error=f"{reason}; {IMAGE_NOT_KEPT}"))
            elif row.status != "blocked":  # failed earlier, or refused by the model itself
                self._add(result, row)

    def commit(self, carried: pa.Schema) -> None:
        """Move new images into place, commit the rows, and remove images to which they no longer refer.

        A kill at any time loses no image. Raises StorageError.
        """
        written, replaced = self._written_paths, self._replaced_paths
        commit_images(self.sink, self._manifest, self._rows, carried, written=written, previous=replaced)
        for pending in (self._rows, written, replaced):
            pending.clear()

    def remove_duplicates(self, request: PromptRequest, committed: CommittedImage) -> None:
        """Remove files that a killed rescore left under other names for a row that is already rescored."""
        path = committed.path if committed.path and resolve_path(self._settings.out, committed.path) else None
        possible_paths = self.sink.possible_paths(request)
        if path is not None:
            possible_paths |= {self.sink.path_in(path, quarantine=quarantine) for quarantine in (False, True)}
        for duplicate in possible_paths - {path}:
            self.sink.remove(duplicate)

    def close(self) -> None:
        if self._gate is not None:
            self._gate.close()

    def _rescore_images(self, results: Sequence[StoredResult]) -> None:
        with ThreadPoolExecutor(READING_THREADS) as pool:
            files = list(pool.map(self._read, results))
        readable = [(result, file) for result, file in zip(results, files, strict=True) if isinstance(file, _ImageFile)]
        image_verdicts = self._check_images([file.pixels for _, file in readable])
        prompt_verdicts = self._check_prompts([result for result, _ in readable])
        verdicts = map(_merge_verdicts, prompt_verdicts, image_verdicts)
        for (result, file), verdict in zip(readable, verdicts, strict=True):
            if isinstance(verdict, FailedRowError):
                self._fail(result, str(verdict))
            else:
                self._store(result, file, verdict)
        for result, file_or_error in zip(results, files, strict=True):
            if isinstance(file_or_error, str):
                self._fail(result, file_or_error)

    def _rescore_blocked(self, results: Sequence[StoredResult]) -> None:
        for result, verdict in zip(results, self._check_prompts(results), strict=True):
            if isinstance(verdict, FailedRowError):
                self._fail(result, str(verdict))
            elif verdict.nsfw:
                self._add(result, replace(with_verdict(result.row, verdict), error=verdict.reason))

    def _read(self, result: StoredResult) -> _ImageFile | str:
        """Return the stored image, or why it cannot be checked. Raises StorageError."""
        row = result.row
        content = read_intact(self.sink, row.generated_image or "", row.sha256, row.image_bytes)
        if content is None:
            return IMAGE_LOST
        try:
            return _ImageFile(content, images.decode(content))
        except RowError as error:
            return f"{error}, and cannot be checked again"

    def _check_images(self, pixels: Sequence[np.ndarray]) -> list[Verdict | FailedRowError]:
        """Return the combined verdicts of the checker and the service."""
        verdicts: list[Verdict | FailedRowError] = [Verdict()] * len(pixels)
        if self._checker is not None:
            for shape in {image.shape for image in pixels}:
                indices = [index for index, image in enumerate(pixels) if image.shape == shape]
                batch_verdicts = self._checker.check([pixels[index] for index in indices])
                for index, verdict in zip(indices, batch_verdicts, strict=True):
                    verdicts[index] = verdict
        if self._gate is not None:
            verdicts = list(map(_merge_verdicts, verdicts, _check_all(self._gate, self._gate.check_image, pixels)))
        return verdicts

    def _check_prompts(self, results: Sequence[StoredResult]) -> list[Verdict | FailedRowError]:
        """Return the service's verdict on each prompt. Each distinct prompt is sent once."""
        if self._gate is None:
            return [Verdict()] * len(results)
        prompts = list(dict.fromkeys(result.request.prompt for result in results))
        verdicts = dict(zip(prompts, _check_all(self._gate, self._gate.check_prompt, prompts), strict=True))
        return [verdicts[result.request.prompt] for result in results]

    def _store(self, result: StoredResult, file: _ImageFile, verdict: Verdict) -> None:
        is_flagged = bool(verdict.nsfw)
        self.counts.checked += 1
        self.counts.flagged += is_flagged
        self.counts.changed += is_flagged != (result.row.status == "flagged")
        stored = self._store_image(result, file, is_flagged=is_flagged)
        row = with_image(with_verdict(result.row, verdict), stored)
        if is_flagged:
            self._add(result, replace(row, status="flagged", error=explain_flag(verdict)))
        else:
            self._add(result, replace(row, status="ok", error=None))

    def _store_image(self, result: StoredResult, file: _ImageFile, *, is_flagged: bool) -> StoredImage | None:
        """Write the image as the policy requires, unless it is already stored that way."""
        policy, row = self._settings.safety.policy, result.row
        pixels = images.apply_policy(file.pixels, policy) if is_flagged else file.pixels
        path = self.sink.path_in(row.generated_image or "", quarantine=is_flagged and policy == "quarantine")
        if pixels is None:
            return None
        if pixels is file.pixels and path == row.generated_image:
            return StoredImage(path, row.sha256 or "", row.image_bytes or 0, row.pixels_sha256)
        self._written_paths.append(path)
        if pixels is file.pixels:
            return replace(self.sink.write(path, file.content), pixels_sha256=row.pixels_sha256)
        parameters = images.format_parameters(result.request, self._card.scheduler_name, self._card.fingerprint)
        # The file name stays the same, so the format must too. A later run may have used another --image-format.
        image_format = images.FORMAT_BY_SUFFIX.get(Path(path).suffix, self._settings.output.image_format)
        stored = self.sink.write(path, images.encode(pixels, image_format, parameters))
        return replace(stored, pixels_sha256=images.hash_pixels(pixels))

    def _fail(self, result: StoredResult, error: str) -> None:
        """Fail closed: without a verdict, no image is kept and the next run renders it again."""
        self.counts.failed += 1
        row = with_image(with_verdict(result.row, Verdict()), None)
        self._add(result, replace(row, status="failed", error=error))

    def _add(self, result: StoredResult, row: ResultRow) -> None:
        request = result.request
        if result.row.generated_image is not None:
            self._replaced_paths.append(result.row.generated_image)
        self._rows.append(
            replace(
                row,
                attempt=result.row.attempt + 1,
                worker=format_worker_name(0),
                finished_at=utc_now(),
                fingerprint=request.fingerprint,
                source_file=request.source.file,
                source_row=request.source.row,
            )
        )


def _check_all(gate: Gate, check: Callable[[T], Verdict], contents: Sequence[T]) -> list[Verdict | FailedRowError]:
    """Return the gate's verdict on each content. Fails closed: a missing verdict becomes a FailedRowError."""

    def check_one(content: T) -> Verdict | FailedRowError:
        try:
            verdict = check(content)
        except FailedRowError as error:
            return error
        return FailedRowError(f"{gate.name} gave no verdict") if verdict.nsfw is None else verdict

    with ThreadPoolExecutor(gate.concurrency) as pool:
        return list(pool.map(check_one, contents))


def _merge_verdicts(first: Verdict | FailedRowError, second: Verdict | FailedRowError) -> Verdict | FailedRowError:
    if isinstance(first, FailedRowError):
        return first
    return second if isinstance(second, FailedRowError) else first.merge(second)


def _load_checker(settings: RunSettings, card: ModelCard, record: Mapping[str, Any]) -> ImageChecker:
    from batch_infer.autotune import detect_device  # imports torch, which a service alone does not need
    from batch_infer.worker import load_image_checker

    return load_image_checker(card, choose_compute(settings, detect_device(settings.model.device), record, card))
