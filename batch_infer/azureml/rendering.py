"""Rendering the pending rows of a mini-batch, so that a row that crashes its process costs no other row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from batch_infer.azureml.deployment import AzureDeployment
from batch_infer.azureml.in_progress import MAX_CRASHES, Key, ProgressMarkers
from batch_infer.errors import BatchInferError
from batch_infer.jobs import Job
from batch_infer.manifest import Manifest, ManifestIndex
from batch_infer.planning import order_requests
from batch_infer.records import PromptRequest
from batch_infer.sinks import make_sink
from batch_infer.store import PinnedFolder
from batch_infer.worker import Worker, WorkerSettings, format_worker_name, load_chain, make_row


class MiniBatchRenderer:
    """A loaded model that renders and commits rows."""

    def __init__(self, deployment: AzureDeployment, out: PinnedFolder) -> None:
        """Load the model. Raises ModelError."""
        self._chain = load_chain(deployment.card, deployment.compute, deployment.settings.safety)
        self._out, self._manifest, self._markers = out, Manifest(out), ProgressMarkers(out.path)
        self._failed: set[Key] = set()
        """Rows that this process has committed as failed after crashes."""

    def close(self) -> None:
        self._chain.close()

    def remove_settled_markers(self, is_settled: Callable[[Key], bool]) -> None:
        """Remove the markers that dead processes have left of rows with results. Raises StorageError."""
        self._markers.remove_settled(is_settled)

    def render(self, job: Job, requests: Iterable[PromptRequest], index: ManifestIndex) -> None:
        """Render and commit requests. Those that were in progress in a crash come last, in smaller groups.

        Raises ServiceError, StorageError.
        """
        crashes = self._markers.read_crashes()
        suspects: list[tuple[PromptRequest, int]] = []

        def unsuspected() -> Iterator[PromptRequest]:
            for request in requests:
                failures = _count_failures(request, index)
                if failures and request.key in self._failed:
                    continue
                if failures or request.key in crashes.counts:
                    suspects.append((request, failures))
                else:
                    yield request

        self._render(job, unsuspected())
        failed, groups = crashes.group(suspects)
        self._commit_failed(job, failed)
        for group in groups:
            self._render(job, group, alone=len(group) == 1)

    def _render(self, job: Job, requests: Iterable[PromptRequest], *, alone: bool = False) -> None:
        card, compute, settings = job.card, job.compute, job.settings
        slots_of = None if card.uses_pipeline_call else lambda size: compute.shape_of(*size).slots
        worker_settings = WorkerSettings(card, compute, settings.safety, settings.output, self._out, job.tables.carried)
        worker = Worker(worker_settings, format_worker_name(0), lambda *_: self._chain)
        marked = self._markers.mark(order_requests(requests, slots_of), alone=alone)
        crashed = True
        try:
            worker.render(marked, self._markers.record_committed)
            crashed = False
        except BatchInferError:  # a service or a disk failed, not a row
            crashed = False
            raise
        finally:
            self._markers.close(crashed=crashed)

    def _commit_failed(self, job: Job, requests: Sequence[PromptRequest]) -> None:
        if not requests:
            return
        error = f"rendering crashed {MAX_CRASHES} times with this row in progress, the last time with no other row"
        worker, scheduler = format_worker_name(0), job.card.scheduler_name
        rows = [make_row(request, "failed", error, scheduler=scheduler, worker=worker) for request in requests]
        self._manifest.commit(rows, job.tables.carried)
        self._failed.update(request.key for request in requests)
        for request in requests:
            if request.replaces:
                make_sink(self._out).remove(request.replaces)


def _count_failures(request: PromptRequest, index: ManifestIndex) -> int:
    """Return how often this row, unchanged, has failed before."""
    entry = index.find(request.key) if request.attempt > 1 else None
    return entry.failures if entry and entry.fingerprint == request.fingerprint else 0
