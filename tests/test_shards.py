"""Test every sink with whole runs: killed, resumed, changed, verified, and read by the libraries it writes for."""

from __future__ import annotations

import gc
import io
import json
import shutil
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from datasets import load_dataset
from PIL import Image

from batch_infer.images import decode, hash_pixels
from batch_infer.manifest import Manifest, run_number
from batch_infer.records import Verdict
from batch_infer.safety.checker import StableDiffusionChecker
from batch_infer.settings import SinkName
from batch_infer.sinks import make_sink, parse_member
from batch_infer.sinks.sharded import OMITTED_COLUMNS, ShardedSink
from tests import runs
from tests.paced import MODULE
from tests.tables import write_csv

SINKS = get_args(SinkName)
SHARDED = [name for name in SINKS if name != "folder"]
SUFFIXES = {"webdataset": ".tar", "parquet": ".parquet"}
ROWS = [["row.1", "a red circle", "x"], ["Row.1", "a blue square", "y"], ["flagged", "a green cross", "z"],
        ["row-4", "a yellow ring", ""], ["名前", "two, or \"three\" discs", "ü"]]  # fmt: skip
FLAGGED = {"flagged"}
"""Ids of the rows that the built-in model's checker flags."""
OPTIONS = ("--steps", "4", "--on-flagged", "blank")

every_sink = pytest.mark.parametrize("sink", SINKS)
every_sharded_sink = pytest.mark.parametrize("sink", SHARDED)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table") / "t.csv", [["id", "prompt", "tag"], *ROWS])


def render(table: Path, out: Path, sink: str, *options: str, code: int = 0) -> dict[str, Any]:
    done = runs.run(table, out, *OPTIONS, "--sink", sink, "--json", *options)
    assert done.code == code, done.stderr
    return dict(json.loads(done.stdout)) if done.stdout else {"error": done.stderr}


