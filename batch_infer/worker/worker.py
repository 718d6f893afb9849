"""Render requests with a loaded model, store their images and commit their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, cast

from batch_infer import images
from batch_infer.chain import Chain, RenderedImage, RowOutcome, UnrenderedRow
from batch_infer.energy import EnergyMeter
from batch_infer.manifest import Manifest
from batch_infer.models import ModelCard
from batch_infer.peak_flops import peak_tflops
from batch_infer.provenance import Marker
from batch_infer.records import PromptRequest, ResultRow, Status, StoredImage
from batch_infer.settings import BatchShape, Compute, SafetySettings
from batch_infer.sinks import make_sink
from batch_infer.store import open_store
from batch_infer.worker.committing import Committer, commit_images
from batch_infer.worker.interface import WorkerReport, WorkerSettings, read_peak_memory
from batch_infer.worker.rows import explain_flag, make_row, with_image, with_verdict

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion

STORING_THREADS = 4
"""Number of threads that compress and write images if the CPU renders, and the minimum otherwise.

Four threads compress about 40 PNGs of 512x512 pixels per second. On a GPU, few-step models render more images than
that, and all of the worker's cores are free for these threads.
"""
MAX_STORING_THREADS = 32

ChainLoader: TypeAlias = Callable[[ModelCard, Compute, SafetySettings, Callable[[], bool]], Chain]
"""A function like `load_chain`."""

StoredRow: TypeAlias = tuple[ResultRow, str | None]
"""A row, whose image (if any) is written, and the path of the previous image that the row replaces, or None."""


class Worker:
    """Renders requests with a model on one device, stores their images and commits their rows."""

    def __init__(
        self, settings: WorkerSettings, name: str, load: ChainLoader, stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Load the chain. Every result row has `name` as its `worker`. Raises the errors of `load`."""
        self._settings, self._name = settings, name
        store = open_store(settings.out)
        self._sink = make_sink(store, settings.output.image_format, settings.output.sink)
        self._manifest = Manifest(store, settings.run)
        self._marker = Marker(settings.output.provenance, settings.card.name, settings.card.fingerprint)
        self._chain = load(settings.card, settings.compute, settings.safety, stop)
        self._meter: EnergyMeter | None = None  # until rendering begins

    def report(self, *, final: bool = False) -> WorkerReport:
        """Return statistics of the rows so far. Only a final report can have an MFU: counting FLOPs takes time."""
        shapes = (BatchShape(*size, *shape) for size, shape in self._chain.batch_sizes.by_size.items())
        compute = self._settings.compute.with_shapes(shapes)
        energy = self._meter.read() if self._meter is not None else None  # before counting FLOPs
        mfu = self._compute_mfu() if final else None
        peak_memory = read_peak_memory(compute.device)
        return WorkerReport(dict(self._chain.stages_by_size), compute, mfu, peak_memory, energy)

    def _compute_mfu(self) -> float | None:
        compute, chain = self._settings.compute, self._chain
        peak = peak_tflops(compute.device_name, compute.dtype)
        if peak is None or not chain.stages.seconds or chain.model.uses_pipeline_call or compute.offload:
            return None
        from batch_infer.models import decode_flops, denoise_flops

        model = cast("LatentDiffusion", chain.model)
        flops = 0
        for size, stages in chain.stages_by_size.items():
            latent_shape = model.latent_shape(*size)
            flops += stages.row_forwards * denoise_flops(model, latent_shape)
            flops += stages.images * decode_flops(model, latent_shape)
        return flops / chain.stages.seconds / (peak * 1e12)

    def render(self, requests: Iterable[PromptRequest], on_commit: Callable[[Sequence[ResultRow]], None]) -> None:
        """Render, store and commit requests, and call `on_commit` with committed rows on another thread.

        Returns early once `stop` returns True. Commits the finished rows before it returns or raises, unless storing
        or committing fails. Raises StorageError, CompilationError, and the errors of a safety service.
        """
        self._meter = self._meter or EnergyMeter(self._settings.compute.device)
        with (
            ThreadPoolExecutor(count_storing_threads(self._settings.compute), "storing") as pool,
            Committer[StoredRow](lambda batch: self._commit(batch, on_commit), self._sink.commit_limits) as committer,
        ):
            for outcome in self._chain.render(requests):
                committer.add(partial(pool.submit, self._store, outcome))

    def _store(self, outcome: RowOutcome) -> StoredRow:
        request, verdict = outcome.request, outcome.verdict
        status: Status
        error: str | None
        if isinstance(outcome, UnrenderedRow):
            status, error = outcome.status, outcome.error
        elif verdict.nsfw:
            status, error = "flagged", explain_flag(verdict)
        else:
            status, error = "ok", None
        scheduler = self._settings.card.scheduler_name
        row = with_verdict(make_row(request, status, error, scheduler=scheduler, worker=self._name), verdict)
        if isinstance(outcome, RenderedImage):
            row = replace(
                with_image(row, self._write(outcome, flagged=status == "flagged")),
                prompt_tokens=outcome.conditioning.prompt_tokens,
                prompt_truncated=outcome.conditioning.prompt_truncated,
                slots=outcome.slots,
                seconds=outcome.seconds,
            )
        return row, request.replaces

    def _write(self, outcome: RenderedImage, *, flagged: bool) -> StoredImage | None:
        """Write an image, after applying the policy to a flagged one. Returns None if the policy stores no image."""
        policy = self._settings.safety.policy
        pixels = self._marker.mark_pixels(outcome.pixels, policy if flagged else None)
        if pixels is None:
            return None
        card, request = self._settings.card, outcome.request
        parameters = images.format_parameters(request, card.scheduler_name, card.fingerprint)
        path = self._sink.path_of(request, is_flagged=flagged, quarantine=flagged and policy == "quarantine")
        content = self._marker.encode(pixels, self._settings.output.image_format, parameters)
        stored = self._sink.write(path, content)
        return replace(stored, pixels_sha256=images.hash_pixels(pixels))

    def _commit(self, batch: list[StoredRow], on_commit: Callable[[Sequence[ResultRow]], None]) -> None:
        rows = [row for row, _ in batch]
        written = [row.generated_image for row in rows if row.generated_image]
        previous = [path for _, path in batch if path]
        carried = self._settings.carried
        on_commit(commit_images(self._sink, self._manifest, rows, carried, written=written, previous=previous))


def count_storing_threads(compute: Compute) -> int:
    """Return the number of threads that compress and write a worker's images."""
    if compute.device == "cpu":
        return STORING_THREADS
    return max(STORING_THREADS, min(compute.threads, MAX_STORING_THREADS))
