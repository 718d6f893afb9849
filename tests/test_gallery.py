"""`batch-infer gallery` shows the results of any OUT: every sink, unfinished, edited, damaged, of earlier versions."""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import batch_infer
from batch_infer import jobs
from batch_infer.cli import gallery as cli_gallery
from batch_infer.errors import SettingsError, StoppedError
from batch_infer.jobs import MAX_RESULTS, THUMBNAIL_SIZE
from batch_infer.settings import SinkName
from batch_infer.stopping import StopRequested
from batch_infer.store import open_store
from tests import runs
from tests.gallery_files import parse_script, pictures, read_meta, read_rows
from tests.places import object_place
from tests.runs import CommandResult, command, results, run_json
from tests.storage import fail_at
from tests.tables import write_csv

EARLIER = Path(__file__).parent / "data" / "earlier_version"
SINKS = get_args(SinkName)
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028"
ROWS = [
    ["id", "prompt", "tag"],
    ["a", "a red circle", "x"],
    ["flagged", "a green cross", "y"],
    [HOSTILE, f"a red circle {HOSTILE}", "x"],
    ["empty", "", ""],
    ["b", "a blue square", "y"],
]
"""The built-in model's checker flags the second row, and the one without a prompt is invalid."""
OPTIONS = ("--steps", "4", "--max-failed", "1", "--on-flagged", "keep")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table") / "t.csv", ROWS)