@pytest.fixture(scope="module")
def finished(table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a finished OUT of each sink. Tests must copy them."""
    outs = {sink: tmp_path_factory.mktemp(sink) / "out" for sink in SINKS}
    for sink, out in outs.items():
        assert render(table, out, sink)["rendered"] == len(ROWS)
    return outs


@pytest.fixture
def out(finished: dict[str, Path], sink: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[sink], tmp_path / "out"))


def shards(out: Path) -> list[Path]:
    return sorted((out / "shards").glob("*")) if (out / "shards").exists() else []


def members(out: Path) -> set[str]:
    return {path for path, _ in make_sink(out).list_images() if parse_member(path)}


def pixels(out: Path) -> dict[runs.Key, str]:
    """Return the hash of the pixels of each image, after checking that it is what its result says."""
    sink, hashes = make_sink(out), {}
    for row in runs.results(out):
        if row["generated_image"] is not None:
            content = sink.read(row["generated_image"], row["image_bytes"])
            assert content is not None, row["generated_image"]
            hashes[row["id"], row["image_index"]] = hash_pixels(decode(content))
            assert hashes[row["id"], row["image_index"]] == row["pixels_sha256"]
    return hashes


def assert_consistent(out: Path) -> None:
    """Check that OUT has exactly the images of its results, and that `verify` agrees."""
    paths = {row["generated_image"] for row in runs.results(out)} - {None}
    assert {path for path, _ in make_sink(out).list_images()} == paths
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    done = runs.command("verify", out, "--json")
    assert done.code == 0, done.stdout


# Runs


@every_sink
def test_images_are_where_the_sink_says_and_equal_those_of_other_sinks(
    out: Path, sink: str, finished: dict[str, Path]
) -> None:
    rows = {row["id"]: row for row in runs.results(out)}
    for row in rows.values():
        member = parse_member(row["generated_image"])
        assert (member is not None) == (sink != "folder" and row["id"] not in FLAGGED)
        if member is not None:
            assert member.suffix == SUFFIXES[sink]
            assert "." not in member.image.removesuffix(".png"), "a key ends at its first dot"
    assert {row["id"] for row in rows.values() if row["status"] == "flagged"} == FLAGGED
    assert pixels(out) == pixels(finished["folder"])
    assert {row["sha256"] for row in rows.values()} == {row["sha256"] for row in runs.results(finished["folder"])}
    assert_consistent(out)


@every_sink
def test_a_second_run_renders_nothing(out: Path, table: Path, sink: str) -> None:
    before = pixels(out)
    assert render(table, out, sink)["rendered"] == 0
    assert pixels(out) == before
    assert_consistent(out)


@every_sink
def test_shards_are_reproducible(out: Path, table: Path, sink: str, tmp_path: Path) -> None:
    render(table, tmp_path / "again", sink)
    files = {path.relative_to(tmp_path / "again"): path.read_bytes() for path in shards(tmp_path / "again")}
    assert files == {path.relative_to(out): path.read_bytes() for path in shards(out)}


@pytest.mark.promises
@every_sink
def test_a_killed_run_is_resumed_and_can_be_verified(
    table: Path, tmp_path: Path, sink: str, finished: dict[str, Path]
) -> None:
    out = tmp_path / "out"
    options = (*OPTIONS, "--sink", sink)
    with runs.start(table, out, *options, program=MODULE, PACE_ROWS="2", PACE_HOLD="3") as process:
        assert runs.wait_for(process, lambda: bool(Manifest(out).parts()))
        process.kill()
        process.wait()
    committed = sum(pq.read_metadata(part).num_rows for part in (out / "manifest").glob("part-*"))
    assert 0 < committed < len(ROWS)
    assert render(table, out, sink)["rendered"] == len(ROWS) - committed
    assert pixels(out) == pixels(finished[sink])
    assert_consistent(out)


class Killed(BaseException):
    """Simulates a kill, since no code handles it."""


@every_sharded_sink
@pytest.mark.parametrize(("owner", "method"), [(ShardedSink, "publish"), (Manifest, "commit")])
def test_a_kill_while_a_shard_is_committed_leaves_no_image_without_a_result(
    table: Path, tmp_path: Path, sink: str, owner: Any, method: str, finished: dict[str, Path]
) -> None:
    """The shard is written, but its part is not. The next run renders the rows again and removes the first shard."""
    out, real = tmp_path / "out", getattr(owner, method)

    def die(self: Any, *arguments: Any) -> None:
        if owner is ShardedSink:
            real(self, *arguments)
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, method, die)
        render(table, out, sink)
    assert len(shards(out)) == 1
    shards(out)[0].rename(shards(out)[0].with_name(f"00ff-4{SUFFIXES[sink]}"))  # as if the run had divided it otherwise
    assert render(table, out, sink)["rendered"] == len(ROWS)
    assert len(shards(out)) == 1
    assert pixels(out) == pixels(finished[sink])
    assert_consistent(out)


@every_sharded_sink
def test_shards_are_bounded(table: Path, tmp_path: Path, sink: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_infer.sinks.sharded.SHARD_BYTES", 1)
    render(table, tmp_path / "out", sink)
    assert len(shards(tmp_path / "out")) == len(ROWS) - len(FLAGGED)
    assert_consistent(tmp_path / "out")


@every_sharded_sink
def test_another_sink_is_refused(out: Path, table: Path, sink: str) -> None:
    before = pixels(out)
    assert (
        f"was made with --sink {sink}, and this run has --sink folder" in render(table, out, "folder", code=2)["error"]
    )
    assert pixels(out) == before
    assert render(table, out, "folder", "--overwrite")["rendered"] == len(ROWS)
    assert not shards(out)


@every_sharded_sink
def test_images_rendered_again_replace_those_in_shards(out: Path, table: Path, sink: str, tmp_path: Path) -> None:
    before = members(out)
    assert render(table, out, sink, "--steps", "3", "--rerender-changed")["rendered"] == len(ROWS)
    assert members(out).isdisjoint(before)
    render(table, tmp_path / "once", sink, "--steps", "3")
    assert pixels(out) == pixels(tmp_path / "once")
    assert_consistent(out)


@every_sharded_sink
def test_one_changed_row_leaves_the_other_images_in_their_shard(out: Path, sink: str, tmp_path: Path) -> None:
    """The shard is rewritten without the image that was replaced, and contains the rest with their metadata."""
    rows = [[name, "a grey triangle" if name == "row-4" else prompt, tag] for name, prompt, tag in ROWS]
    before = {row["id"]: row["generated_image"] for row in runs.results(out)}
    changed = write_csv(tmp_path / "t.csv", [["id", "prompt", "tag"], *rows])
    assert render(changed, out, sink)["rendered"] == 1
    after = {row["id"]: row["generated_image"] for row in runs.results(out)}
    assert {name for name in before if before[name] != after[name]} == {"row-4"}
    assert members(out) == {path for path in after.values() if parse_member(path)}
    assert_consistent(out)
    samples = dict(read_samples(out, sink))
    assert samples["row-4"][1]["prompt"] == "a grey triangle"
    assert len(samples) == len(ROWS) - len(FLAGGED)


@every_sharded_sink
def test_rescoring_moves_images_out_of_shards_and_back(out: Path, table: Path, sink: str, tmp_path: Path) -> None:
    """Without a checker nothing is flagged. The checker then flags an image, which leaves its shard, and so on."""
    unchecked = tmp_path / "unchecked"
    render(table, unchecked, sink, "--safety", "none")
    assert len(members(unchecked)) == len(ROWS)
    done = runs.command("rescore", unchecked, "--safety", "checker", "--on-flagged", "quarantine")
    assert done.code == 0, done.stderr
    rows = {row["id"]: row for row in runs.results(unchecked)}
    assert {row["id"] for row in rows.values() if row["status"] == "flagged"} == FLAGGED
    assert all(rows[name]["generated_image"].startswith("quarantine/") for name in FLAGGED)
    assert len(members(unchecked)) == len(ROWS) - len(FLAGGED), "the original is no longer in a shard"
    assert_consistent(unchecked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusionChecker, "check", lambda self, images: [Verdict(False, self.name)] * len(images))
        assert runs.command("rescore", unchecked, "--safety", "checker", "--on-flagged", "keep").code == 0
    assert {row["status"] for row in runs.results(unchecked)} == {"ok"}
    assert len(members(unchecked)) == len(ROWS)
    assert_consistent(unchecked)


# Damage


@every_sharded_sink
def test_damage_in_a_shard_is_found_and_repaired(out: Path, table: Path, sink: str) -> None:
    (shard,) = shards(out)
    before = pixels(out)
    victim = next(row for row in runs.results(out) if row["id"] == "row-4")
    content = bytearray(shard.read_bytes())
    image = make_sink(out).read(victim["generated_image"])
    assert image is not None
    content[content.index(image) + len(image) // 2] ^= 1
    shard.write_bytes(content)
    done = runs.command("verify", out, "--json")
    problems = json.loads(done.stdout)["problems"]
    assert done.code == 3
    assert "row-4" in {problem["id"] for problem in problems}
    assert {problem["kind"] for problem in problems} <= {"wrong_image", "missing_image"}
    assert runs.command("verify", out, "--fix").code == 3
    assert render(table, out, sink)["rendered"] == len(problems)
    assert pixels(out) == before
    assert_consistent(out)


@every_sharded_sink
@pytest.mark.parametrize("damage", ["removed", "truncated", "replaced by a link"])
def test_a_shard_that_cannot_be_read_is_rendered_again(out: Path, table: Path, sink: str, damage: str) -> None:
    (shard,) = shards(out)
    before, content = pixels(out), shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(content[:300])
    else:
        shard.unlink()
    if damage == "replaced by a link":
        (out.parent / "elsewhere").write_bytes(content)
        shard.symlink_to(out.parent / "elsewhere")
    problems = json.loads(runs.command("verify", out, "--json").stdout)["problems"]
    assert {problem["kind"] for problem in problems} == {"missing_image"}
    assert len(problems) == len(ROWS) - len(FLAGGED)
    done = runs.command("retry", out, "--status", "missing", "--json")
    assert json.loads(done.stdout)["rendered"] == len(problems), done.stderr
    assert pixels(out) == before
    assert_consistent(out)


@every_sharded_sink
def test_an_image_that_is_replaced_leaves_a_damaged_shard_as_it_is(
    out: Path, table: Path, sink: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The intact images of the shard must not be lost with the damaged one."""
    monkeypatch.setattr("batch_infer.sinks.parquet.ROW_GROUP_BYTES", 1)
    out = tmp_path / "small groups"
    render(table, out, sink)
    (shard,) = shards(out)
    images = {row["id"]: row["generated_image"] for row in runs.results(out) if row["id"] not in FLAGGED}
    contents = {name: make_sink(out).read(path) for name, path in images.items()}
    content = shard.read_bytes()
    *_, last = sorted(contents, key=lambda name: content.index(contents[name] or b""))
    place = content.index(contents[last] or b"") + 20
    # A page checksum of Parquet differs. The tar file ends in its last image.
    damaged = (
        content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] if sink == "parquet" else content[:place]
    )
    shard.write_bytes(damaged)
    replaced = next(name for name in contents if name != last)
    rows = [[name, "a grey triangle" if name == replaced else prompt, tag] for name, prompt, tag in ROWS]
    changed = write_csv(tmp_path / "t.csv", [["id", "prompt", "tag"], *rows])
    render(changed, out, sink)
    readable = {name for name, path in images.items() if make_sink(out).read(path) == contents[name]}
    assert len(readable) >= len(images) - 1
    assert shard.read_bytes() == damaged


