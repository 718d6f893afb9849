"""A worker: one device, requests in, committed results out."""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from batch_infer import images
from batch_infer.chain import Chain, ChainShape, Rendered, Stages, Unrendered
from batch_infer.manifest import Manifest
from batch_infer.models import ModelCard, load
from batch_infer.records import PromptRequest, ResultRow, Status, StoredImage, now
from batch_infer.safety import Judge
from batch_infer.settings import Compute, OutputSettings, SafetySettings
from batch_infer.sinks import FolderSink

if TYPE_CHECKING:
    from batch_infer.models import Family

COMMIT_ROWS = 256
COMMIT_SECONDS = 3.0
"""A part is committed once it holds this many rows, or is this old when the next one comes."""
STORING_THREADS = 4
STORING_AHEAD = 64
"""Images between the device and the disk: beyond this the device waits."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """All that a worker needs to know; it can be sent to another process. `name` stands in its rows."""

    name: str
    card: ModelCard
    compute: Compute
    safety: SafetySettings
    output: OutputSettings
    out: Path
    carried: pa.Schema


class Worker:
    """One device, with its model loaded, that renders requests and commits what became of them."""

    def __init__(self, settings: WorkerSettings, stop: Callable[[], bool] = lambda: False) -> None:
        """Loads the model. Raises ModelError."""
        self._settings = settings
        self._sink = FolderSink(settings.out, images.SUFFIX[settings.output.image_format])
        self._manifest = Manifest(settings.out)
        self._chain = load_chain(settings.card, settings.compute, settings.safety, stop)

    @property
    def stages(self) -> dict[tuple[int, int], Stages]:
        """Where the time went, by image size (height, width)."""
        return self._chain.stages_by_size

    def work(self, requests: Iterable[PromptRequest], committed: Callable[[Sequence[ResultRow]], None]) -> None:
        """Render requests; `committed` is called, on another thread, with rows once they are in the manifest.

        Returns early, with all that is finished committed, once `stop` says so. Raises StorageError.
        """
        with ThreadPoolExecutor(STORING_THREADS) as storing, ThreadPoolExecutor(1) as committing:
            commits: deque[Future[None]] = deque()
            for batch in _batches(self._store_all(requests, storing)):
                while commits and (commits[0].done() or len(commits) > 2):
                    commits.popleft().result()
                commits.append(committing.submit(self._commit, batch, committed))
            for commit in commits:
                commit.result()

    def _store_all(self, requests: Iterable[PromptRequest], storing: ThreadPoolExecutor) -> Iterator[_Stored]:
        """Store images on other threads while the device renders the next ones; give the rows back in order."""
        under_way: deque[Future[_Stored]] = deque()
        for outcome in self._chain.render(requests):
            under_way.append(storing.submit(self._store, outcome))
            while under_way and (under_way[0].done() or len(under_way) > STORING_AHEAD):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def _store(self, outcome: Rendered | Unrendered) -> _Stored:
        request = outcome.request
        if isinstance(outcome, Unrendered):
            row = self._row(request, "invalid" if outcome.invalid else "failed", error=outcome.error)
            return _Stored(row, request.replaces)
        flagged = bool(outcome.verdict.nsfw)
        stored = self._write(outcome, flagged)
        row = self._row(
            request,
            "flagged" if flagged else "ok",
            error=f"the safety check flagged the image ({_highest(outcome)})" if flagged else None,
            outcome=outcome,
            stored=stored,
        )
        kept = stored is not None and stored.path == request.replaces
        return _Stored(row, None if kept else request.replaces)

    def _write(self, outcome: Rendered, flagged: bool) -> StoredImage | None:
        pixels = _by_policy(outcome.pixels, self._settings.safety) if flagged else outcome.pixels
        if pixels is None:
            return None
        card, request = self._settings.card, outcome.request
        parameters = images.parameters_text(request, card.scheduler_name, card.name)
        quarantine = flagged and self._settings.safety.on_flagged == "quarantine"
        path = self._sink.path_of(request, quarantine=quarantine)
        return self._sink.write(path, images.encode(pixels, self._settings.output.image_format, parameters))

    def _row(
        self,
        request: PromptRequest,
        status: Status,
        *,
        error: str | None,
        outcome: Rendered | None = None,
        stored: StoredImage | None = None,
    ) -> ResultRow:
        params = request.params
        verdict = outcome.verdict if outcome else None
        return ResultRow(
            id=request.id,
            image_index=request.image_index,
            prompt=request.prompt,
            generated_image=stored.path if stored else None,
            nsfw_content_detected=verdict.nsfw if verdict else None,
            status=status,
            error=error,
            negative_prompt=request.negative_prompt,
            seed=request.seed,
            height=params.height,
            width=params.width,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            guidance_rescale=params.guidance_rescale,
            scheduler=self._settings.card.scheduler_name,
            prompt_tokens=outcome.conditioning.prompt_tokens if outcome else None,
            prompt_truncated=outcome.conditioning.prompt_truncated if outcome else None,
            safety_checker=verdict.checker if verdict else None,
            safety_scores=verdict.scores if verdict else None,
            sha256=stored.sha256 if stored else None,
            image_bytes=stored.image_bytes if stored else None,
            slots=outcome.slots if outcome else None,
            seconds=outcome.seconds if outcome else None,
            attempt=request.attempt,
            worker=self._settings.name,
            finished_at=now(),
            source_file=request.source.file,
            source_row=request.source.row,
            fingerprint=request.fingerprint,
            carried=request.carried,
        )

    def _commit(self, batch: list[_Stored], committed: Callable[[Sequence[ResultRow]], None]) -> None:
        rows = [stored.row for stored in batch]
        self._sink.settle([row.generated_image for row in rows if row.generated_image])
        self._manifest.commit(rows, self._settings.carried)
        for stored in batch:
            if stored.obsolete:
                self._sink.remove(stored.obsolete)
        committed(rows)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A row whose image is written, and the image of an earlier attempt that is to go once the row is committed."""

    row: ResultRow
    obsolete: str | None


