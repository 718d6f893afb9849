"""Test the options of --engine ray, the requests for actors, and how a node adapts the settings, without a cluster."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
from ray.exceptions import RayError

from batch_infer.engines import RankInfo, check_engine, factory, ray_engine, remote
from batch_infer.engines import ray as ray_module
from batch_infer.engines.actor_pool import Resources
from batch_infer.engines.protocol import WorkersLostError
from batch_infer.engines.ray import RayCluster
from batch_infer.engines.ray_engine import RayEngine
from batch_infer.engines.supervisor import MAX_FAILURES
from batch_infer.errors import ModelError, ServiceError, SettingsError
from batch_infer.models import read_card
from batch_infer.settings import (
    Compute,
    ComputeSettings,
    LoraSpec,
    ModelSettings,
    OutputSettings,
    RunSettings,
    SafetySettings,
    TableSettings,
)
from batch_infer.store import LocalStore
from batch_infer.worker import WorkerSettings
from tests.deaths import write_prompts
from tests.runs import run

SETTINGS = RunSettings(TableSettings(("t.csv",)), "out", compute=ComputeSettings(engine="ray"))


def test_a_missing_ray_is_a_sentence_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "find_spec", lambda name: None)
    done = run(write_prompts(tmp_path, 1), tmp_path / "out", "--engine", "ray", "--num-processes", "1")
    assert done.code == 2
    assert "--engine ray needs ray: pip install ray" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "rank_info", "message"),
    [
        ({}, RankInfo(0, 2, 0, 2, "127.0.0.1"), "--engine ray does not run under a launcher"),
        ({"processes": 0}, None, "--num-processes 0 renders in the command's own process"),
        ({"slots": "auto"}, None, "--slots auto measures this machine"),
        ({"ray_address": "ray://head:10001"}, None, "does not work through Ray Client"),
        ({"engine": "local", "ray_address": "head:6379"}, None, "--ray-address head:6379 has no effect without"),
    ],
)
def test_options_that_conflict_are_refused(changes: Any, rank_info: RankInfo | None, message: str) -> None:
    check_engine(SETTINGS, None)
    settings = replace(SETTINGS, compute=replace(SETTINGS.compute, **changes))
    with pytest.raises(SettingsError, match=message):
        check_engine(settings, rank_info)


class FakeActor:
    """An actor that does not start. With a cause, its process has ended."""

    def __init__(self, cause: str | None) -> None:
        self.cause, self.is_killed = cause, False

    def kill(self) -> None:
        self.is_killed = True

    def find_cause(self, seconds: float) -> str | None:
        return self.cause


class FakeCluster:
    host, metrics = "127.0.0.1", SimpleNamespace(set_workers=lambda connected, pending: None)

    def __init__(self, cause: str | None = None, gpus: int = 0) -> None:
        self._cause, self._gpus = cause, gpus
        self.actors: list[FakeActor] = []
        self.needs: list[Resources] = []

    def __enter__(self) -> FakeCluster:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def has_gpus(self) -> bool:
        return bool(self._gpus)

    def count_actors(self, needs: Resources) -> int:
        return 0

    def start(self, needs: Resources, *_: Any) -> FakeActor:
        self.needs.append(needs)
        self.actors.append(FakeActor(self._cause))
        return self.actors[-1]

    def wait_for_ends(self, actors: Iterable[FakeActor], seconds: float = 0.0) -> list[FakeActor]:
        return [actor for actor in actors if actor.cause is not None]


def make_engine(cluster: FakeCluster, device: Any = "auto") -> RayEngine:
    return RayEngine(cast(Any, cluster), ModelSettings(device=device), None, 3)


@pytest.fixture
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(ray_engine, "POLL_SECONDS", 0.001)


@pytest.mark.usefixtures("_no_pauses")
def test_actors_that_never_start_end_the_run() -> None:
    cluster = FakeCluster("the runtime environment cannot be set up")
    with (
        make_engine(cluster) as engine,
        pytest.raises(WorkersLostError, match="no worker can start on the Ray cluster: the runtime environment"),
    ):
        engine.detect_device()
    assert len(cluster.actors) == MAX_FAILURES


@pytest.mark.usefixtures("_no_pauses")
def test_a_run_does_not_wait_forever_for_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_engine, "NOTICE_SECONDS", 0.0)
    monkeypatch.setattr(ray_engine, "ARRIVAL_SECONDS", 0.1)
    cluster = FakeCluster()
    with (
        caplog.at_level(logging.INFO, "batch_infer"),
        make_engine(cluster, "cuda") as engine,
        pytest.raises(WorkersLostError, match="placed no worker that needs 1 GPU and 3 CPUs in 0 s"),
    ):
        engine.detect_device()
    assert caplog.text.count("waiting for the Ray cluster to place a worker that needs 1 GPU and 3 CPUs") == 1
    assert caplog.text.count("no node of the Ray cluster has that many: reduce --threads") == 1
    assert [actor.is_killed for actor in cluster.actors] == [True]


@pytest.mark.parametrize(
    ("device", "gpus", "needs"),
    [("auto", 0, Resources(3)), ("auto", 2, Resources(3, 1)), ("cpu", 2, Resources(3)), ("cuda", 0, Resources(3, 1))],
)
def test_an_actor_reserves_a_gpu_or_the_threads_of_a_worker(device: str, gpus: int, needs: Resources) -> None:
    cluster = FakeCluster(gpus=gpus)
    with make_engine(cluster, device):
        assert cluster.needs == [needs]


def make_worker_settings(out: Path) -> WorkerSettings:
    compute, safety = Compute("cpu", "float32", 16, 8, 1), SafetySettings("none")
    (out / "marker").touch()
    folder = replace(LocalStore(out).address, marker="marker")
    return WorkerSettings(read_card(ModelSettings()), compute, safety, OutputSettings(), folder, pa.schema([]))


def test_a_node_that_does_not_see_out_is_refused(tmp_path: Path) -> None:
    settings = make_worker_settings(tmp_path)
    assert remote.localize(settings, ModelSettings(), "n1") == settings
    (tmp_path / "marker").unlink()
    with pytest.raises(SettingsError, match="node n1 does not see this run's files in .*a disk that all nodes share"):
        remote.localize(settings, ModelSettings(), "n1")


def test_a_node_with_another_model_is_refused(tmp_path: Path) -> None:
    settings = make_worker_settings(tmp_path)
    other = replace(settings, card=replace(settings.card, fingerprint="other"))
    with pytest.raises(ModelError, match="node n1: built-in demo model differs from the driver's model of that name"):
        remote.localize(other, ModelSettings(), "n1")
    with pytest.raises(ModelError, match="node n1: .*missing is neither a model folder nor"):
        remote.localize(other, ModelSettings(str(tmp_path / "missing")), "n1")


def test_a_node_uses_the_commit_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_worker_settings(tmp_path)
    card = replace(settings.card, revision="commit", path=tmp_path / "not here yet")
    requested: list[str | None] = []

    def read(model: ModelSettings, *, needs_checker: bool) -> Any:
        requested.append(model.revision)
        return card

    monkeypatch.setattr(remote, "read_card", read)
    assert remote.localize(replace(settings, card=card), ModelSettings("a/b", "main"), "n1").card is card
    assert requested == ["commit"]


def test_paths_of_the_model_are_absolute_on_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    model = remote.with_absolute_paths(ModelSettings("model", loras=(LoraSpec("a.safetensors", 0.5),)))
    assert (model.name, model.loras) == (
        str(tmp_path / "model"),
        (LoraSpec(str(tmp_path / "a.safetensors"), 0.5),),
    )
    assert remote.with_absolute_paths(ModelSettings("owner/name")).name == "owner/name"


def test_a_cluster_that_does_not_respond_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ServiceError, match=f"the Ray cluster at {address} does not respond: Connection refused"):
        RayCluster(address).__enter__()
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ServiceError, match=f"the Ray cluster at {address} does not respond"):
        RayCluster(None).__enter__()
    with pytest.raises(SettingsError, match="the Ray cluster at nowhere cannot be used: "):
        RayCluster("nowhere").__enter__()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "The actor died unexpectedly before finishing this task.\n\tclass_name: Actor\n"
            "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker",
            "its worker process has died",
        ),
        ("The actor is dead because its node has died. Node Id: 12", "its node has died. Node Id: 12"),
        ("Failed to set up runtime environment.\nno such file", "Failed to set up runtime environment"),
        (
            "The actor died because of an error raised in its creation task, ray::Actor\n"
            "ModuleNotFoundError: No module named 'batch_infer'\n",
            "ModuleNotFoundError: No module named 'batch_infer'",
        ),
    ],
)
def test_the_end_of_an_actor_is_explained_in_one_line(text: str, cause: str) -> None:
    assert ray_module._explain(RayError(text)) == cause


def test_stdout_has_no_lines_from_ray(caplog: pytest.LogCaptureFixture) -> None:
    stdout = io.StringIO()
    output = ray_module._RayOutput(stdout)
    thread = threading.Thread(target=output.write, args=("a raylet died",), name=ray_module.ERROR_THREAD)
    with caplog.at_level(logging.DEBUG, "batch_infer"):
        thread.start()
        thread.join()
        print("the result", file=output)
    assert stdout.getvalue() == "the result\n"
    assert "Ray: a raylet died" in caplog.text


def test_a_signal_while_ray_starts_reaches_the_handler_of_the_command() -> None:
    """Ray installs a handler that raises SystemExit."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with pytest.raises(SystemExit), ray_module._own_sigterm_handler():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