@pytest.fixture(scope="module")
def finished(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns a finished OUT of a sink. Tests must copy it."""

    @cache
    def render(sink: str) -> Path:
        out = tmp_path_factory.mktemp(sink) / "out"
        done = runs.run(table, out, *OPTIONS, "--sink", sink)
        assert done.code == 0, done.stderr
        return out

    return render


@pytest.fixture
def out(finished: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished("folder"), tmp_path / "out"))


def gallery(out: Path | str, *options: str | Path, code: int = 0) -> dict[str, Any]:
    """Make a gallery, and return what --json prints."""
    done = command("gallery", out, "--json", *options)
    assert done.code == code, done.stderr
    return dict(json.loads(done.stdout))


def refuse(out: Path | str, *options: str | Path, code: int = 2) -> str:
    done = command("gallery", out, *options)
    assert (done.code, done.stdout) == (code, ""), done.stderr
    return done.stderr


def path_of(out: Path, name: str) -> Path:
    (path,) = (row["generated_image"] for row in results(out) if row["id"] == name)
    return out / str(path)


def edit_results(out: Path, **columns: list[Any]) -> None:
    """Replace columns of results.parquet."""
    table = pq.read_table(out / "results.parquet")
    for name, values in columns.items():
        position = table.column_names.index(name)
        table = table.set_column(position, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    pq.write_table(table, out / "results.parquet")


@pytest.mark.parametrize("sink", SINKS)
def test_the_gallery_shows_every_result(finished: Callable[[str], Path], sink: str, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished(sink), tmp_path / "out"))
    report = gallery(out)
    folder = out / "gallery"
    assert report == {
        **{"path": str(folder / "index.html"), "results": 5, "left_out": 0, "made": 4, "kept": 0, "unreadable": 0}
    }
    rows = read_rows(folder)
    assert [row["id"] for row in rows] == ["a", "flagged", HOSTILE, "empty", "b"]
    for row, result in zip(rows, results(out), strict=True):
        for name in ("prompt", "status", "error", "seed", "tag", "generated_image", "sha256", "source_row"):
            assert row[name] == result[name]
        assert (row["_problem"], row["_thumb"] is None) == (None, result["generated_image"] is None)
        if row["_thumb"]:
            with Image.open(folder / "thumbs" / row["_thumb"]) as thumb, Image.open(folder / row["_image"]) as image:
                assert thumb.size == image.size == (64, 64)
    meta = read_meta(folder)
    assert meta["counts"] == {"ok": 3, "flagged": 1, "blocked": 0, "invalid": 1, "failed": 0}
    assert meta["run"]["summary"]["rows"] == 5
    assert (meta["title"], meta["out"]) == ("out", str(out))
    assert len(pictures(folder, "previews")) == (0 if sink == "folder" else 3), "only images in shards need a preview"
    done = command("verify", out, "--json")
    assert (done.code, json.loads(done.stdout)["problems"]) == (0, []), "verify does not count the gallery's images"
    assert gallery(out)["kept"] == 4


def test_the_summary_is_a_few_lines(out: Path) -> None:
    path_of(out, "a").unlink()
    done = command("gallery", out, "--max-results", "3")
    assert done.code == 0
    assert done.stdout.splitlines() == [
        f"gallery  {out}/gallery/index.html",
        "3 results · 2 thumbnails made",
        "2 results left out by --max-results or --only-status: give a larger number or other statuses",
        f"1 image missing or damaged: `batch-infer retry {out} --status missing --status damaged` renders them again",
    ]
    assert command("gallery", out, "--max-results", "3", "-q").stdout == ""
    (row, *_) = read_rows(out / "gallery")
    assert (row["_thumb"], row["_image"], row["_problem"]) == (None, None, "its file is missing")


def test_texts_of_the_table_are_inert_in_every_file(out: Path) -> None:
    gallery(out)
    for path in (out / "gallery/data").iterdir():
        parse_script(path.read_bytes())
    assert b"onerror" not in (out / "gallery/index.html").read_bytes()


def test_a_changed_image_gets_a_new_thumbnail_and_the_old_one_is_removed(out: Path, table: Path) -> None:
    gallery(out)
    before = set(pictures(out / "gallery"))
    assert runs.run(table, out, *OPTIONS, "--steps", "5", "--rerender-changed").code == 0
    report = gallery(out)
    assert (report["made"], report["kept"]) == (4, 0)
    assert not before & set(pictures(out / "gallery"))
    assert len(pictures(out / "gallery")) == 4


def test_statuses_and_the_limit_select_results(out: Path) -> None:
    report = gallery(out, "--only-status", "ok", "--only-status", "invalid", "--max-results", "2")
    assert (report["results"], report["left_out"]) == (2, 3)
    assert [row["id"] for row in read_rows(out / "gallery")] == ["a", HOSTILE]
    assert read_meta(out / "gallery")["left_out"] == 3
    assert gallery(out, "--only-status", "failed")["results"] == 0


def test_an_unfinished_run_is_shown_from_its_manifest(out: Path) -> None:
    """Whether results.parquet is missing, damaged or out of date, the page is the same."""
    gallery(out)
    expected = read_rows(out / "gallery")
    record = run_json(out)
    content = (out / "results.parquet").read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for damaged in (b"damaged", content[:4] + bytes(footer - 4) + content[footer:]):
        (out / "results.parquet").write_bytes(damaged)
        gallery(out)
        assert read_rows(out / "gallery") == expected
    (out / "results.parquet").unlink()
    (out / "run.json").write_text(json.dumps({**record, "summary": None}))
    gallery(out)
    assert read_rows(out / "gallery") == expected
    report = gallery(out, "--only-status", "flagged")
    assert (report["results"], report["left_out"]) == (1, 4)


def test_a_gallery_can_be_made_while_a_run_is_active(out: Path) -> None:
    """Only the gallery is locked, so that two commands do not write it at the same time."""
    with open_store(out).locked():
        gallery(out)
    with open_store(out / "gallery").locked():
        message = refuse(out, code=75)
    assert f"{out / 'gallery'} is locked" in message


def test_parts_that_an_active_run_combines_are_read_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from batch_infer.jobs import gallery_results
    from batch_infer.manifest import Manifest

    record = run_json(out)
    (out / "run.json").write_text(json.dumps({**record, "summary": None}))
    copy, tries = gallery_results._copy, list[int]()

    def combine(read: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            assert len(list((out / "manifest").glob("part-*"))) > 1
            Manifest(out).compact(2)
        return copy(read)

    monkeypatch.setattr(gallery_results, "_copy", combine)
    assert gallery(out)["results"] == 5
    assert len(tries) == 2


def test_a_damaged_part_is_left_out_with_a_warning(out: Path) -> None:
    (out / "run.json").write_text(json.dumps({**run_json(out), "summary": None}))
    (out / "manifest/part-00001-x.parquet").write_bytes(b"damaged")
    done = command("gallery", out)
    assert done.code == 0
    assert "the gallery does not show the results in" in done.stderr


def test_an_empty_run_has_an_empty_page(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["id", "prompt"]])
    assert runs.run(table, tmp_path / "out").code == 0
    assert gallery(tmp_path / "out")["results"] == 0
    assert read_rows(tmp_path / "out/gallery") == []


def test_an_out_without_a_run_is_refused(tmp_path: Path) -> None:
    assert "contains no run" in refuse(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(EARLIER.glob("*/run.json"))])
def test_results_of_earlier_versions_are_shown(name: str, tmp_path: Path) -> None:
    out = Path(shutil.copytree(EARLIER / name, tmp_path / "out"))
    (out / "run.json").write_text((out / "run.json").read_text().replace("FOLDER", str(tmp_path)))
    report = gallery(out)
    rows = read_rows(out / "gallery")
    assert report["results"] == len(rows) > 0
    assert report["unreadable"] == 0
    assert report["made"] == sum(row["generated_image"] is not None for row in rows)


# Places


def test_a_gallery_elsewhere_contains_all_that_it_shows(out: Path, tmp_path: Path) -> None:
    report = gallery(out, "--to", tmp_path / "elsewhere")
    assert report["path"] == str(tmp_path / "elsewhere/index.html")
    assert not (out / "gallery").exists()
    shutil.rmtree(out)
    rows = read_rows(tmp_path / "elsewhere")
    for row in rows:
        if row["status"] == "ok":
            with Image.open(tmp_path / "elsewhere" / row["_image"]) as image:
                assert image.size == (64, 64)
        else:
            assert row["_image"] is None
    assert len(pictures(tmp_path / "elsewhere", "previews")) == 3


def test_folders_with_other_files_are_not_written_to(out: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_bytes(b"x")
    assert "contains files, but no gallery" in refuse(out, "--to", tmp_path / "mine")
    assert "contains files, but no gallery" in refuse(out, "--to", out)
    for name in ("images", "gallery", "manifest/x"):
        assert f"is in a folder of {out}" in refuse(out, "--to", out / name)
    shutil.copytree(tmp_path / "mine", out / "gallery")
    assert "contains files, but no gallery" in refuse(out)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo.jpg"]
    shutil.rmtree(out / "gallery")
    (out / "gallery").symlink_to(tmp_path / "mine")
    assert "is a link" in refuse(out)


def test_overwrite_removes_the_gallery_but_no_folder_of_the_user(out: Path, table: Path) -> None:
    gallery(out)
    assert runs.run(table, out, *OPTIONS, "--limit", "1", "--overwrite").code == 0
    assert not (out / "gallery").exists()
    (out / "gallery").mkdir()
    (out / "gallery/photo.jpg").write_bytes(b"x")
    assert runs.run(table, out, *OPTIONS, "--limit", "1", "--overwrite").code == 0
    assert (out / "gallery/photo.jpg").exists()


def test_a_table_in_the_gallery_is_refused(out: Path) -> None:
    gallery(out)
    done = runs.run(write_csv(out / "gallery/t.csv", ROWS), out, *OPTIONS)
    assert (done.code, "is in a folder that a run" in done.stderr) == (2, True)


def test_paths_of_edited_results_do_not_lead_out_of_out(out: Path, tmp_path: Path) -> None:
    secret = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 7, np.uint8)).save(secret, "png")
    (tmp_path / "secret.png").write_bytes(secret.getvalue())
    (out / "secret.png").write_bytes(secret.getvalue())
    paths = ["images/../../secret.png", "secret.png", f"{tmp_path}/secret.png", "shards/../secret.png#a", "images//x"]
    edit_results(out, generated_image=paths, sha256=[None] * 5)
    report = gallery(out)
    assert (report["made"], report["unreadable"]) == (0, 5)
    assert {row["_image"] for row in read_rows(out / "gallery")} == {None}


def test_names_with_odd_characters_are_linked(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "50% #1?.csv", ROWS[:2])
    out = tmp_path / "out put"
    assert runs.run(table, out, *OPTIONS).code == 0
    folder = out / "images/a b%20#?-00000"
    next((out / "images").iterdir()).rename(folder)
    edit_results(out, generated_image=[f"images/{folder.name}/{next(folder.iterdir()).name}"])
    gallery(out)
    (row,) = read_rows(out / "gallery")
    assert row["_image"].startswith("../images/a%20b%2520%23%3F-00000/")


def test_an_unreadable_image_does_not_end_the_command(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = path_of(out, "a")
    with monkeypatch.context() as patch:
        fail_at(patch, image, errno.EACCES)
        assert gallery(out)["unreadable"] == 1
    (row, *_) = read_rows(out / "gallery")
    assert row["_problem"] == "its file cannot be read (Permission denied)"
    with monkeypatch.context() as patch:
        fail_at(patch, image.parent, errno.EIO)
        report = gallery(out, "--thumbnail-size", "32")
    assert report["made"] == 4


def test_the_page_has_no_secrets_of_urls(out: Path) -> None:
    record = run_json(out)
    record["model"]["name"] = "https://t0ken:passw0rd@example.com/model?sig=s3cret"
    (out / "run.json").write_text(json.dumps(record))
    gallery(out)
    content = b"".join(path.read_bytes() for path in (out / "gallery").rglob("*") if path.is_file())
    assert b"https://example.com/model" in content
    assert not [word for word in (b"passw0rd", b"s3cret", b"t0ken") if word in content]


@pytest.mark.parametrize("kind", ["s3", pytest.param("azure", marks=pytest.mark.promises)])
def test_a_gallery_in_an_object_store_is_updated_and_removed(table: Path, tmp_path: Path, kind: str) -> None:
    with object_place(kind, "runs/night one", tmp_path / "store") as place:
        assert runs.run(table, place.out, *OPTIONS).code == 0
        report = gallery(place.out)
        assert report == {**report, "path": f"{place.out}/gallery/index.html", "results": 5, "made": 4}
        for name in place.names("gallery"):
            path = tmp_path / "copy" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(place.read(name))
        rows = read_rows(tmp_path / "copy/gallery")
        assert set(pictures(tmp_path / "copy/gallery")) == {row["_thumb"] for row in rows} - {None}
        assert [row["_image"] for row in rows if row["id"] == "a"][0].startswith("../images/")
        place.remove(next(row["generated_image"] for row in rows if row["id"] == "a"))
        report = gallery(place.out)
        assert (report["kept"], report["unreadable"]) == (3, 1)
        assert len(place.names("gallery/thumbs")) == 3
        assert gallery(place.out, "--to", tmp_path / "local")["made"] == 3
        assert len(pictures(tmp_path / "local", "previews")) == 2
        assert runs.run(table, place.out, *OPTIONS, "--overwrite", "--limit", "1").code == 0
        assert not place.names("gallery")


# At the end of a run


def test_a_run_makes_and_updates_its_gallery(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = runs.run(table, out, *OPTIONS, "--gallery", "--limit", "2")
    assert done.code == 0, done.stderr
    assert read_meta(out / "gallery")["rows"] == 2
    assert runs.run(table, out, *OPTIONS, "--gallery").code == 0
    assert read_meta(out / "gallery")["rows"] == 5
    path_of(out, "a").unlink()
    assert command("retry", out, "--status", "missing", "--gallery").code == 0
    assert not [row for row in read_rows(out / "gallery") if row["_problem"]]


def test_a_failing_gallery_does_not_change_the_exit_code(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "o ut"
    (out / "gallery").mkdir(parents=True)
    (out / "gallery/photo.jpg").write_bytes(b"x")
    done = runs.run(table, out, *OPTIONS, "--gallery")
    assert done.code == 0
    assert "the gallery is not updated" in done.stderr
    assert f"run `batch-infer gallery '{out}'` to make it later" in done.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (StopRequested(), "the gallery is not updated, because the command was stopped: run `batch-infer gallery"),
        (pa.ArrowInvalid("odd"), "the gallery is not updated because of a bug; the results are complete\nTraceback"),
    ],
)
def test_a_run_whose_gallery_is_interrupted_ends_as_without_it(
    table: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str
) -> None:
    """The results, the metrics and the exit code are those of the run, and the summary says that the page is old."""
    gallery(out)
    metrics = out.parent / "m.prom"

    def fail(*_: object, **__: object) -> None:
        assert re.search(r"^batch_infer_running{.*} 0", metrics.read_text(), re.MULTILINE), "they do not wait for it"
        raise error

    monkeypatch.setattr(jobs, "make_gallery", fail)
    path_of(out, "a").unlink()
    done = command("retry", out, "--status", "missing", "--gallery", "--metrics-file", metrics)
    assert (done.code, message in done.stderr) == (0, True), done.stderr
    assert re.search(r"^batch_infer_exit_code{.*} 0", metrics.read_text(), re.MULTILINE)
    assert f"{out}/gallery/index.html (without the new images; update it with" in done.stdout


def test_a_stopped_run_makes_no_gallery(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not cli_gallery.update_gallery(str(out), lambda: True)
    assert "because the command was stopped" in caplog.text
    assert not (out / "gallery").exists()


def test_a_run_does_not_wait_for_another_command_that_makes_its_gallery(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gallery(out)
    with open_store(out / "gallery").locked():
        assert not cli_gallery.update_gallery(str(out), lambda: False)
    assert f"another command is making it: run `batch-infer gallery {out}` after that" in caplog.text
    assert cli_gallery.update_gallery(str(out), lambda: False)


def test_the_time_limit_ends_a_gallery_and_keeps_the_old_page(out: Path) -> None:
    gallery(out)
    before = read_meta(out / "gallery")
    assert "the old page is unchanged" in refuse(out, "--time-limit", "0.000001", code=75)
    assert read_meta(out / "gallery") == before


# Python


def test_python_makes_a_gallery(out: Path, tmp_path: Path) -> None:
    made = batch_infer.gallery(out, only_status="ok", max_results=2, thumbnail_threads=1)
    assert isinstance(made, batch_infer.Gallery)
    assert (made.path, made.results, made.left_out) == (str(out / "gallery/index.html"), 2, 3)
    assert batch_infer.gallery(out, tmp_path / "to", only_status=["ok", "flagged"]).results == 4
    assert callable(batch_infer.gallery), "no module has replaced the function"


@pytest.mark.parametrize(
    "options",
    [
        *({"max_results": 0}, {"max_results": True}, {"only_status": "done"}, {"only_status": ["ok", "missing"]}),
        *({"thumbnail_size": 31}, {"thumbnail_size": "x"}, {"thumbnail_threads": 0}, {"thumbnail_threads": 1.5}),
        {"time_limit": "soon"},
    ],
    ids=str,
)
def test_python_refuses_what_the_command_refuses(out: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(SettingsError, match=f"^{name}="):
        batch_infer.gallery(out, **options)
    assert not (out / "gallery").exists()


def test_errors_name_the_arguments_of_python(out: Path) -> None:
    with pytest.raises(SettingsError, match="^to .* is in a folder of "):
        batch_infer.gallery(out, out / "images")


def test_settings_for_other_commands_do_not_change_the_gallery(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of options serves several commands: `limit`, `status` and `threads` are of `run` and `retry`."""
    monkeypatch.setenv("BATCH_INFER_STATUS", "missing")
    monkeypatch.setenv("BATCH_INFER_THREADS", "1")
    (out.parent / "job.toml").write_text("limit = 1\n")
    assert gallery(out, "--config", out.parent / "job.toml")["results"] == 5
    monkeypatch.setenv("BATCH_INFER_ONLY_STATUS", "ok")
    (out.parent / "job.toml").write_text("max-results = 2\n")
    assert gallery(out, "--config", out.parent / "job.toml")["results"] == 2


def test_python_stops_at_the_time_limit(out: Path) -> None:
    with pytest.raises(StoppedError, match="the old page is unchanged"):
        batch_infer.gallery(out, time_limit=1e-6)


def test_a_thread_makes_a_gallery(out: Path) -> None:
    thread = threading.Thread(target=lambda: batch_infer.gallery(out))
    thread.start()
    thread.join()
    assert read_meta(out / "gallery")["rows"] == 5


def test_defaults_are_those_of_the_command(out: Path) -> None:
    done: CommandResult = command("gallery", "--help")
    assert f"[default: {MAX_RESULTS};" in " ".join(done.stdout.split())
    assert f"[default: {THUMBNAIL_SIZE};" in " ".join(done.stdout.split())
