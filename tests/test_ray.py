"""Test runs on a Ray cluster of simulated nodes, with actors, nodes and drivers that are killed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_infer.engines import ledger
from batch_infer.errors import ModelError
from tests import light_worker, runs
from tests.deaths import eventually, is_alive, write_prompts
from tests.engine_runs import EngineRun
from tests.ray_runs import RayRun, actors_of, kill, simulated_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes with one CPU each."""
    with simulated_cluster(1, 1, 1) as cluster:
        yield cluster


def sha256s(run: EngineRun) -> dict[str, str | None]:
    return {name: row["sha256"] for name, row in run.rows().items()}


def assert_no_actors(cluster: Any) -> None:
    assert eventually(lambda: not any(actors_of(node) for node in cluster.list_all_nodes()), 60)


def ranks(run: EngineRun) -> set[str]:
    return {str(row.worker).rpartition("-")[2] for row in run.committed}


def test_three_nodes_render_the_same_bytes_as_local_workers(tmp_path: Path, cluster: Any) -> None:
    prompts = [f"{k}" for k in range(200)]
    local_run = EngineRun(tmp_path / "local", prompts, load=light_worker.load)
    local_run.run()
    ray_run = RayRun(tmp_path / "ray", prompts, load=light_worker.load_slow, address=cluster.address)
    report = ray_run.run()
    ray_run.assert_accounted()
    assert (report.processes, report.deaths) == (3, 0)
    assert sha256s(ray_run) == sha256s(local_run)
    assert_no_actors(cluster)


@pytest.mark.promises
def test_a_row_that_kills_its_actor_costs_no_other_row(
    tmp_path: Path, cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's messages about the deaths are not in stdout."""
    prompts = ["a"] * 100
    prompts[30], prompts[50] = "die by SIGKILL", "raise fault"
    run = RayRun(tmp_path / "out", prompts, address=cluster.address)
    report = run.run()
    run.assert_accounted(30, 50)
    assert 4 <= report.deaths <= 6
    assert run.rows()["30"]["error"].endswith("the last with no other row: its worker process has died")
    assert run.rows()["50"]["error"].endswith("the last with no other row: RuntimeError: the device said fault")
    assert capsys.readouterr().out == ""
    assert_no_actors(cluster)


@pytest.mark.promises
def test_a_node_that_joins_late_gets_a_worker(tmp_path: Path) -> None:
    with simulated_cluster(1) as cluster:
        run = RayRun(tmp_path / "out", ["a"] * 20_000, load=light_worker.load_slow, address=cluster.address)

        def stop() -> bool:
            if run.committed and len(cluster.worker_nodes) == 1:
                cluster.add_node(num_cpus=1)
            return len(ranks(run)) == 2

        report = run.run(stop)
    assert ranks(run) == {"0", "1"}
    assert report.processes == 2


@pytest.mark.promises
def test_an_actor_that_always_dies_while_loading_ends_the_run(tmp_path: Path, cluster: Any) -> None:
    with pytest.raises(ModelError, match="died while it loaded the model .its worker process has died"):
        RayRun(tmp_path / "out", ["a"] * 10, load=light_worker.load_dying, address=cluster.address).run()
    assert_no_actors(cluster)


@pytest.mark.promises
def test_no_row_is_lost_when_actors_and_a_node_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks keep the rows of one kill few, so that no row is in three of them and fails."""
    monkeypatch.setattr(ledger, "CHUNK_ROWS", 4)
    monkeypatch.setenv("LIGHT_COMMIT_ROWS", "1")
    prompts, draw = [f"{k}" for k in range(600)], random.Random(0)
    killed: list[int] = []
    local_run = EngineRun(tmp_path / "local", prompts, load=light_worker.load)
    local_run.run()
    with simulated_cluster(2) as cluster:
        lost_node = cluster.add_node(num_cpus=2)
        run = RayRun(tmp_path / "ray", prompts, load=light_worker.load_slow, address=cluster.address)

        def kill_sometimes() -> bool:
            if len(killed) < 30 and len(run.committed) > 15 * len(killed):
                recent = sorted({int(str(row.worker).split("-")[-2]) for row in run.committed} - set(killed))
                if alive := [pid for pid in recent if is_alive(pid)]:
                    killed.append(draw.choice(alive))
                    kill(killed[-1])
                    if len(killed) == 15:
                        cluster.remove_node(lost_node, allow_graceful=False)
                    if len(killed) == 20:
                        cluster.add_node(num_cpus=2)
            return False

        report = run.run(kill_sometimes)
        assert_no_actors(cluster)
    run.assert_accounted()
    assert sha256s(run) == sha256s(local_run)
    assert len(killed) == 30
    assert report.deaths >= 30
    assert not any(is_alive(int(str(row.worker).split("-")[-2])) for row in run.committed)


@pytest.mark.promises
def test_actors_end_with_a_driver_that_is_killed(tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running the same command again renders the remaining rows, with the bytes of a local run. `retry` works too."""
    table, out = write_prompts(tmp_path, 60), tmp_path / "out"
    assert runs.run(table, tmp_path / "local").code == 0
    options = ("--num-processes", "2", "--engine", "ray", "--ray-address", cluster.address)
    with runs.start(table, out, *options) as process:
        assert runs.wait_for(process, lambda: any((out / "images").rglob("*.png")))
        assert any(actors_of(node) for node in cluster.list_all_nodes())
        process.kill()
    assert_no_actors(cluster)
    done = runs.run(table, out, *options)
    assert done.code == 0, done.stderr
    assert runs.hashes(out) == runs.hashes(tmp_path / "local")
    runs.assert_whole(out)
    (image, *_) = sorted((out / "images").rglob("*.png"))
    image.unlink()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)  # run.json has the engine, and not the address
    assert runs.command("retry", out, "--status", "missing").code == 0
    assert runs.hashes(out) == runs.hashes(tmp_path / "local")
    assert_no_actors(cluster)


@pytest.mark.promises
def test_a_stop_while_the_cluster_has_no_room_ends_the_run(tmp_path: Path, cluster: Any) -> None:
    options = ("--num-processes", "1", "--engine", "ray", "--ray-address", cluster.address, "--device", "cuda")
    with runs.start(write_prompts(tmp_path, 2), tmp_path / "out", *options) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("waiting for the Ray cluster to place a worker that needs 1 GPU and 1 CPU" in line for line in lines)
        process.terminate()
        assert process.wait(60) == 75


@pytest.mark.soak
def test_64_actors_are_as_fast_as_local_workers() -> None:
    """The command checks that every row has one result, also in a run in which 100 actors are killed."""
    done = subprocess.run([sys.executable, "-m", "tests.ray_soak"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    rates = {name: figures[name]["steady_rows_per_second"] for name in ("local", "ray")}
    assert rates["ray"] >= 0.9 * rates["local"], figures
    assert figures["killed"]["deaths"] >= figures["kills"] == 100
