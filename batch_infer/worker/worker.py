"""One device's worker: it loads the model once, and then renders, stores and commits what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, cast

from batch_infer import images
from batch_infer.chain import GatedChain, PipelineCallChain, Rendered, StepLevelChain, Unrendered
from batch_infer.errors import BatchInferError
from batch_infer.manifest import Manifest
from batch_infer.models import ModelCard
from batch_infer.peak_flops import dense_tflops
from batch_infer.records import PromptRequest, ResultRow, Status, StoredImage
from batch_infer.settings import BatchShape, Compute, SafetySettings
from batch_infer.sinks import FolderSink
from batch_infer.worker.committing import Committer, commit_images
from batch_infer.worker.interface import WorkerReport, WorkerSettings
from batch_infer.worker.memory import peak_memory
from batch_infer.worker.rows import explain_flag, make_row, set_rendering, set_verdict

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion

STORING_THREADS = 4
"""Threads that compress and write images beside a CPU's rendering.

A GPU leaves the worker's cores to them: four compress about 40 PNGs of 512x512 pixels a second, and few-step models
render more.
"""
MOST_STORING_THREADS = 32

Chain: TypeAlias = "StepLevelChain | PipelineCallChain | GatedChain"
ChainLoader: TypeAlias = "Callable[[ModelCard, Compute, SafetySettings, Callable[[], bool]], Chain]"
"""Loads what renders; the last argument says whether to stop."""


class Worker:
    """One device, with its model loaded, that renders requests and commits what became of them."""

    def __init__(
        self,
        settings: WorkerSettings,
        name: str,
        load: ChainLoader,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Loads what renders. `name` will stand in its rows. Raises ModelError."""
        self._settings, self._name = settings, name
        self._sink = FolderSink(settings.out, images.SUFFIX[settings.output.image_format])
        self._manifest = Manifest(settings.out, settings.run)
        self._chain = load(settings.card, settings.compute, settings.safety, stop)

    def report(self, *, final: bool = False) -> WorkerReport:
        """Of all that it has rendered so far. Only the `final` one has an MFU: that takes a walk through the model."""
        shapes = (BatchShape(*size, *shape) for size, shape in self._chain.shape.by_size.items())
        compute = self._settings.compute.with_shapes(shapes)
        mfu = self._mfu() if final else None
        return WorkerReport(dict(self._chain.stages_by_size), compute, mfu, peak_memory(compute.device))

    def _mfu(self) -> float | None:
        compute, chain = self._settings.compute, self._chain
        peak = dense_tflops(compute.device_name, compute.dtype)
        if peak is None or not chain.stages.seconds or chain.driven:
            return None
        from batch_infer.models import decode_flops, denoise_flops

        model = cast("LatentDiffusion", chain.model)
        flops = 0
        for size, stages in chain.stages_by_size.items():
            latent_shape = model.latent_shape(*size)
            flops += stages.row_forwards * denoise_flops(model, latent_shape)
            flops += stages.images * decode_flops(model, latent_shape)
        return flops / chain.stages.seconds / (peak * 1e12)

    def render(self, requests: Iterable[PromptRequest], committed: Callable[[Sequence[ResultRow]], None]) -> None:
        """Render requests; `committed` is called, on another thread, with rows once they are in the manifest.

        Returns early, with all that is finished committed, once `stop` says so. Raises StorageError, and the errors of
        a safety service, after those that were finished before are committed too.
        """
        outcomes = _Outcomes(self._chain.render(requests))
        with (
            ThreadPoolExecutor(storing_threads(self._settings.compute), "storing") as pool,
            Committer[_Stored](lambda batch: self._commit(batch, committed)) as committer,
        ):
            for outcome in outcomes:
                committer.add(partial(pool.submit, self._store, outcome))
        if outcomes.fault is not None:
            raise outcomes.fault

    def _store(self, outcome: Rendered | Unrendered) -> _Stored:
        request = outcome.request
        if isinstance(outcome, Unrendered):
            row = set_verdict(self._row(request, outcome.status, outcome.error), outcome.verdict)
            return _Stored(row, None, request.replaces)
        flagged = bool(outcome.verdict.nsfw)
        stored = self._write(outcome, flagged)
        row = (
            self._row(request, "flagged", explain_flag(outcome.verdict)) if flagged else self._row(request, "ok", None)
        )
        return _Stored(set_rendering(row, outcome, stored), stored.path if stored else None, request.replaces)

    def _row(self, request: PromptRequest, status: Status, error: str | None) -> ResultRow:
        return make_row(request, status, error, scheduler=self._settings.card.scheduler_name, worker=self._name)

    def _write(self, outcome: Rendered, flagged: bool) -> StoredImage | None:
        pixels = images.by_policy(outcome.pixels, self._settings.safety.policy) if flagged else outcome.pixels
        if pixels is None:
            return None
        card, request = self._settings.card, outcome.request
        parameters = images.parameters_text(request, card.scheduler_name, card.fingerprint)
        quarantine = flagged and self._settings.safety.policy == "quarantine"
        path = self._sink.path_of(request, quarantine=quarantine)
        stored = self._sink.write(path, images.encode(pixels, self._settings.output.image_format, parameters))
        return replace(stored, pixels_sha256=images.pixels_sha256(pixels))

    def _commit(self, batch: list[_Stored], committed: Callable[[Sequence[ResultRow]], None]) -> None:
        rows = [stored.row for stored in batch]
        written = [stored.written for stored in batch if stored.written]
        former = [stored.former for stored in batch if stored.former]
        commit_images(self._sink, self._manifest, rows, self._settings.carried, written=written, former=former)
        committed(rows)


def storing_threads(compute: Compute) -> int:
    """How many threads compress and write a worker's images."""
    if compute.device == "cpu":
        return STORING_THREADS
    return max(STORING_THREADS, min(compute.threads, MOST_STORING_THREADS))


class _Outcomes:
    """What a chain gives, until a service that it asks is the `fault` that ends it."""

    def __init__(self, source: Iterable[Rendered | Unrendered]) -> None:
        self._source = source
        self.fault: BatchInferError | None = None

    def __iter__(self) -> Iterator[Rendered | Unrendered]:
        try:
            yield from self._source
        except BatchInferError as error:
            self.fault = error


@dataclass(frozen=True, slots=True)
class _Stored:
    """A row, and the paths of the image that was written for it and of the one that an earlier attempt left."""

    row: ResultRow
    written: str | None
    former: str | None
