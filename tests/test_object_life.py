"""Test runs into an object store from start to end: refused, stopped, killed, and through a restart of the server."""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deaths import eventually, write_prompts
from tests.paced import MODULE
from tests.places import LocalPlace, ObjectPlace, Place, assert_same, object_place
from tests.runs import command, run, start, wait_for

pytestmark = pytest.mark.promises
LEASE_SECONDS = 60
"""How long a lease lives after its holder has died."""
OUTAGE_SECONDS = 10
POLL_SECONDS = 0.5
ONE_WORKER = ("--num-processes", "1")
ROWS = 10


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("table"), ROWS)


@pytest.fixture(scope="module")
def reference(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An undisturbed run into a local folder."""
    place = LocalPlace(tmp_path_factory.mktemp("reference") / "out")
    assert run(table, place.out).code == 0
    return place


@pytest.fixture(params=["s3", "azure"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectPlace]:
    with object_place(request.param, "runs/night one", tmp_path / "store") as place:
        yield place


def count_parts(place: Place) -> int:
    """Count the manifest parts, after a pause, because the caller polls."""
    time.sleep(POLL_SECONDS)
    return place.parts()


def can_merge(place: Place) -> bool:
    time.sleep(POLL_SECONDS)
    return command("merge", place.out).code == 0


def test_a_second_run_is_refused_until_the_first_is_stopped(table: Path, place: Place, reference: Place) -> None:
    with start(table, place.out, *ONE_WORKER, program=MODULE, PACE_HOLD="4") as process:
        assert wait_for(process, lambda: count_parts(place) == 4)
        holder = f"{platform.node()}, process {process.pid}"
        for refused in (run(table, place.out), command("merge", place.out)):
            assert refused.code == 75
            assert holder in refused.stderr
        assert f"running by {holder}" in command("status", place.out).stdout
        process.terminate()
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 75, stderr
    assert "stopped" in command("status", place.out).stdout.splitlines()[0]
    assert len(place.results()) == 4, "a stopped run writes the results that it has"
    done = run(table, place.out)  # the lease was released at once
    assert done.code == 0, done.stderr
    assert_same(place, reference)


def test_a_killed_run_is_taken_over_and_survives_a_restart_of_the_server(
    table: Path, place: ObjectPlace, reference: Place
) -> None:
    with start(table, place.out, *ONE_WORKER, program=MODULE, session=True, PACE_HOLD="4") as process:
        assert wait_for(process, lambda: count_parts(place) == 4)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    killed_at = time.monotonic()
    refused = command("merge", place.out)
    if time.monotonic() < killed_at + LEASE_SECONDS / 2:
        assert refused.code == 75
        assert f"{platform.node()}, process {process.pid}" in refused.stderr
    assert eventually(lambda: can_merge(place))
    assert len(place.results()) == 4
    with start(table, place.out, *ONE_WORKER, program=MODULE, PACE_SECONDS="0.5") as process:
        assert wait_for(process, lambda: count_parts(place) > 4)
        place.server.stop()
        time.sleep(OUTAGE_SECONDS)
        place.server.start()
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert_same(place, reference)
