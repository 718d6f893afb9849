"""Connect to a Ray cluster, start, watch and kill actors there, and publish metrics. Only this file imports ray."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util import get_node_ip_address
from ray.util.metrics import Counter as MetricsCounter
from ray.util.metrics import Gauge

from batch_infer.errors import ServiceError, SettingsError, first_line
from batch_infer.records import ResultRow

if TYPE_CHECKING:
    from batch_infer.engines.actor_pool import Resources

ERROR_THREAD = "ray_listen_error_messages"
"""Name of the thread on which Ray prints to stdout which processes of the cluster have died."""
CONNECT_SECONDS = 30.0
DEAD = "The actor is dead because "

log = logging.getLogger("batch_infer")


class Actor:
    """Runs one function in a process that Ray starts on a node of the cluster."""

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        function(*arguments)


class ActorProcess:
    """The process of an actor, which may not have started yet, or may never start."""

    def __init__(self, actor: Any, reference: Any) -> None:
        self._actor, self.reference = actor, reference
        self._cause: str | None = None

    def kill(self) -> None:
        """Kill the process, or cancel its start. Does not wait."""
        ray.kill(self._actor)

    def find_cause(self, seconds: float) -> str | None:
        """Wait up to this many seconds for the end, and return its cause, or None if the function returned or runs."""
        if self._cause is None:
            try:
                ray.get(self.reference, timeout=seconds)
            except GetTimeoutError:
                pass
            except RayError as error:
                self._cause = _explain(error)
                log.debug("an actor ended: %s", " ".join(str(error).split()))
        return self._cause


def _explain(error: RayError) -> str:
    """Return the sentence of an error that says why an actor ended. Ray's messages have many lines."""
    if isinstance(error, RayTaskError):
        return first_line(error.cause) if isinstance(error.cause, Exception) else str(error).rpartition("\n")[2]
    lines = str(error).strip().splitlines()
    if "in its creation task" in lines[0]:  # for example a ModuleNotFoundError, at the end of a traceback
        return lines[-1]
    reasons = [line.removeprefix(DEAD) for line in lines if line.startswith(DEAD)]
    return (reasons or lines)[0].partition(" Worker exit type")[0].rstrip(".")


class RayCluster:
    """A connection to a Ray cluster, as a context manager. Leaves a connection that the Python program already has."""

    def __init__(self, address: str | None) -> None:
        """With None, Ray uses RAY_ADDRESS, else the cluster on this machine, else it starts one on this machine."""
        self._address = address

    def __enter__(self) -> RayCluster:
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(_RayOutput(sys.stdout)))
            if not ray.is_initialized():
                _connect(self._address)
                stack.callback(ray.shutdown)
            self.metrics = Metrics()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def host(self) -> str:
        """The address of this machine for the nodes of the cluster."""
        return str(get_node_ip_address())

    def has_gpus(self) -> bool:
        return float(ray.cluster_resources().get("GPU", 0)) > 0

    def count_actors(self, needs: Resources) -> int:
        """Return how many actors with these resources fit on the nodes, whether they are in use or not."""
        total = 0
        for node in ray.nodes():
            resources = node["Resources"] if node["Alive"] else {}
            limits = [resources.get("CPU", 0) // needs.cpus]
            total += int(min([*limits, resources.get("GPU", 0) // needs.gpus] if needs.gpus else limits))
        return total

    def start(self, needs: Resources, function: Callable[..., None], *arguments: Any) -> ActorProcess:
        """Request an actor that calls the function. It starts once a node has these resources, and never restarts."""
        actor_class = ray.remote(Actor).options(num_cpus=needs.cpus, num_gpus=needs.gpus, max_restarts=0)
        actor = actor_class.remote()
        return ActorProcess(actor, actor.run.remote(function, *arguments))

    def wait_for_ends(self, processes: Iterable[ActorProcess], seconds: float = 0.0) -> list[ActorProcess]:
        """Wait up to this many seconds until all processes have ended, and return those that have."""
        by_reference = {process.reference: process for process in processes}
        if not by_reference:
            return []
        ended, _ = ray.wait(list(by_reference), num_returns=len(by_reference), timeout=seconds, fetch_local=False)
        return [by_reference[reference] for reference in ended]


def _connect(address: str | None) -> None:
    """Connect to a cluster or start one.

    Raises ServiceError if the cluster does not respond, and SettingsError if it cannot be used from this machine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS") or None
    try:
        host, _, port = (address or "").rpartition(":")
        if port.isdecimal():  # otherwise Ray would wait for many minutes for a port where no process listens
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        with _own_sigterm_handler():
            # The dashboard applies only to a cluster that Ray starts now.
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        name = f"the Ray cluster at {address}" if address else "the Ray cluster on this machine"
        if isinstance(error, OSError):
            raise ServiceError(f"{name} does not respond: {error.strerror or first_line(error)}") from error
        raise SettingsError(f"{name} cannot be used: {first_line(error)}") from error


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Restore the handler of SIGTERM, since Ray installs one that ends the process, and repeat a signal to it."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    has_ended = False
    try:
        yield
    except SystemExit as error:
        has_ended = error.code == signal.SIGTERM
        raise
    finally:
        if is_main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
            if has_ended:
                signal.raise_signal(signal.SIGTERM)


class _RayOutput(io.TextIOBase):
    """Passes on what this program prints to stdout, and logs what Ray prints, since stdout has the command's result."""

    def __init__(self, stdout: TextIO) -> None:
        self._stdout = stdout

    def write(self, text: str) -> int:
        if threading.current_thread().name != ERROR_THREAD:
            return self._stdout.write(text)
        if text.strip():
            log.debug("Ray: %s", first_line(ValueError(text)))
        return len(text)

    def flush(self) -> None:
        self._stdout.flush()

    def fileno(self) -> int:
        return self._stdout.fileno()

    def isatty(self) -> bool:
        return self._stdout.isatty()


class Metrics:
    """Metrics that Ray exports from this process, for its dashboard and for Prometheus."""

    def __init__(self) -> None:
        self._results = MetricsCounter("batch_infer_results", "Committed results by status.", ("status",))
        self._workers = Gauge("batch_infer_workers", "Connected workers.")
        self._pending = Gauge("batch_infer_workers_pending", "Workers that are requested but not connected.")

    def add(self, rows: Sequence[ResultRow]) -> None:
        for status, number in Counter(row.status for row in rows).items():
            self._results.inc(number, {"status": status})

    def set_workers(self, connected: int, pending: int) -> None:
        self._workers.set(connected)
        self._pending.set(pending)
