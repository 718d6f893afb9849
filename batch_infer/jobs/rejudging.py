"""Stored images on their way past their judges, and what is stored of them then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batch_infer import images
from batch_infer.errors import RowBroken, RowError
from batch_infer.jobs.job import settle_compute
from batch_infer.jobs.recovery import read_whole
from batch_infer.manifest import CommittedImage, Manifest
from batch_infer.models import ModelCard
from batch_infer.records import PromptRequest, ResultRow, Status, StoredImage, Verdict, utc_now
from batch_infer.safety import Gate, ImageChecker, make_gate
from batch_infer.settings import OnFlagged, RunSettings
from batch_infer.sinks import make_sink, resolve_path
from batch_infer.worker import commit_images, explain_flag, format_worker_name, set_image, set_verdict

READING_THREADS = 8
ORIGINAL = frozenset({"keep", "quarantine"})
"""What --on-flagged leaves as it was rendered."""
NOT_KEPT = "its image was not kept and cannot be judged again"
GONE = "its image is missing or not whole, and cannot be judged again"


@dataclass(frozen=True, slots=True)
class Stored:
    """A result as it is, the request by which it will be known, and what was done to its like that was flagged."""

    request: PromptRequest
    row: ResultRow
    on_flagged: OnFlagged

    @property
    def is_original(self) -> bool:
        """Whether the image is stored as it was rendered; one that was left at an earlier judging is not."""
        row = self.row
        kept = row.status == "ok" or (self.on_flagged in ORIGINAL and NOT_KEPT not in (row.error or ""))
        return kept and row.generated_image is not None


@dataclass(slots=True)
class RescoreCounts:
    """What became of results: `judged` images, of which `flagged` are flagged now; of `changed` it was said otherwise.

    `unjudged` were flagged and have no image that could be judged; `failed` have none that is whole, or no answer.
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
        self.sink = make_sink(settings.out, settings.output.image_format)
        self._manifest, self._name = Manifest(settings.out, record.get("run_number") or 0), format_worker_name(0)
        uses_checker = settings.safety.uses_checker(has_checker=card.has_checker)
        self._judge = _load_judge(settings, card, record) if uses_checker else None
        self._gate = make_gate(settings.safety.service, stop)
        self.rescored = RescoreCounts()
        self._rows: list[ResultRow] = []
        self._written: list[str] = []
        self._former: list[str] = []

    def judge(self, entries: Sequence[Stored]) -> None:
        """Judge images that are stored as they were rendered, and store of them what the policy says.

        A flagged image that was not kept stays flagged. A prompt that was refused stays so where it is refused again;
        one that is not has no result, and is left to be rendered. Raises ServiceError, SettingsError, Interrupted,
        StorageError: nothing of these has then been judged.
        """
        self._judge_images([entry for entry in entries if entry.is_original])
        others = [entry for entry in entries if not entry.is_original]
        self._judge_refused([entry for entry in others if entry.row.status == "blocked"])
        for entry in others:
            if entry.row.status == "flagged":
                self.rescored.unjudged += 1
                told = (entry.row.error or "").removesuffix(f"; {NOT_KEPT}")
                self._add(entry, replace(entry.row, error=f"{told}; {NOT_KEPT}"))
            elif entry.row.status != "blocked":  # failed before, or refused by the model itself
                self._add(entry, entry.row)

    def _judge_images(self, entries: Sequence[Stored]) -> None:
        with ThreadPoolExecutor(READING_THREADS) as pool:
            files = list(pool.map(self._read, entries))
        whole = [(entry, file) for entry, file in zip(entries, files, strict=True) if isinstance(file, _File)]
        verdicts = self._ask([file.pixels for _, file in whole])
        prompts = self._ask_prompts([entry for entry, _ in whole])
        for (entry, file), of_image, of_prompt in zip(whole, verdicts, prompts, strict=True):
            verdict = _both(of_prompt, of_image)
            if isinstance(verdict, RowBroken):
                self._fail(entry, str(verdict))
            else:
                self._store(entry, file, verdict)
        for entry, file_or_fault in zip(entries, files, strict=True):
            if isinstance(file_or_fault, str):
                self._fail(entry, file_or_fault)

    def _judge_refused(self, entries: Sequence[Stored]) -> None:
        for entry, verdict in zip(entries, self._ask_prompts(entries), strict=True):
            if isinstance(verdict, RowBroken):
                self._fail(entry, str(verdict))
            elif verdict.nsfw:
                self._add(entry, replace(set_verdict(entry.row, verdict), error=verdict.reason))

    def tidy(self, request: PromptRequest, committed: CommittedImage) -> None:
        """Remove the files that a killed rescoring has left elsewhere of a row that needs no judging."""
        path = committed.path if committed.path and resolve_path(self._settings.out, committed.path) else None
        others = self.sink.possible_paths(request)
        if path is not None:
            others |= {self.sink.path_in(path, quarantine=quarantine) for quarantine in (False, True)}
        for other in others - {path}:
            self.sink.remove(other)

    def commit(self, carried: pa.Schema) -> None:
        """Put new images in place, commit the rows, and remove the images that they no longer name.

        A kill at any moment loses no image. Raises StorageError.
        """
        commit_images(self.sink, self._manifest, self._rows, carried, written=self._written, former=self._former)
        for done in (self._rows, self._written, self._former):
            done.clear()

    def close(self) -> None:
        if self._gate is not None:
            self._gate.close()

    def _read(self, entry: Stored) -> _File | str:
        """Return the stored image, or the sentence that says why it cannot be judged. Raises StorageError."""
        row = entry.row
        content = read_whole(self.sink, row.generated_image or "", row.sha256, row.image_bytes)
        if content is None:
            return GONE
        try:
            return _File(content, images.decode(content))
        except RowError as error:
            return f"{error}, and cannot be judged again"

    def _ask(self, pixels: Sequence[np.ndarray]) -> list[Verdict | RowBroken]:
        """What all judges say of images."""
        found: list[Verdict | RowBroken] = [Verdict()] * len(pixels)
        if self._judge is not None:
            for shape in {image.shape for image in pixels}:
                alike = [k for k, image in enumerate(pixels) if image.shape == shape]
                for k, verdict in zip(alike, self._judge.check([pixels[k] for k in alike]), strict=True):
                    found[k] = verdict
        if self._gate is not None:
            words = _answers(self._gate.check_image, pixels, self._gate)
            found = [_both(first, word) for first, word in zip(found, words, strict=True)]
        return found

    def _ask_prompts(self, entries: Sequence[Stored]) -> list[Verdict | RowBroken]:
        """What the service says of their prompts, of each once."""
        if self._gate is None:
            return [Verdict()] * len(entries)
        prompts = list(dict.fromkeys(entry.request.prompt for entry in entries))
        words = dict(zip(prompts, _answers(self._gate.check_prompt, prompts, self._gate), strict=True))
        return [words[entry.request.prompt] for entry in entries]

    def _store(self, entry: Stored, file: _File, verdict: Verdict) -> None:
        before, flagged = entry.row, bool(verdict.nsfw)
        self.rescored.judged += 1
        self.rescored.flagged += flagged
        self.rescored.changed += flagged != (before.status == "flagged")
        stored = self._stored(entry, file, flagged=flagged)
        status: Status = "flagged" if flagged else "ok"
        row = replace(set_verdict(before, verdict), status=status, error=explain_flag(verdict) if flagged else None)
        self._add(entry, set_image(row, stored))

    def _stored(self, entry: Stored, file: _File, *, flagged: bool) -> StoredImage | None:
        """The image as it is to be, written where it is another one or stands elsewhere."""
        policy, row = self._settings.safety.policy, entry.row
        pixels = images.by_policy(file.pixels, policy) if flagged else file.pixels
        path = self.sink.path_in(row.generated_image or "", quarantine=flagged and policy == "quarantine")
        if pixels is None:
            return None
        if pixels is file.pixels and path == row.generated_image:
            return StoredImage(path, row.sha256 or "", row.image_bytes or 0, row.pixels_sha256)
        self._written.append(path)
        if pixels is file.pixels:
            return replace(self.sink.write(path, file.content), pixels_sha256=row.pixels_sha256)
        parameters = images.parameters_text(entry.request, self._card.scheduler_name, self._card.fingerprint)
        # The image keeps its name, so its format too: a later run may have had another --image-format.
        image_format = images.FORMATS.get(Path(path).suffix, self._settings.output.image_format)
        stored = self.sink.write(path, images.encode(pixels, image_format, parameters))
        return replace(stored, pixels_sha256=images.pixels_sha256(pixels))

    def _fail(self, entry: Stored, error: str) -> None:
        """No answer, no image: it is rendered anew by the next run."""
        self.rescored.failed += 1
        row = set_image(set_verdict(entry.row, Verdict()), None)
        self._add(entry, replace(row, status="failed", error=error))

    def _add(self, entry: Stored, row: ResultRow) -> None:
        source, attempt = entry.request.source, entry.row.attempt + 1
        if entry.row.generated_image is not None:
            self._former.append(entry.row.generated_image)
        row = replace(
            row, attempt=attempt, worker=self._name, finished_at=utc_now(), fingerprint=entry.request.fingerprint
        )
        self._rows.append(replace(row, source_file=source.file, source_row=source.row))


def _answers(ask: Callable[[Any], Verdict], things: Sequence[Any], gate: Gate) -> list[Verdict | RowBroken]:
    """What a gate says of each; it fails closed."""

    def answer(thing: Any) -> Verdict | RowBroken:
        try:
            found = ask(thing)
        except RowBroken as error:
            return error
        return RowBroken(f"{gate.name} has no word on this") if found.nsfw is None else found

    with ThreadPoolExecutor(gate.at_once) as pool:
        return list(pool.map(answer, things))


def _both(first: Verdict | RowBroken, second: Verdict | RowBroken) -> Verdict | RowBroken:
    if isinstance(first, RowBroken):
        return first
    return second if isinstance(second, RowBroken) else first.merge(second)


def _load_judge(settings: RunSettings, card: ModelCard, record: Mapping[str, Any]) -> ImageChecker:
    from batch_infer.autotune import find_device  # these import torch, which a service alone does without
    from batch_infer.worker import load_image_checker

    return load_image_checker(card, settle_compute(settings, card, find_device(settings.model.device), record))