def _batches(source: Iterable[_Stored]) -> Iterator[list[_Stored]]:
    """Rows in the batches that they are committed in: by number, or by time where rows come slowly."""
    batch: list[_Stored] = []
    started = time.monotonic()
    for stored in source:
        batch.append(stored)
        if len(batch) >= COMMIT_ROWS or time.monotonic() - started >= COMMIT_SECONDS:
            yield batch
            batch, started = [], time.monotonic()
    if batch:
        yield batch


def load_chain(
    card: ModelCard, compute: Compute, safety: SafetySettings, stop: Callable[[], bool] = lambda: False
) -> Chain:
    """A model on its device, with its judge where there is to be one. Raises ModelError."""
    torch.set_num_threads(compute.threads)
    judged = safety.judges(has_checker=card.has_checker)
    model = load(card, torch.device(compute.device), getattr(torch, compute.dtype), with_checker=judged)
    shape = ChainShape(compute.slots, compute.decode_batch)
    return Chain(model, shape, _judge(model, shape.decode) if judged else None, stop)


def _judge(model: Family, batch: int) -> Judge:
    from batch_infer.safety.checker import StableDiffusionChecker

    return StableDiffusionChecker(model.safety_checker, model.feature_extractor, batch)


def _by_policy(pixels: np.ndarray, safety: SafetySettings) -> np.ndarray | None:
    """What is stored of a flagged image, None for nothing."""
    match safety.on_flagged:
        case "blank":
            return images.blank(pixels)
        case "blur":
            return images.blur(pixels)
        case "drop":
            return None
        case "keep" | "quarantine":
            return pixels


def _highest(outcome: Rendered) -> str:
    scores = outcome.verdict.scores or {}
    name = max(scores, key=lambda concept: scores[concept], default="no score")
    return f"{name} {scores[name]:+.3f}" if scores else name


def worker_name(rank: int) -> str:
    """The name of a worker in the rows it commits: machine, process and rank."""
    return f"{platform.node()}-{os.getpid()}-{rank}"
