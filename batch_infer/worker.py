"""A worker: one device, requests in, committed results out."""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import pyarrow as pa
import torch

from batch_infer import images
from batch_infer.chain import Chain, ChainShape, DrivenChain, Rendered, Size, Stages, Unrendered
from batch_infer.datasheets import dense_tflops
from batch_infer.manifest import Manifest
from batch_infer.models import ModelCard, load, load_driven
from batch_infer.models.acceleration import is_compiled, speed_up
from batch_infer.models.any_pipeline import AnyPipeline
from batch_infer.models.flops import decode_flops, row_forward_flops
from batch_infer.records import PromptRequest, ResultRow, Status, StoredImage, now
from batch_infer.safety import Judge
from batch_infer.settings import BatchShape, Compute, OutputSettings, SafetySettings
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


@dataclass(frozen=True, slots=True)
class Account:
    """What a worker's work took: where the time went, by image size (height, width), and how it computed at the end.

    That is as it was told, but for batches that memory did not hold, and a compiler that failed. `mfu` is the model
    FLOP utilisation (Chowdhery et al., arXiv 2204.02311, appendix B): what the images' UNet rows and decoding come to,
    over what the device could have computed; None where its peak is not known.
    """

    stages: Mapping[Size, Stages]
    compute: Compute
    mfu: float | None


class Worker:
    """One device, with its model loaded, that renders requests and commits what became of them."""

    def __init__(self, settings: WorkerSettings, stop: Callable[[], bool] = lambda: False) -> None:
        """Loads the model. Raises ModelError."""
        self._settings = settings
        self._sink = FolderSink(settings.out, images.SUFFIX[settings.output.image_format])
        self._manifest = Manifest(settings.out)
        self._chain = load_chain(settings.card, settings.compute, settings.safety, stop)

    @property
    def account(self) -> Account:
        shapes = (BatchShape(*size, *shape) for size, shape in self._chain.shape.by_size.items())
        compute = self._settings.compute.with_shapes(shapes)
        compiled = compute.compiled and is_compiled(self._chain.model.networks)
        return Account(self._chain.stages_by_size, replace(compute, compiled=compiled), self._mfu())

    def _mfu(self) -> float | None:
        compute, chain = self._settings.compute, self._chain
        peak = dense_tflops(compute.device_name, compute.dtype)
        if peak is None or not chain.stages.seconds or isinstance(chain, DrivenChain):
            return None
        flops = 0
        for size, stages in chain.stages_by_size.items():
            latent_shape = chain.model.latent_shape(*size)
            flops += stages.row_forwards * row_forward_flops(chain.model, latent_shape)
            flops += stages.images * decode_flops(chain.model, latent_shape)
        return flops / chain.stages.seconds / (peak * 1e12)

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
        parameters = images.parameters_text(request, card.scheduler_name, card.title)
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
) -> Chain | DrivenChain:
    """A model on its device, with its judge where there is to be one. Raises ModelError."""
    return make_chain(load_any_model(card, compute, judged=safety.judges(has_checker=card.has_checker)), compute, stop)


def load_any_model(card: ModelCard, compute: Compute, *, judged: bool) -> Family | AnyPipeline:
    """As `load_model`, and also what is driven by diffusers' own pipeline."""
    if not card.driven:
        return load_model(card, compute, judged=judged)
    torch.set_num_threads(compute.threads)
    return load_driven(card, torch.device(compute.device), getattr(torch, compute.dtype), with_checker=judged)


def load_model(card: ModelCard, compute: Compute, *, judged: bool) -> Family:
    """A model on its device, and its checker where images are to be judged. Raises ModelError."""
    torch.set_num_threads(compute.threads)
    model = load(card, torch.device(compute.device), getattr(torch, compute.dtype), with_checker=judged)
    speed_up(model.networks, model.device, compiled=compute.compiled)
    return model


@overload
def make_chain(model: Family, compute: Compute, stop: Callable[[], bool] = lambda: False) -> Chain: ...
@overload
def make_chain(model: AnyPipeline, compute: Compute, stop: Callable[[], bool] = lambda: False) -> DrivenChain: ...
def make_chain(
    model: Family | AnyPipeline, compute: Compute, stop: Callable[[], bool] = lambda: False
) -> Chain | DrivenChain:
    """A chain of a model that is loaded; images are judged where its checker is."""
    own = {(shape.height, shape.width): (shape.slots, shape.decode_batch) for shape in compute.by_size}
    shape = ChainShape(compute.slots, compute.decode_batch, own)
    judge = _judge(model, shape.decode) if model.safety_checker is not None else None
    if isinstance(model, AnyPipeline):
        return DrivenChain(model, shape, judge, stop)
    return Chain(model, shape, judge, stop)


def _judge(model: Family | AnyPipeline, batch: int) -> Judge:
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
