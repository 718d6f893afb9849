"""Test that each command does the same in an object store as in a local folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_infer.records import BOOKKEEPING
from tests.places import LocalPlace, Place, assert_same, object_place
from tests.runs import CommandResult, command, run
from tests.tables import write_csv

pytestmark = pytest.mark.promises
PROMPTS = ("a red cross", "a blue square", "a green cross", "a yellow circle")


@pytest.fixture(params=["s3", "azure"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Place, Place]]:
    """An object store and a local folder."""
    with object_place(request.param, "", tmp_path / "store") as place:
        yield place, LocalPlace(tmp_path / "out")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "t.csv", *PROMPTS)


def write_table(path: Path, *prompts: str) -> Path:
    return write_csv(path, [["id", "prompt", "note"], *([f"r{k}", text, "é"] for k, text in enumerate(prompts))])


def run_both(table: Path, places: tuple[Place, Place], *options: str) -> None:
    """Run in both places, and check that they are the same."""
    same(places, [run(table, place.out, *options) for place in places])


def command_both(places: tuple[Place, Place], name: str, *options: str) -> None:
    """Run a command in both places, and check that they are the same."""
    same(places, [command(name, place.out, *options) for place in places])


def same(places: tuple[Place, Place], ends: list[CommandResult]) -> None:
    assert [end.code for end in ends] == [0, 0], [end.stderr for end in ends]
    assert_same(*places)


def json_rows(place: Place) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in place.read("results.jsonl").splitlines()]
    return [{name: cell for name, cell in row.items() if name not in BOOKKEEPING} for row in rows]


def test_an_object_store_is_compared_with_a_folder(table: Path, places: tuple[Place, Place]) -> None:
    run_both(table, places)
    done = command("diff", *(place.out for place in places), "--json")
    assert (done.code, json.loads(done.stdout)["equal"]) == (0, len(PROMPTS))
    assert run(table, places[1].out, "--steps", "3", "--rerender-changed").code == 0
    done = command("diff", *(place.out for place in places), "--json")
    report = json.loads(done.stdout)
    assert (done.code, report["pixels"], report["settings"]["run"]) == (3, len(PROMPTS), {"--steps": [2, 3]})
    assert report["largest"] > 0


def test_commands_do_the_same_as_in_a_local_folder(table: Path, places: tuple[Place, Place]) -> None:
    run_both(table, places, "--steps", "8", "--results", "csv", "--results", "jsonl", "--base64")
    assert json_rows(places[0]) == json_rows(places[1])
    assert len(places[0].read("results.csv").splitlines()) == 1 + len(PROMPTS)
    first, second = (command("status", place.out).stdout.splitlines()[1] for place in places)
    assert first == second == "4 rows · 2 ok · 2 flagged"
    # A deleted image is rendered again.
    image = min(places[0].images())
    for place in places:
        place.remove(image)
    command_both(places, "retry", "--status", "missing")
    # Flagged images move to quarantine/, and are blanked there.
    command_both(places, "rescore", "--safety", "checker", "--on-flagged", "quarantine")
    assert places[0].names("quarantine")
    command_both(places, "rescore", "--safety", "checker", "--on-flagged", "blank")
    command_both(places, "merge", "--results", "csv")


@pytest.mark.parametrize("sink", ["webdataset", "parquet"])
def test_shards_are_the_same_as_in_a_local_folder(table: Path, places: tuple[Place, Place], sink: str) -> None:
    """A changed row and a flagged image leave their shard, which is rewritten."""
    options = ("--sink", sink, "--steps", "8", "--safety", "none")
    run_both(table, places, *options)
    (before,) = places[0].names("shards")
    content = places[0].read(before)
    write_table(table, "a blue cross", *PROMPTS[1:])
    run_both(table, places, *options)
    command_both(places, "verify")
    command_both(places, "rescore", "--safety", "checker", "--on-flagged", "quarantine")
    assert places[0].names("quarantine")
    assert places[0].read(before) != content
    for name in places[0].names("shards"):
        assert places[0].read(name) == places[1].read(name)
    command_both(places, "verify")


@pytest.mark.usefixtures("probe_here")
def test_changed_rows_replace_their_images(table: Path, places: tuple[Place, Place]) -> None:
    run_both(table, places)
    before = places[0].images()
    write_table(table, "a blue cross", *PROMPTS[1:3], "a red circle", "a small square")
    plans = [command("plan", table, "--out", place.out, "--steps", "2", "--device", "cpu") for place in places]
    first, second = ([line for line in plan.stdout.splitlines() if "to render" in line] for plan in plans)
    assert first == second
    assert "3 to render" in first[0]
    run_both(table, places)
    changed = {name for name, content in before.items() if places[0].images()[name] != content}
    assert len(changed) == 2
    run_both(table, places, "--overwrite", "--steps", "3")
    assert places[0].parts() < 3, "the parts of earlier runs are removed"


@pytest.mark.parametrize("content", [b"{", b"[1]"])
def test_a_damaged_run_json_is_refused_until_it_is_removed(
    table: Path, places: tuple[Place, Place], content: bytes
) -> None:
    place, reference = places
    run_both(table, places)
    place.write("run.json", content)
    for refused in (run(table, place.out), command("status", place.out), command("merge", place.out)):
        assert refused.code == 2
        assert f"{place.out}/run.json" in refused.stderr
    place.remove("run.json")
    assert run(table, place.out).code == 0
    assert_same(place, reference)
