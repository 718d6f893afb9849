"""Check stored images again in batches, and apply the policy for flagged images."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from batch_infer import images
from batch_infer.errors import FailedRowError, RowError
from batch_infer.jobs.compute import choose_compute
from batch_infer.jobs.recovery import read_intact
from batch_infer.jobs.summary import JsonStruct
from batch_infer.manifest import CommittedImage, Manifest
from batch_infer.models import ModelCard
from batch_infer.provenance import Marker
from batch_infer.records import PromptRequest, ResultRow, StoredImage, Verdict, utc_now
from batch_infer.safety import Gate, ImageChecker, make_gate
from batch_infer.settings import OnFlagged, RunSettings
from batch_infer.sinks import is_image_path, make_sink
from batch_infer.store import Store
from batch_infer.worker import commit_images, explain_flag, format_worker_name, with_image, with_verdict

READING_THREADS = 8
IMAGE_NOT_KEPT = "its image was not kept and cannot be judged again"
"""Text that a rescore adds to the error of a flagged result without an original. Do not change it: OUT may have it."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A committed result, its request under the new rules, and the policy with which it was stored."""

    request: PromptRequest
    row: ResultRow
    on_flagged: OnFlagged

    @property
    def is_original(self) -> bool:
        """Whether the stored image is the original."""
        row = self.row
        is_kept = self.on_flagged in ("keep", "quarantine") and IMAGE_NOT_KEPT not in (row.error or "")
        return row.generated_image is not None and (row.status == "ok" or is_kept)


class RescoreCounts(JsonStruct, rename={"checked": "judged", "unchecked": "unjudged"}):
    """Number of results by outcome.

    `flagged` counts checked images that are flagged now, and `changed` those whose flag changed. `moved` counts those
    with the same flag whose file was moved, replaced or removed, because the policy changed. `unchecked` counts flagged
    results whose original image was not kept, and `failed` results without a verdict or with a missing or damaged
    image.
    """

    checked: int = 0
    flagged: int = 0
    changed: int = 0
    unchecked: int = 0
    failed: int = 0
    moved: int = 0


