"""`batch-infer verify` finds each fault of OUT, and nothing else."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_infer.jobs.verify import (
    ImageRecords,
    VerifyOptions,
    find_damaged_images,
    image_check,
    problems,
    results_check,
    row_check,
    verification,
    verify_run,
)
from batch_infer.manifest import Manifest
from batch_infer.store import FileDigest, LocalStore, listing
from tests.places import ObjectPlace, object_place
from tests.runs import assert_whole, command, hashes, results, run, run_json
from tests.tables import write_csv, write_parquet

NAMES = ["a", "b", "c", "d", "e"]
Fault = tuple[str, str | None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, and an OUT that two runs have finished, each with a part. Tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    table = write_parquet(
        folder / "t.parquet",
        id=NAMES,
        prompt=[f"a red circle {name}" for name in NAMES],
        weight=pa.array([1.0, np.nan, None, 2.0, 3.0]),
        nested=pa.array([[1.0, np.nan], [], None, [2.0], [3.0]]),
        time=pa.array([1, 2, None, 3, 4], pa.timestamp("s")),
    )
    for limit in ("3", "5"):
        done = run(table, folder / "out", "--limit", limit, "--safety", "none", "--results", "csv")
        assert done.code == 0, done.stderr
    return folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


def verify(out: Path | str, *options: str | Path, code: int = 3) -> dict[str, Any]:
    done = command("verify", out, "--json", *options)
    assert done.code == code, (done.stdout, done.stderr)
    return dict(json.loads(done.stdout))


def faults(out: Path | str, *options: str | Path) -> list[Fault]:
    """Return the kind of each problem with its id, or its path if it has no id."""
    return sorted((p["kind"], p["id"] or p["path"]) for p in verify(out, *options)["problems"])


def image_of(out: Path, name: str) -> Path:
    path: str = next(row["generated_image"] for row in results(out) if row["id"] == name)
    return out / path


def part_of(out: Path, name: str) -> Path:
    parts = (out / "manifest").glob("part-*")
    return next(part for part in parts if name in pq.read_table(part)["id"].to_pylist())


def edit(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite a Parquet file as another program would, with its metadata kept."""
    table = pq.ParquetFile(path).read()
    pq.write_table(change(table), path)


def set_cell(table: pa.Table, column: str, name: str, value: Any) -> pa.Table:
    values = table[column].to_pylist()
    values[table["id"].to_pylist().index(name)] = value
    position = table.schema.get_field_index(column)
    return table.set_column(position, table.schema.field(column), pa.array(values, table.schema.field(column).type))


