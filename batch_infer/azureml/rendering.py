"""What of a mini-batch is not done: rendered and committed, and by no row brought to an end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from batch_infer.azureml.deployment import AzureDeployment
from batch_infer.azureml.in_progress import STRIKES, Begun, Key
from batch_infer.errors import BatchInferError
from batch_infer.jobs import Job
from batch_infer.manifest import Manifest, ManifestIndex
from batch_infer.planning import order_requests
from batch_infer.records import PromptRequest
from batch_infer.sinks import make_sink
from batch_infer.store import PinnedFolder
from batch_infer.worker import Worker, WorkerSettings, format_worker_name, load_chain, make_row


class Rendering:
    """A loaded model, and the rows that are under way in it."""

    def __init__(self, deployment: AzureDeployment, out: PinnedFolder) -> None:
        """Raises ModelError."""
        self._chain = load_chain(deployment.card, deployment.compute, deployment.settings.safety)
        self._held, self._manifest, self._begun = out, Manifest(out), Begun(out.path)
        self._given_up: set[Key] = set()

    def close(self) -> None:
        self._chain.close()

    def clear(self, is_settled: Callable[[Key], bool]) -> None:
        """Remove what the dead have left of rows that have their results. Raises StorageError."""
        self._begun.clear(is_settled)

    def render(self, job: Job, requests: Iterable[PromptRequest], index: ManifestIndex) -> None:
        """Render and commit requests, those last that a process has died with. Raises ServiceError, StorageError."""
        deaths = self._begun.deaths()
        struck: list[tuple[PromptRequest, int]] = []

        def unsuspected() -> Iterator[PromptRequest]:
            for request in requests:
                failures = _failures(request, index)
                if failures and request.key in self._given_up:  # by this very process, which still lives
                    continue
                if failures or request.key in deaths.times:
                    struck.append((request, failures))
                else:
                    yield request

        self._work(job, unsuspected())
        failed, groups = deaths.parted(struck)
        self._fail(job, failed)
        for group in groups:
            self._work(job, group, alone=len(group) == 1)

    def _work(self, job: Job, requests: Iterable[PromptRequest], *, alone: bool = False) -> None:
        compute = job.compute
        slots_of = None if job.card.uses_pipeline_call else lambda size: compute.shape_of(*size).slots
        settings = WorkerSettings(
            job.card, compute, job.settings.safety, job.settings.output, self._held, job.tables.carried
        )
        worker = Worker(settings, format_worker_name(0), lambda *_: self._chain)
        broken = True
        try:
            worker.render(self._begun.watched(order_requests(requests, slots_of), alone=alone), self._begun.settle)
            broken = False
        except BatchInferError:  # a service or a disk: no row's fault
            broken = False
            raise
        finally:
            self._begun.leave(broken=broken)

    def _fail(self, job: Job, requests: Sequence[PromptRequest]) -> None:
        """Commit rows that nobody could render and live."""
        if not requests:
            return
        why = f"work has broken off over this row {STRIKES} times, the last time with nothing else under way"
        name = job.card.scheduler_name
        rows = [make_row(request, "failed", why, scheduler=name, worker=format_worker_name(0)) for request in requests]
        self._manifest.commit(rows, job.tables.carried)
        self._given_up.update(request.key for request in requests)
        for request in requests:
            if request.replaces:
                make_sink(self._held).remove(request.replaces)


def _failures(request: PromptRequest, index: ManifestIndex) -> int:
    """How often this very row has failed before."""
    found = index.find(request.key) if request.attempt > 1 else None
    return found.failures if found and found.fingerprint == request.fingerprint else 0