class Rescorer:
    """Checks stored images with the configured checkers and commits the results. `counts` covers all batches so far."""

    def __init__(
        self,
        settings: RunSettings,
        store: Store,
        card: ModelCard,
        record: Mapping[str, Any],
        stop: Callable[[], bool],
    ) -> None:
        """Load the checker if one is used. Raises ModelError, SettingsError, StorageError."""
        self._settings, self._card = settings, card
        self._marker = Marker(settings.output.provenance, card.name, card.fingerprint)
        self.sink = make_sink(store, settings.output.image_format, settings.output.sink)
        self._run = record.get("run_number") or 0
        self._manifest = Manifest(store, self._run)
        self._checker: ImageChecker | None = None
        if settings.safety.uses_checker(has_checker=card.has_checker):
            from batch_infer.autotune import detect_device  # imports torch, which a service alone does not need
            from batch_infer.worker import load_image_checker

            # A run may have needed --offload for its model, but its checker is small, and this may be another machine.
            unlimited = replace(settings, compute=replace(settings.compute, offload=None))
            compute = choose_compute(unlimited, detect_device(settings.model.device), record, card)
            self._checker = load_image_checker(card, compute)
        service = settings.safety.service
        self._gate = None if service is None else make_gate(service, stop)
        self.counts = RescoreCounts()
        self._rows: list[ResultRow] = []
        self._written_paths: list[str] = []
        self._replaced_paths: list[str] = []

    def rescore(self, results: Sequence[StoredResult], carried: pa.Schema) -> None:
        """Check the original images, apply the policy, and commit. A kill at any time loses no image.

        A flagged image that was not kept stays flagged. A blocked prompt stays blocked if the service refuses it again,
        and fails if it cannot be checked. Otherwise its result is left to `run`. If a check raises ServiceError,
        SettingsError or StoppedError, no result is committed. Raises StorageError.
        """
        self._rescore_images([result for result in results if result.is_original])
        without_original = [result for result in results if not result.is_original]
        blocked = [result for result in without_original if result.row.status == "blocked"]
        for result, verdict in zip(blocked, self._check_prompts(blocked), strict=True):
            if isinstance(verdict, FailedRowError):
                self._fail(result, str(verdict))
            elif verdict.nsfw:
                self._add(result, replace(with_verdict(result.row, verdict), error=verdict.reason))
        for result in without_original:
            row = result.row
            if row.status == "flagged":
                self.counts.unchecked += 1
                reason = (row.error or "").removesuffix(f"; {IMAGE_NOT_KEPT}")
                self._add(result, replace(row, error=f"{reason}; {IMAGE_NOT_KEPT}"))
            elif row.status != "blocked":  # it failed or was invalid, and stays so
                self._add(result, row)
        written, replaced = self._written_paths, self._replaced_paths
        commit_images(self.sink, self._manifest, self._rows, carried, written=written, previous=replaced)
        self._rows, self._written_paths, self._replaced_paths = [], [], []

    def compact(self, excluded: Container[str]) -> None:
        """Combine small manifest parts, except those with `excluded` names. Raises StorageError."""
        self._manifest.compact(self._run, excluded)

    def remove_duplicates(self, request: PromptRequest, committed: CommittedImage) -> None:
        """Remove files under other names that a killed rescore wrote for a row that is already rescored."""
        path = committed.path if committed.path and is_image_path(committed.path) else None
        possible_paths = self.sink.possible_paths(request)
        if path is not None:
            possible_paths |= {self.sink.path_in(path, quarantine=quarantine) for quarantine in (False, True)}
        self.sink.remove(*possible_paths.difference([path] if path else ()))

    def close(self) -> None:
        if self._gate is not None:
            self._gate.close()

    def _rescore_images(self, results: Sequence[StoredResult]) -> None:
        with ThreadPoolExecutor(READING_THREADS) as pool:
            files = list(pool.map(self._read, results))
        readable = [(result, *file) for result, file in zip(results, files, strict=True) if not isinstance(file, str)]
        image_verdicts = self._check_images([pixels for _, _, pixels in readable])
        prompt_verdicts = self._check_prompts([result for result, _, _ in readable])
        verdicts = map(_merge_verdicts, prompt_verdicts, image_verdicts)
        for (result, content, pixels), verdict in zip(readable, verdicts, strict=True):
            if isinstance(verdict, FailedRowError):
                self._fail(result, str(verdict))
            else:
                self._store(result, content, pixels, verdict)
        for result, file_or_error in zip(results, files, strict=True):
            if isinstance(file_or_error, str):
                self._fail(result, file_or_error)

    def _read(self, result: StoredResult) -> tuple[bytes, np.ndarray] | str:
        """Return a stored image and its pixels, or the reason why it cannot be checked. Raises StorageError."""
        row = result.row
        content = read_intact(self.sink, row.generated_image or "", row.sha256, row.image_bytes)
        if content is None:
            return "its image is missing or damaged and cannot be checked again"
        try:
            return content, images.decode(content)
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
        """Return the service's verdict on each prompt, or empty verdicts without a service. Send equal prompts once."""
        if self._gate is None:
            return [Verdict()] * len(results)
        prompts = list(dict.fromkeys(result.request.prompt for result in results))
        verdicts = dict(zip(prompts, _check_all(self._gate, self._gate.check_prompt, prompts), strict=True))
        return [verdicts[result.request.prompt] for result in results]

    def _store(self, result: StoredResult, content: bytes, pixels: np.ndarray, verdict: Verdict) -> None:
        is_flagged = bool(verdict.nsfw)
        self.counts.checked += 1
        self.counts.flagged += is_flagged
        has_changed = is_flagged != (result.row.status == "flagged")
        stored = self._store_image(result, content, pixels, is_flagged=is_flagged)
        self.counts.changed += has_changed
        earlier_file = result.row.generated_image, result.row.sha256
        self.counts.moved += not has_changed and (stored and (stored.path, stored.sha256)) != earlier_file
        row = with_image(with_verdict(result.row, verdict), stored)
        if is_flagged:
            self._add(result, replace(row, status="flagged", error=explain_flag(verdict)))
        else:
            self._add(result, replace(row, status="ok", error=None))

    def _store_image(
        self, result: StoredResult, content: bytes, original: np.ndarray, *, is_flagged: bool
    ) -> StoredImage | None:
        """Store the image as the policy requires, unless it is stored that way. Return None if the policy drops it."""
        policy, row = self._settings.safety.policy, result.row
        pixels = self._marker.replace_flagged(original, policy) if is_flagged else original
        path = self.sink.path_after_rescore(
            row.generated_image or "",
            result.request,
            is_flagged=is_flagged,
            quarantine=is_flagged and policy == "quarantine",
        )
        if pixels is None:
            return None
        if pixels is original and path == row.generated_image:
            return StoredImage(path, row.sha256 or "", row.image_bytes or 0, row.pixels_sha256)
        self._written_paths.append(path)
        if pixels is original:
            return replace(self.sink.write(path, content), pixels_sha256=row.pixels_sha256)
        parameters = images.format_parameters(result.request, self._card.scheduler_name, self._card.fingerprint)
        # Keep the format because the file name stays. A later run may have used another --image-format.
        image_format = images.FORMAT_BY_SUFFIX.get(Path(path).suffix, self._settings.output.image_format)
        stored = self.sink.write(path, self._marker.encode(pixels, image_format, parameters))
        return replace(stored, pixels_sha256=images.hash_pixels(pixels))

    def _fail(self, result: StoredResult, error: str) -> None:
        """Fail closed: add a failed result without the image, which the next run renders again."""
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
    """Return the gate's verdicts in order. Fail closed: a missing verdict becomes a FailedRowError."""

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