def snapshot(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def get_root(out: Path) -> str:
    return str(json.loads((out / "run.json").read_text("utf-8"))["root_digest"])


def test_a_finished_run_has_no_problems(out: Path) -> None:
    before = snapshot(out)
    report = verify(out, code=0)
    assert report == {
        **{"rows": 5, "images": 5, "checked": 5, "rendered_again": 0},
        **{"problems": [], "counts": {}, "statuses": {"ok": 5}, "root_digest": get_root(out)},
    }
    assert verify(out, "--quick", code=0)["checked"] == 0
    assert snapshot(out) == before
    done = command("verify", out)
    assert (done.code, done.stdout) == (
        0,
        f"5 rows · 5 ok · 5 images · 5 read · no problems\nroot digest {get_root(out)}\n",
    )
    assert command("verify", out, "-q").stdout == ""


def test_a_missing_image(out: Path) -> None:
    image_of(out, "b").unlink()
    assert faults(out) == faults(out, "--quick") == [("missing_image", "b")]


def test_a_link_in_place_of_an_image(out: Path, tmp_path: Path) -> None:
    image = image_of(out, "b")
    image.rename(tmp_path / "elsewhere.png")
    image.symlink_to(tmp_path / "elsewhere.png")
    assert faults(out) == [("missing_image", "b")]


def test_a_linked_folder_of_images(out: Path, tmp_path: Path) -> None:
    folder = image_of(out, "b").parent
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    expected = [("missing_image", name) for name in NAMES]
    assert faults(out) == [*expected, ("orphan_image", folder.relative_to(out).as_posix())]


def test_a_truncated_image(out: Path) -> None:
    image = image_of(out, "c")
    image.write_bytes(image.read_bytes()[:-1])
    assert faults(out) == faults(out, "--quick") == [("truncated_image", "c")]


def test_a_longer_image(out: Path) -> None:
    with image_of(out, "c").open("ab") as stream:
        stream.write(b"x")
    assert faults(out) == faults(out, "--quick") == [("wrong_image", "c")]


def test_a_flipped_byte(out: Path) -> None:
    image = image_of(out, "c")
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 1
    image.write_bytes(content)
    assert faults(out) == [("wrong_image", "c")]
    assert verify(out, "--quick", code=0)["counts"] == {}


def test_swapped_images(out: Path) -> None:
    first, second = image_of(out, "a"), image_of(out, "d")
    first.rename(out / "x")
    second.rename(first)
    (out / "x").rename(second)
    kinds = {name: kind for kind, name in faults(out)}
    assert kinds.keys() == {"a", "d"}
    assert set(kinds.values()) <= {"wrong_image", "truncated_image"}


def test_tables_that_were_moved(finished: Path, out: Path, tmp_path: Path) -> None:
    """Only their paths may differ from those in results.parquet."""
    moved = shutil.copy(finished / "t.parquet", tmp_path / "moved.parquet")
    assert verify(out, moved, code=0)["counts"] == {}
    edit(out / "results.parquet", lambda table: set_cell(table, "seed", "b", 12345))
    assert faults(out, moved) == [("results_differ", "b")]


def test_a_file_that_no_result_names(out: Path) -> None:
    folder = image_of(out, "a").parent
    (folder / "zz.png").write_bytes(b"x")
    (out / "quarantine" / "x").mkdir(parents=True)
    (out / "quarantine" / "x" / "y.png").write_bytes(b"x")
    (out / "images" / ".tmp-0123abcd-1-0123456789ab-a.png").write_bytes(b"x")
    found = faults(out)
    assert [kind for kind, _ in found] == ["orphan_image"] * 3
    assert {Path(str(path)).name for _, path in found} == {"zz.png", "y.png", ".tmp-0123abcd-1-0123456789ab-a.png"}


def test_a_row_removed_from_results(out: Path) -> None:
    edit(out / "results.parquet", lambda table: pa.concat_tables([table.slice(0, 1), table.slice(2)]))
    assert faults(out) == [("missing_row", "b")]


def test_a_row_doubled_in_results(out: Path) -> None:
    edit(out / "results.parquet", lambda table: pa.concat_tables([table.slice(0, 2), table.slice(1)]))
    assert faults(out) == [("duplicate_row", "b")]


def test_results_in_another_order(out: Path) -> None:
    edit(out / "results.parquet", lambda table: table.take([1, 0, 2, 3, 4]))
    assert faults(out) == [("results_differ", "results.parquet")]


def test_a_cell_edited_in_results(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(out / "results.parquet", lambda table: set_cell(table, "prompt", "d", "a blue square"))
    (problem,) = verify(out)["problems"]
    assert (problem["kind"], problem["id"], problem["path"]) == ("results_differ", "d", "results.parquet")
    assert problem["detail"] == "prompt is 'a blue square' instead of 'a red circle d'"
    monkeypatch.setattr(results_check, "MAX_GROUP_ROWS", 2)
    monkeypatch.setattr(results_check, "BATCH", 2)
    assert faults(out) == [("results_differ", "d")]


def test_results_rewritten_with_the_same_rows(out: Path) -> None:
    edit(out / "results.parquet", lambda table: table)
    assert faults(out) == [("results_differ", "results.parquet")]


def test_unreadable_missing_and_additional_results(out: Path) -> None:
    edit(out / "results.parquet", lambda table: set_cell(table, "id", "e", "z"))
    assert faults(out) == [("missing_row", "e"), ("results_differ", "z")]
    edit(out / "results.parquet", lambda table: table.drop_columns(["prompt"]))
    assert faults(out) == [("results_differ", "results.parquet")]
    (out / "results.parquet").write_bytes(b"PAR1")
    assert faults(out) == [("results_differ", "results.parquet")]
    (out / "results.parquet").unlink()
    assert faults(out) == [("results_differ", "results.parquet")]


def test_a_changed_csv_file(out: Path) -> None:
    with (out / "results.csv").open("a") as stream:
        stream.write("x")
    assert faults(out) == [("results_differ", "results.csv")]


def test_a_removed_part(out: Path) -> None:
    part = part_of(out, "d")
    part.unlink()
    name = part.relative_to(out).as_posix()
    assert faults(out) == [("damaged_part", name), ("missing_row", "d"), ("missing_row", "e")]


def test_a_damaged_part(out: Path) -> None:
    part = part_of(out, "d")
    part.write_bytes(part.read_bytes()[:-100])
    name = part.relative_to(out).as_posix()
    assert faults(out) == [("damaged_part", name), ("missing_row", "d"), ("missing_row", "e")]
    done = command("verify", out)
    (remedy,) = (line for line in done.stdout.splitlines() if line.startswith(("Run", "See", "Orphan")))
    assert remedy.startswith("See docs/verify.md about damaged_part first")


def test_a_part_of_a_newer_version(out: Path) -> None:
    part = part_of(out, "d")

    def mark(table: pa.Table) -> pa.Table:
        metadata = {**table.schema.metadata, b"batch-infer-columns": b"99 0"}
        return table.replace_schema_metadata(metadata)

    edit(part, mark)
    report = verify(out)
    assert report["counts"]["damaged_part"] == 1


def test_a_cell_edited_in_a_part(out: Path) -> None:
    part = part_of(out, "d")
    edit(part, lambda table: set_cell(table, "prompt", "d", "a blue square"))
    assert faults(out) == [("damaged_part", part.relative_to(out).as_posix())], "results.parquet is intact"


@pytest.mark.parametrize("is_removed", [False, True])
def test_merge_does_not_replace_the_only_copy_of_a_changed_part(out: Path, is_removed: bool) -> None:
    part, before = part_of(out, "d"), (out / "results.parquet").read_bytes()
    if is_removed:
        part.unlink()
    else:
        edit(part, lambda table: set_cell(table, "prompt", "d", "a blue square"))
    problems = faults(out)
    done = command("merge", out)
    assert done.code == 2
    assert f"(manifest/{part.name} {'is missing' if is_removed else 'has changed'})" in done.stderr
    image_of(out, "a").unlink()
    fixed = command("verify", out, "--fix")
    assert (fixed.code, fixed.stderr) == (2, done.stderr)
    problems = sorted([*problems, ("missing_image", "a")])
    assert ((out / "results.parquet").read_bytes(), faults(out)) == (before, problems)
    (out / "manifest" / "SHA256SUMS").unlink()
    assert command("merge", out).code == 0
    assert verify(out)["counts"] == {"missing_image": 1, **({"missing_row": 2} if is_removed else {})}


@pytest.mark.parametrize(
    ("damage", "remedy"),
    [
        (lambda out: image_of(out, "c").unlink(), "retry {} --status missing"),
        (lambda out: image_of(out, "c").write_bytes(b"no image"), "retry {} --status damaged"),
        (lambda out: (out / "images" / "x.png").write_bytes(b"x"), "Orphan images belong to no result"),
        (lambda out: edit(out / "results.parquet", lambda table: table.slice(1)), "merge {}"),
        (lambda out: (out / "results.parquet").unlink(), "merge {}"),
    ],
)
def test_each_problem_names_its_remedy(out: Path, damage: Callable[[Path], object], remedy: str) -> None:
    spaced = out.rename(out.with_name("my out"))
    damage(spaced)
    lines = command("verify", spaced).stdout.splitlines()
    assert remedy.format(shlex.quote(str(spaced))) in lines[-1]
    assert f"merge {spaced}" not in "".join(lines)


def test_seed_without_sample_is_refused(out: Path) -> None:
    done = command("verify", out, "--seed", "1")
    assert (done.code, "--seed has no effect without --sample" in done.stderr) == (2, True)


def test_a_row_doubled_in_a_part(out: Path) -> None:
    part = part_of(out, "d")
    edit(part, lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    assert faults(out) == [("damaged_part", part.relative_to(out).as_posix()), ("duplicate_row", "d")]


def test_a_stopped_run_lacks_rows(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(finished / "t.parquet", out, "--safety", "none", "--limit", "3")
    record = run_json(out)
    record["settings"]["table"]["limit"] = None
    (out / "run.json").write_text(json.dumps({**record, "summary": None}))
    assert faults(out) == [("missing_row", "d"), ("missing_row", "e")]


def test_tables_that_cannot_be_read_leave_their_number(out: Path, tmp_path: Path, finished: Path) -> None:
    record = run_json(out)
    record["settings"]["table"]["folder"] = str(tmp_path)
    record["settings"]["table"]["tables"] = ["t.parquet"]
    (out / "run.json").write_text(json.dumps(record))
    done = command("verify", out, "--json")
    assert (done.code, json.loads(done.stdout)["counts"]) == (0, {})
    assert "the tables of this run cannot be read" in done.stderr
    part_of(out, "d").unlink()
    problem = next(p for p in verify(out)["problems"] if p["kind"] == "missing_row" and p["id"] is None)
    assert problem["detail"].startswith("2 of 5 results are not committed")
    assert verify(out, finished / "t.parquet")["counts"]["missing_row"] == 2
    assert command("verify", out, tmp_path / "none.parquet").code == 2


def test_unchanged_tables_and_matching_checksums_need_no_comparison(
    out: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bool] = []
    check = results_check.check_results

    def check_results(*arguments: Any) -> bool:
        compared.append(True)
        return check(*arguments)

    monkeypatch.setattr(f"{row_check.__name__}.check_results", check_results)
    assert verify(out, code=0)["rows"] == 5
    assert not compared
    image_of(out, "a").unlink()
    assert faults(out) == [("missing_image", "a")]
    assert not compared
    shutil.copy(finished / "t.parquet", tmp_path / "t.parquet")
    edit(tmp_path / "t.parquet", lambda table: set_cell(table, "prompt", "b", "a blue circle"))
    assert ("missing_row", "b") in faults(out, tmp_path / "t.parquet")
    assert compared


def test_fix_marks_images_and_retry_renders_them(out: Path) -> None:
    before, damaged = hashes(out), image_of(out, "c")
    image_of(out, "b").unlink()
    damaged.write_bytes(b"short")
    done = command("verify", out, "--fix")
    assert done.code == 3
    assert "2 results marked as failed" in done.stdout
    assert damaged.read_bytes() == b"short"
    failed = {row["id"]: row for row in results(out) if row["status"] == "failed"}
    assert failed.keys() == {"b", "c"}
    assert (failed["b"]["attempt"], failed["b"]["generated_image"], failed["b"]["time"]) == (
        2,
        None,
        results(out)[1]["time"],
    )
    assert faults(out) == [("orphan_image", damaged.relative_to(out).as_posix())]
    assert run_json(out)["summary"]["failed"] == 2
    assert command("retry", out, "--status", "failed").code == 0
    assert hashes(out) == before
    assert verify(out, code=0)["counts"] == {}
    assert_whole(out)


@pytest.mark.usefixtures("probe_here")
def test_a_sample_is_rendered_again(out: Path) -> None:
    before = snapshot(out)
    report = verify(out, "--sample", "3", code=0)
    assert (report["rendered_again"], report["problems"], snapshot(out)) == (3, [], before)
    assert report["sample"] == {
        **{"rendered": 3, "equal_bytes": 3, "equal_pixels": 3},
        **{"largest": None, "psnr_min": None, "environment": {}},
    }
    lines = command("verify", out, "--sample", "9", "--seed", "1", "--quick").stdout.splitlines()
    assert lines == [
        "5 rows · 5 ok · 5 images · 0 read · no problems",
        f"root digest {get_root(out)}",
        "5 images rendered again: 5 with equal bytes",
    ]


@pytest.mark.usefixtures("probe_here")
def test_a_sample_finds_a_wrong_seed(out: Path) -> None:
    """The file and all hashes match, as if another program had written OUT, but the seed does not make this image."""
    part = part_of(out, "b")
    (seed,) = (row["seed"] for row in results(out) if row["id"] == "b")
    edit(part, lambda table: set_cell(table, "seed", "b", seed + 1))
    (out / "manifest" / "SHA256SUMS").unlink()
    record = {name: value for name, value in run_json(out).items() if name != "root_digest"}
    (out / "run.json").write_text(json.dumps(record))
    assert command("merge", out).code == 0
    assert verify(out, code=0)["problems"] == []
    (problem,) = verify(out, "--sample", "5")["problems"]
    assert (problem["kind"], problem["id"], problem["image_index"]) == ("not_reproduced", "b", 0)
    assert "the recorded cells do not match the fingerprint of the result" in problem["detail"]
    assert verify(out, "--sample", "5", "--fix")["counts"] == {"not_reproduced": 1}
    assert [row["status"] for row in results(out)] == ["ok", "failed", "ok", "ok", "ok"]


@pytest.mark.usefixtures("probe_here")
def test_a_sample_of_another_model_is_refused(out: Path) -> None:
    record = run_json(out)
    record["identity"]["model"] = "0" * 32
    (out / "run.json").write_text(json.dumps(record))
    done = command("verify", out, "--sample", "1")
    assert (done.code, done.stdout) == (2, "")
    assert "was made with model" in done.stderr


def test_fix_does_not_mark_all_images(out: Path, tmp_path: Path) -> None:
    """Their disk may not be mounted."""
    (out / "images").rename(tmp_path / "disk")
    before = snapshot(out)
    done = command("verify", out, "--fix")
    assert (done.code, done.stdout) == (75, "")
    assert "none of the 5 images" in done.stderr
    (out / "images").symlink_to(tmp_path / "unmounted")
    done = command("verify", out)
    assert (done.code, "images: No such file" in done.stderr) == (75, True)
    (out / "images").unlink()
    assert snapshot(out) == before


def test_a_run_that_ends_during_the_verification(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = image_check.check_images

    def change(*arguments: Any) -> int:
        record = run_json(out)
        (out / "run.json").write_text(json.dumps({**record, "run_number": record["run_number"] + 1}))
        return check(*arguments)

    monkeypatch.setattr(verification, "check_images", change)
    done = command("verify", out)
    assert (done.code, "changed" in done.stderr) == (75, True)


def test_fix_without_faults_changes_nothing(out: Path) -> None:
    before = snapshot(out)
    assert verify(out, "--fix", code=0)["counts"] == {}
    assert {path: content for path, content in snapshot(out).items() if ".lock" not in path} == {
        path: content for path, content in before.items() if ".lock" not in path
    }


def test_damaged_images_are_retried(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, damaged = hashes(out), image_of(out, "c")
    content = bytearray(damaged.read_bytes())
    content[-20] ^= 1
    damaged.write_bytes(content)
    image_of(out, "b").unlink()
    listed: list[str] = []
    hashed: list[str] = []

    def list_tree(root: str, folder: str, *, needs_sizes: bool) -> Iterator[tuple[str, int | None]]:
        listed.append(folder)
        return listing.list_tree(root, folder, needs_sizes=needs_sizes)

    def hash_files(root: str, files: Sequence[tuple[str, int]]) -> list[FileDigest | None]:
        hashed.extend(name for name, _ in files)
        return listing.hash_files(root, files)

    monkeypatch.setattr("batch_infer.store.local_images.list_tree", list_tree)
    monkeypatch.setattr("batch_infer.store.local_images.hash_files", hash_files)
    done = command("retry", out, "--status", "damaged", "--json")
    assert (done.code, json.loads(done.stdout)["rendered"]) == (0, 1), done.stderr
    assert len(hashed) == len(set(hashed)) == 4
    assert listed == ["images", "quarantine"]
    damaged.write_bytes(b"x")
    done = command("retry", out, "--status", "damaged", "--status", "missing", "--json")
    assert (done.code, json.loads(done.stdout)["rendered"]) == (0, 2), done.stderr
    assert hashes(out) == before
    assert_whole(out)
    assert verify(out, code=0)["counts"] == {}


def test_images_of_a_part_with_a_wrong_path(out: Path) -> None:
    """Paths come from parts, which anyone may have edited."""
    edit(part_of(out, "d"), lambda table: set_cell(table, "generated_image", "d", "../t.parquet"))
    kinds = {(p["kind"], p["id"]) for p in verify(out)["problems"]}
    assert ("missing_image", "d") in kinds


def test_an_ok_result_without_an_image(out: Path) -> None:
    edit(part_of(out, "d"), lambda table: set_cell(table, "generated_image", "d", None))
    assert ("missing_image", "d") in {(p["kind"], p["id"]) for p in verify(out)["problems"]}


def test_listed_problems_are_limited_and_counts_complete(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "MAX_PROBLEMS", 2)
    shutil.rmtree(out / "images")
    report = verify(out)
    assert (len(report["problems"]), report["counts"]) == (2, {"missing_image": 5})
    assert "  and 3 more" in command("verify", out).stdout


def test_an_out_without_a_run(tmp_path: Path) -> None:
    assert command("verify", tmp_path / "none").code == 2
    assert not (tmp_path / "none").exists()
    assert command("verify", tmp_path / "none", "--fix").code == 2
    assert not (tmp_path / "none").exists()


def test_another_command_uses_out(out: Path) -> None:
    with LocalStore(out).locked():
        done = command("verify", out)
    assert done.code == 75
    assert "is using" in done.stderr


def test_a_run_that_starts_during_the_verification(out: Path) -> None:
    lock = LocalStore(out).locked()
    with pytest.raises(Exception, match="is using"):
        verify_run(str(out), VerifyOptions(), lambda *_: lock.__enter__())
    lock.__exit__(None, None, None)


def test_a_time_limit_stops_it(out: Path) -> None:
    done = command("verify", out, "--time-limit", "0.000001")
    assert done.code == 75
    assert "the verification is incomplete" in done.stderr


def test_large_images_are_hashed_on_several_threads(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MIN_THREADED_BYTES", 0)
    image = image_of(out, "c")
    image.write_bytes(image.read_bytes()[:-1] + b"x")
    assert faults(out) == [("wrong_image", "c")]


def test_records_survive_a_second_call(out: Path) -> None:
    image_of(out, "c").unlink()
    with ImageRecords() as records:
        for _ in range(2):
            find_damaged_images(LocalStore(out), records)
            assert records.get_fault(("c", 0)) == "missing_image"
            assert list(records.iterate_faults()) == [("c", 0, "missing_image", "there is no such file")]


def test_the_latest_attempt_counts_and_earlier_ones_are_no_duplicates(out: Path) -> None:
    image_of(out, "c").unlink()
    assert command("retry", out, "--status", "missing").code == 0
    assert len(Manifest(out).parts()) == 3
    assert verify(out, code=0)["images"] == 5


@pytest.mark.skipif(os.name != "posix", reason="file names are text")
def test_a_file_whose_name_is_not_text(out: Path) -> None:
    try:
        (Path(os.fsdecode(os.fsencode(image_of(out, "a").parent) + b"/\xff.png"))).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system only has names that are text")
    report = verify(out)
    assert report["counts"] == {"orphan_image": 1}
    assert command("verify", out).code == 3


@pytest.fixture(params=["s3", "azure"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectPlace]:
    with object_place(request.param, "folder", tmp_path / "store") as place:
        yield place


def test_an_out_in_an_object_store(place: ObjectPlace, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["id", "prompt"], *([name, "a red circle"] for name in NAMES)])
    assert run(table, place.out).code == 0
    assert verify(place.out, code=0)["checked"] == 5
    first, second, third, *_ = sorted(place.images())
    content = place.read(first)
    place.remove(first)
    place.write(second, place.read(second)[:-1] + b"x")
    place.write(third, b"x")
    place.write("images/z/orphan.png", b"x")
    expected = [("missing_image", "a"), ("orphan_image", "images/z/orphan.png"), ("truncated_image", "c"),
                ("wrong_image", "b")]  # fmt: skip
    assert faults(place.out) == expected
    place.remove("images/z/orphan.png")
    assert verify(place.out, "--fix")["counts"] == {"missing_image": 1, "truncated_image": 1, "wrong_image": 1}
    assert command("retry", place.out, "--status", "failed").code == 0
    assert place.read(first) == content
    assert verify(place.out, code=0)["counts"] == {}
    place.write(second, b"x")
    assert json.loads(command("retry", place.out, "--status", "damaged", "--json").stdout)["rendered"] == 1
    assert verify(place.out, code=0)["counts"] == {}