@every_sharded_sink
def test_a_linked_folder_of_shards_is_not_part_of_out(out: Path, table: Path, sink: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (out / "shards").rename(elsewhere)
    (elsewhere / f"ffff-1{SUFFIXES[sink]}").write_bytes(b"precious")
    (out / "shards").symlink_to(elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    assert {problem["kind"] for problem in json.loads(runs.command("verify", out, "--json").stdout)["problems"]} == {
        "missing_image"
    }
    assert "is a link" in render(table, out, sink, code=2)["error"]
    runs.command("rescore", out, "--safety", "checker", "--on-flagged", "keep")
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before


@every_sharded_sink
def test_other_files_among_the_shards_are_orphans(out: Path, sink: str) -> None:
    (shard,) = shards(out)
    shutil.copy(shard, shard.with_name(f"copy{SUFFIXES[sink]}"))
    (problem,) = json.loads(runs.command("verify", out, "--json").stdout)["problems"]
    assert (problem["kind"], problem["path"]) == ("orphan_image", f"shards/copy{SUFFIXES[sink]}")


def test_a_change_of_options_for_image_files_is_not_silent(
    finished: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished["folder"], tmp_path / "out"))
    done = runs.run(table, out, *OPTIONS, "--no-prompt-metadata", "--image-format", "webp")
    assert (done.code, len(runs.images(out))) == (0, len(ROWS))
    assert "--image-format and --prompt-metadata of this run and the last one" in done.stderr


@every_sharded_sink
def test_a_late_listing_of_the_manifest_removes_no_shard(out: Path, sink: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may show a retry's shard, but not yet its part, and the old results suffice for merging."""
    shards(out)[0].unlink()
    listed = Manifest.parts

    def list_old(manifest: Manifest, since_run: int = 0) -> Any:
        return [part for part in listed(manifest, since_run) if run_number(part) < 2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "parts", list_old)
        runs.command("retry", out, "--status", "missing")
    assert runs.command("merge", out).code == 0
    assert_consistent(out)


@every_sharded_sink
def test_shards_in_a_folder_of_tables_are_not_read(table: Path, tmp_path: Path, sink: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(table, folder)
    for rendered in (len(ROWS), 0):
        assert render(folder, folder / "out", sink)["rendered"] == rendered
    assert render(folder, tmp_path / "other", sink)["rendered"] == len(ROWS)


def test_ids_that_differ_by_case_have_different_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_infer.store.local_images.is_case_sensitive", lambda folder: False)
    table = write_csv(tmp_path / "t.csv", [["id", "prompt"], ["a", "a red circle"], ["A", "a blue square"]])
    render(table, tmp_path / "out", "webdataset", "--safety", "none")
    names = {path.partition("#")[2].lower() for path in members(tmp_path / "out")}
    assert len(names) == 2
    assert_consistent(tmp_path / "out")


def test_a_carried_column_named_image_does_not_hide_the_image(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["id", "prompt", "image", "input_image"], ["a", "a red circle", "x", "y"]])
    render(table, tmp_path / "out", "parquet", "--safety", "none")
    ((_, (image, row)),) = read_samples(tmp_path / "out", "parquet")
    assert (image.size, row["input_input_image"], row["input_image"]) == ((64, 64), "x", "y")


@every_sharded_sink
@pytest.mark.parametrize("path", ["../{name}#row-4-0.png", "shards/../shards/{name}#row-4-0.png", "shards/{name}",
                                  "shards/{name}#../row-4-0.png", "shards/x{name}#row-4-0.png"])  # fmt: skip
def test_edited_paths_lead_nowhere(out: Path, sink: str, path: str) -> None:
    (shard,) = shards(out)
    reader = make_sink(out)
    edited = path.format(name=shard.name)
    assert (reader.has(edited), reader.read(edited)) == (False, None)
    reader.remove(edited)
    assert shard.exists()


# Libraries


def read_samples(out: Path, sink: str) -> Iterator[tuple[str, tuple[Image.Image, dict[str, Any]]]]:
    """Yield the id, image and metadata of each image in the shards, as a library reads them."""
    if sink == "webdataset":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the files open
            dataset = webdataset.WebDataset([str(path) for path in shards(out)], shardshuffle=False).decode("pil")
            for sample in dataset:
                yield sample["json"]["id"], (sample["png"], sample["json"])
            del dataset
            gc.collect()
    else:
        files = [str(path) for path in shards(out)]
        dataset = load_dataset("parquet", data_files=files, split="train", cache_dir=str(out.parent / "cache"))
        for row in dataset:
            yield row["id"], (row["image"], {name: value for name, value in row.items() if name != "image"})


@every_sharded_sink
def test_the_library_of_the_format_reads_the_same_pixels_and_metadata(out: Path, sink: str) -> None:
    expected = {row["id"]: row for row in runs.results(out) if row["status"] == "ok"}
    samples = dict(read_samples(out, sink))
    assert samples.keys() == expected.keys()
    for name, (image, metadata) in samples.items():
        assert hash_pixels(np.asarray(image.convert("RGB"))) == expected[name]["pixels_sha256"]
        assert metadata == {key: value for key, value in expected[name].items() if key not in OMITTED_COLUMNS}


def test_datasets_reads_webdataset_shards(finished: dict[str, Path], tmp_path: Path) -> None:
    pattern = str(finished["webdataset"] / "shards" / "*.tar")
    dataset = load_dataset("webdataset", data_files=pattern, split="train", cache_dir=str(tmp_path))
    hashes = {row["json"]["id"]: hash_pixels(np.asarray(row["png"].convert("RGB"))) for row in dataset}
    assert hashes == {name: value for (name, _), value in pixels(finished["webdataset"]).items() if name not in FLAGGED}


def test_any_program_reads_tar_shards(finished: dict[str, Path]) -> None:
    (shard,) = shards(finished["webdataset"])
    with tarfile.open(shard) as tar:
        names = tar.getnames()
        assert [Path(name).suffix for name in names] == [".png", ".json"] * (len(ROWS) - len(FLAGGED))
        assert [Path(name).stem for name in names[::2]] == [Path(name).stem for name in names[1::2]]
        stream = tar.extractfile(names[0])
        assert stream is not None
        assert Image.open(io.BytesIO(stream.read())).size == (64, 64)
