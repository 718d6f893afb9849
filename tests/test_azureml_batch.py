"""Test the batch endpoint's scoring script: mini-batches of files, retries, duplicates and crashes."""

from __future__ import annotations

import csv
import errno
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec import structs

from batch_infer.azureml import batch, deployment, rendering
from batch_infer.azureml.mini_batch import MiniBatchScorer
from batch_infer.chain import RowOutcome
from batch_infer.errors import ServiceError, SettingsError, StorageError, TableError, UsageError
from batch_infer.manifest import SCHEMA, Manifest
from batch_infer.models import DEMO_MODEL
from batch_infer.records import PromptRequest
from batch_infer.simulation import SimulationOutcome, SimulationSettings, simulate
from batch_infer.stages import Stages
from batch_infer.store import TEMPORARY_PREFIX, host_id
from batch_infer.worker import committing
from tests import dummies, runs
from tests.content_safety_server import KEY, serving, status
from tests.storage import fail_at

ROOT = Path(__file__).parents[1]
QUICK = {"STEPS": "2", "SLOTS": "8", "THREADS": "1", "DEVICE": "cpu", "SAFETY": "none"}
VARIABLES = {f"BATCH_INFER_{name}": value for name, value in QUICK.items()}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Set up the environment of a worker, and yield its output folder, which does not exist yet."""
    for name, value in {**VARIABLES, "AZUREML_BI_OUTPUT_PATH": str(tmp_path / "out")}.items():
        monkeypatch.setenv(name, value)
    for name in ("AZUREML_MODEL_DIR", "AZ_BATCHAI_GPU_COUNT_FOUND", "CONTENT_SAFETY_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "out"
    batch.shutdown()


def table(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def prompts(path: Path, count: int = 3) -> str:
    return table(path, [{"prompt": f"a red circle, {path.stem} {k}"} for k in range(count)])


def score(*files: str) -> pd.DataFrame:
    """Score one mini-batch on a new worker."""
    batch.shutdown()
    batch.init()
    return batch.run(list(files))


def test_mini_batches_have_the_results_of_a_run(tmp_path: Path, out: Path) -> None:
    files = [prompts(tmp_path / "in" / f"part-{k}.csv") for k in range(3)]
    results = score(*files[:2])
    results = pd.concat([results, batch.run(files[2:])])
    assert list(results.columns) == [*SCHEMA.names, "carried"]
    assert set(results["carried"]) == {"{}"}
    assert list(results["id"]) == [f"part-{k}-0000000{row}" for k in range(3) for row in range(3)]
    assert set(results["status"]) == {"ok"}
    text = runs.command("status", out).stdout
    assert ": open, started" in text and "9 ok · 0 failed · total unknown" in text and "run again" not in text
    assert runs.command("merge", out).code == 0
    assert runs.run(tmp_path / "in", tmp_path / "plain", "--steps", "2", "--safety", "none").code == 0
    assert runs.hashes(out) == runs.hashes(tmp_path / "plain")
    assert [row["generated_image"] for row in runs.results(out)] == list(results["generated_image"])
    runs.assert_whole(out)


def test_every_file_has_results(tmp_path: Path, out: Path) -> None:
    """The files are CSV, Parquet and payloads. Some cannot be read or do not exist, and one row is invalid."""
    folder = tmp_path / "in"
    good = table(folder / "good.csv", [{"prompt": "a ring", "note": "a"}, {"prompt": "", "note": "b"}])
    pd.DataFrame({"prompt": ["a square"], "num_inference_steps": [1], "note": [7]}).to_parquet(folder / "p.parquet")
    payload = {"input_data": {"columns": ["prompt"], "data": [["a circle"], ["a star"]], "index": [0, 1]}}
    (folder / "payload.json").write_text(json.dumps(payload))
    (folder / "empty.csv").write_bytes(b"")
    (folder / "notes.docx").write_bytes(b"PK")
    names = ("p.parquet", "payload.json", "empty.csv", "notes.docx", "missing.csv")
    results = score(good, *(str(folder / name) for name in names))
    outcomes = {row["id"]: (row["status"], row["error"]) for row in results.to_dict("records")}
    assert [name for name, (state, _) in outcomes.items() if state == "ok"] == [
        "good-00000000", "p-00000000", "payload-00000000", "payload-00000001"
    ]  # fmt: skip
    assert outcomes["good-00000001"] == ("invalid", "the prompt is empty")
    assert outcomes["empty-00000000"] == ("invalid", "empty.csv is empty")
    assert "no such file" in outcomes["missing-00000000"][1]
    assert "unknown file extension .docx" in outcomes["notes-00000000"][1]
    notes = {row["id"]: json.loads(row["carried"])["note"] for row in results.to_dict("records")}
    assert [note for note in notes.values() if note is not None] == ["a", "b", "7"]
    assert set(results["source_file"]) == {"good.csv", *names}
    assert runs.command("merge", out).code == 0
    assert len(runs.results(out)) == len(results) == 8


def test_markers_and_documentation_are_left_out(tmp_path: Path, out: Path) -> None:
    """The same files are left out in a folder of `run`. An unreadable file next to them still has a result."""
    folder = tmp_path / "in"
    names = ("_SUCCESS", "_committed_1", ".good.csv.crc", "good.csv.crc", "README.txt", ".hidden.csv")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("prompt\na red circle\n")
    markers = [str(folder / name) for name in names]
    results = score(*markers, prompts(folder / "good.csv", 2))
    assert list(results["id"]) == ["good-00000000", "good-00000001"]
    assert len(batch.run(markers)) == 0
    (folder / "bad.csv").write_bytes(b"")
    with pytest.raises(TableError, match=r"^bad.csv is empty$"):
        batch.run([str(folder / "bad.csv"), *markers])


def test_an_unreadable_mini_batch_raises_and_has_a_result(tmp_path: Path, out: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_bytes(b"")
    batch.init()
    with pytest.raises(TableError, match="bad.csv is empty"):
        batch.run([str(bad)])
    assert runs.command("merge", out).code == 0
    assert [(row["id"], row["status"]) for row in runs.results(out)] == [("bad-00000000", "invalid")]


def test_committed_rows_are_not_rendered_again(tmp_path: Path, out: Path) -> None:
    """This applies to the same mini-batch, to other mini-batches with its files, and to rows of other workers."""
    files = [prompts(tmp_path / "in" / f"{name}.csv") for name in "abc"]
    first = score(*files)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("[!.]*") if path.is_file()}
    pd.testing.assert_frame_equal(batch.run(files), first)
    assert list(score(*files[1:])["finished_at"]) == list(first["finished_at"])[3:]
    other = MiniBatchScorer(deployment.read_deployment(str(out)))
    new = prompts(tmp_path / "in" / "d.csv")
    done = other.score([new, files[0]])
    other.close()
    assert done["finished_at"].to_pylist()[3:] == list(first["finished_at"])[:3]
    assert list(batch.run([new])["worker"]) == done["worker"].to_pylist()[:3]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    runs.command("merge", out)
    runs.assert_whole(out)


def test_temporary_files_of_dead_workers_are_removed(tmp_path: Path, out: Path) -> None:
    """Temporary files of dead processes are removed when their files are scored again. Other temporary files remain."""
    file = prompts(tmp_path / "in" / "a.csv")
    score(file)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (image,) = (out / "images").iterdir()
    leftovers = [
        folder / f"{TEMPORARY_PREFIX}{host_id()}-{dead.pid}-0123-name" for folder in (image, out / "manifest", out)
    ]
    living = image / f"{TEMPORARY_PREFIX}{host_id()}-{os.getpid()}-0123-name"
    elsewhere = image / f"{TEMPORARY_PREFIX}00000000-{dead.pid}-0123-name"
    for path in (*leftovers, living, elsewhere):
        path.touch()
    batch.run([file])
    assert [path.exists() for path in (*leftovers, living, elsewhere)] == [False, False, False, True, True]


def test_images_that_a_killed_worker_was_replacing_are_restored(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = prompts(tmp_path / "in" / "a.csv")
    before = score(file)
    images = {path: (out / path).read_bytes() for path in runs.images(out)}

    def commit(*_: Any) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setenv("BATCH_INFER_STEPS", "3")
        patch.setattr(Manifest, "commit", commit)
        score(file)
    for backup in list(out.rglob(".original-*")):  # as if the process had been killed
        backup.rename(backup.with_name(backup.name.replace(f"-{os.getpid()}-", "-99999999-")))
    pd.testing.assert_frame_equal(score(file), before)
    assert {path: (out / path).read_bytes() for path in runs.images(out)} == images


def test_an_unreadable_image_folder_is_an_error(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = prompts(tmp_path / "in" / "a.csv")
    score(file)
    before = runs.images(out)
    with monkeypatch.context() as patch:
        fail_at(patch, out / "images", errno.EACCES)
        with pytest.raises(StorageError, match=f"cannot read {out / 'images'}"):
            batch.run([file])
    assert runs.images(out) == before


def worker(load: Any = None) -> MiniBatchScorer:
    """Return a worker for the output folder of the environment. `load` overrides the dummy chain."""
    endpoint = deployment.read_deployment(os.environ["AZUREML_BI_OUTPUT_PATH"])
    with mock.patch.object(rendering, "load_chain", load or (lambda *_: dummies.DummyChain(lambda: False))):
        return MiniBatchScorer(endpoint)


def list_outcomes(results: pa.Table) -> list[tuple[str, str, str | None]]:
    return list(zip(*(results[name].to_pylist() for name in ("id", "status", "error")), strict=True))


def test_two_rows_with_one_id_have_two_results(tmp_path: Path, out: Path) -> None:
    """The ids are in tables of different mini-batches. The row of the later table gets its default id and an error."""
    folder = tmp_path / "in"
    first = table(folder / "a.csv", [{"id": "x", "prompt": "a ring"}, {"id": "y", "prompt": "a star"}])
    second = table(folder / "b.csv", [{"id": "x", "prompt": "a square"}, {"id": "z", "prompt": "a circle"}])
    score(first)
    results = batch.run([second])
    assert list(results["id"]) == ["b-00000000", "z"]
    assert results["error"][0] == "duplicate id 'x'"
    again = batch.run([first])
    assert list(again["status"]) == ["ok", "ok"]
    Path(first).unlink()  # for example, it was renamed before another job
    assert list(batch.run([second])["status"]) == ["ok", "ok"]


@pytest.mark.parametrize("prompt", ["a square", "a ring"], ids=["another", "the same"])
@pytest.mark.parametrize("order", ["ab", "ba", "a(b)", "b(a)", "a(b)!", "b(a)!", "[ba]"])
def test_the_first_file_by_name_owns_a_shared_id(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, order: str, prompt: str
) -> None:
    """Files are scored in different orders.

    `ab`: one after the other. `a(b)`: b during a, so that both workers check before either commits. `!`: the worker of
    the first file then dies before its second check, and the file is scored again. `[ba]`: in one mini-batch.
    """
    rows = {
        "a": [{"id": "x", "prompt": "a ring"}],
        "b": [{"id": "x", "prompt": prompt}, {"id": "z", "prompt": "a bar"}],
    }
    files = {name: table(tmp_path / "in" / f"{name}.csv", rows[name]) for name in rows}
    one, two = worker(), worker()
    first, second = (letter for letter in order if letter in files)
    if "(" in order:
        render, remaining = one._renderer.render, [second]

        def score_other_and_render(*arguments: Any) -> None:
            while remaining:
                two.score([files[remaining.pop()]])
            render(*arguments)
            if order.endswith("!") and not ended:
                ended.append(True)
                raise StorageError("ended here")

        ended: list[bool] = []
        monkeypatch.setattr(one._renderer, "render", score_other_and_render)
        if order.endswith("!"):
            with pytest.raises(StorageError, match="ended here"):
                one.score([files[first]])
        one.score([files[first]])
    elif order == "[ba]":
        one.score([files["b"], files["a"]])
    else:
        one.score([files[first]])
        two.score([files[second]])
    assert runs.command("merge", out).code == 0
    outcomes = {(row["id"], row["source_file"]): (row["status"], row["error"]) for row in runs.results(out)}
    expected = {
        ("x", "a.csv"): ("ok", None),
        ("b-00000000", "b.csv"): ("invalid", "duplicate id 'x'"),
        ("z", "b.csv"): ("ok", None),
    }
    assert outcomes == expected
    assert [row["prompt"] for row in runs.results(out) if row["id"] == "x"] == ["a ring"]
    runs.assert_whole(out)
    before = runs.images(out)
    assert [name for name, *_ in list_outcomes(two.score([files["b"], files["a"]]))] == ["b-00000000", "z", "x"]
    assert [name for name, *_ in list_outcomes(one.score([files["a"]]))] == ["x"]
    assert runs.images(out) == before
    one.close()
    two.close()


def test_an_id_may_not_be_the_default_id_of_another_file(tmp_path: Path, out: Path) -> None:
    """The outcome does not depend on the order in which the files are scored."""
    folder = tmp_path / "in"
    plain = prompts(folder / "p.csv", 2)
    (folder / "cat.png").touch()
    names = ("p-00000000", "p-00000001", "cat-00000000")
    named = table(folder / "aa.csv", [{"id": name, "prompt": "a star"} for name in names])
    message = "the id 'p-00000000' would be the default id of a row of p.csv: give it another"
    for files in ([plain, named], [named, plain]):
        scoring = worker()
        outcomes = {
            name: (state, error) for file in files for name, state, error in list_outcomes(scoring.score([file]))
        }
        scoring.close()
        assert outcomes["aa-00000000"] == ("invalid", message)
        assert outcomes["p-00000000"] == outcomes["p-00000001"] == outcomes["cat-00000000"] == ("ok", None)
        runs.command("merge", out)
        runs.assert_whole(out)
        assert len(runs.results(out)) == 5
        shutil.rmtree(out)


def test_files_with_one_stem_have_different_ids(tmp_path: Path, out: Path) -> None:
    """A file is not refused because of another file, which may not be part of the job."""
    folder = tmp_path / "in"
    one = prompts(folder / "p.csv", 1)
    (folder / "p.txt").write_text("a ring\n")
    (folder / "p.docx").write_bytes(b"PK")
    scoring = worker()
    assert list_outcomes(scoring.score([one])) == [("p-00000000", "ok", None)]
    outcomes = list_outcomes(scoring.score([str(folder / "p.docx"), str(folder / "p.txt")]))
    assert [(name, state) for name, state, _ in outcomes] == [("p.docx-00000000", "invalid"), ("p.txt-00000000", "ok")]
    scoring.close()
    assert runs.command("merge", out).code == 0
    runs.assert_whole(out)


def test_a_second_file_with_the_same_name_is_refused(tmp_path: Path, out: Path) -> None:
    one, two = (prompts(tmp_path / name / "p.csv", 1) for name in "ab")
    scoring = worker()
    for _ in range(2):
        outcomes = list_outcomes(scoring.score([one, two]))
        assert outcomes[0] == ("p-00000000", "ok", None)
        assert outcomes[1][:2] == ("b/p.csv-00000000", "invalid") and "have the same name" in str(outcomes[1][2])
    scoring.close()


def test_results_of_folders_with_different_columns_are_concatenated(tmp_path: Path, out: Path) -> None:
    for folder, note in (("a", [1]), ("b", ["one"]), ("c", [[True]])):
        (tmp_path / folder).mkdir()
        pd.DataFrame({"prompt": ["a ring"], "note": note}).to_parquet(tmp_path / folder / f"{folder}.parquet")
    scoring = worker()
    results = scoring.score([str(tmp_path / name / f"{name}.parquet") for name in "abc"])
    assert results["note"].to_pylist() == ["1", "one", "[true]"]  # as in `merge`
    assert len(scoring.score([])) == 0
    broken = [tmp_path / name / "broken.parquet" for name in "ab"]
    for path in broken:
        path.touch()
    with pytest.raises(TableError, match="broken.parquet cannot be read"):
        scoring.score([str(path) for path in broken])
    scoring.close()


def test_a_row_without_a_result_is_an_error(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = prompts(tmp_path / "in" / "a.csv")
    scoring = worker()
    render = scoring._renderer._chain.render
    monkeypatch.setattr(scoring._renderer._chain, "render", lambda requests: islice(render(requests), 0))
    with pytest.raises(StorageError, match="a.csv: .* does not have a result of every row"):
        scoring.score([file])
    monkeypatch.undo()
    assert len(scoring.score([file])) == 3
    scoring.close()


@pytest.mark.parametrize("how", ["error", "removed", "truncated", "late"])
def test_unreadable_parts_lose_no_row(tmp_path: Path, out: Path, how: str) -> None:
    """`error`: the disk fails temporarily. `removed`: another worker sets a part aside. `truncated`: a part is cut off.

    `late`: a part is damaged in a column that the index does not read.
    """
    files = [prompts(tmp_path / "in" / f"{name}.csv") for name in "ab"]
    scoring, other = worker(), worker()
    with mock.patch.object(committing, "COMMIT_SECONDS", 3600.0):  # one part, even on a slow machine
        other.score(files[:1])
    (part,) = (out / "manifest").glob("part-*")
    if how == "error":
        failure = mock.patch("batch_infer.manifest.index.read_part", side_effect=StorageError("the disk is missing"))
        with failure, pytest.raises(StorageError, match="missing"):
            scoring.score(files)
    elif how == "removed":
        scoring.score(files[:1])
        part.rename(part.with_suffix(".damaged"))
    elif how == "truncated":
        part.write_bytes(part.read_bytes()[:100])
    else:
        scoring, other = worker(), worker()  # existing workers have already read the part
        _corrupt(part, "prompt")
    results = scoring.score(files)
    assert results["status"].to_pylist() == ["ok"] * 6
    assert other.score(files)["status"].to_pylist() == ["ok"] * 6
    scoring.close()
    other.close()
    assert runs.command("merge", out).code == 0
    runs.assert_whole(out)


def _corrupt(part: Path, column: str) -> None:
    """Change a byte in the first page of a column."""
    chunk = pq.ParquetFile(part).metadata.row_group(0).column(SCHEMA.get_field_index(column))
    content = bytearray(part.read_bytes())
    content[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 3] ^= 0xFF
    part.write_bytes(content)


CRASHED = "rendering crashed 3 times with this row in progress, the last time with no other row"


class Doomed(dummies.DummyChain):
    """A chain whose process is killed from outside while it renders a batch of rows, after `batches` batches."""

    def __init__(self, batches: int) -> None:
        super().__init__(lambda: False)
        self._remaining = batches

    def _make(self, batch: list[PromptRequest], stages: Stages) -> list[RowOutcome]:
        if not self._remaining:
            os.kill(os.getpid(), signal.SIGKILL)
        self._remaining -= 1
        return super()._make(batch, stages)


def count_deliveries(files: Sequence[str], kill: Callable[[int], int | None] = lambda _: None) -> int:
    """Return the number of deliveries until a mini-batch succeeds, each in a new process, or 0 after four failures.

    `kill` returns the number of batches of rows after which a delivery's process is killed from outside, or None.
    """
    endpoint = deployment.read_deployment(os.environ["AZUREML_BI_OUTPUT_PATH"])
    for delivery in range(1, 5):
        process = os.fork()
        if not process:  # a process like one that Azure starts
            code = 1
            try:
                batches = kill(delivery)
                chain = dummies.DummyChain(lambda: False) if batches is None else Doomed(batches)
                endpoint = replace(endpoint, earlier=endpoint.record if Path(endpoint.settings.out).exists() else None)
                with mock.patch.object(rendering, "load_chain", mock.Mock(return_value=chain)):
                    MiniBatchScorer(endpoint).score(files)
                code = 0
            finally:
                os._exit(code)
        if not os.waitpid(process, 0)[1]:
            return delivery
    return 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # about os.fork with threads, which are idle here
@pytest.mark.parametrize("index", [0, *(pytest.param(index, marks=pytest.mark.promises) for index in (6, 38))])
def test_a_row_that_kills_its_process_loses_no_other_row(tmp_path: Path, out: Path, index: int) -> None:
    files = []
    for k in range(3):
        rows = [{"prompt": "die by SIGKILL" if 13 * k + row == index else f"a ring {row}"} for row in range(13)]
        files.append(table(tmp_path / "in" / f"p-{k}.csv", rows))
    assert count_deliveries(files) == 4
    assert runs.command("merge", out).code == 0
    results = runs.results(out)
    assert Counter(row["status"] for row in results) == {"ok": 38, "failed": 1}
    (failed,) = (row for row in results if row["status"] == "failed")
    assert failed["prompt"] == "die by SIGKILL"
    assert failed["error"] == CRASHED
    runs.assert_whole(out)
    assert count_deliveries(files) == 2  # in the second delivery, the row is already tried alone
    assert count_deliveries(files[: index // 13 or 1]) <= 2
    runs.command("merge", out)
    runs.assert_whole(out)


@pytest.mark.parametrize("others", [0, 12, 39])
def test_a_row_that_raises_is_isolated_too(tmp_path: Path, out: Path, others: int) -> None:
    rows = [{"prompt": "raise nonsense"}, *({"prompt": f"a ring {row}"} for row in range(others))]
    file = table(tmp_path / "in" / "p.csv", rows)
    scoring = worker()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="nonsense"):
            scoring.score([file])
    for _ in range(2):
        assert sorted(scoring.score([file])["status"].to_pylist()) == ["failed", *["ok"] * others]
    scoring.close()
    assert runs.command("merge", out).code == 0
    assert [row["error"] for row in runs.results(out) if row["status"] == "failed"] == [CRASHED]
    runs.assert_whole(out)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_timeout_fails_no_row(tmp_path: Path, out: Path) -> None:
    """Azure kills the process, regardless of the rows in progress."""
    files = [prompts(tmp_path / "in" / f"p-{k}.csv", 40) for k in range(3)]
    assert count_deliveries(files, lambda delivery: {1: 2, 2: 4}.get(delivery)) == 3
    assert runs.command("merge", out).code == 0
    assert Counter(row["status"] for row in runs.results(out)) == {"ok": 120}
    runs.assert_whole(out)


def test_the_five_columns_of_the_model_catalog(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_INFER_PREDICTIONS", "card")
    monkeypatch.setenv("CONTENT_SAFETY_KEY", KEY)
    monkeypatch.setenv("BATCH_INFER_SAFETY", "azure")
    with serving(words={"axe": ("Violence", 4)}) as service:
        monkeypatch.setenv("CONTENT_SAFETY_ENDPOINT", service.endpoint)
        results = score(table(tmp_path / "in.csv", [{"prompt": "a ring"}, {"prompt": "an axe"}]))
    text = results.to_csv(sep=" ", header=False, index=False)
    ring, axe = csv.reader(io.StringIO(text), delimiter=" ")
    assert ring == ["0", "a ring", "images/in-00000/in-00000000-0.png", "False", "in.csv"]
    assert axe == ["1", "an axe", "Blocked By Azure AI Content Safety", "True", "in.csv"]
    assert (out / ring[2]).is_file()


def test_integers_stay_integers_next_to_nulls(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_INFER_SAFETY", "checker")
    results = score(table(tmp_path / "in.csv", [{"prompt": "a ring", "seed": 5}, {"prompt": "", "seed": 6}]))
    line, _ = csv.reader(io.StringIO(results.to_csv(sep=" ", header=False, index=False)), delimiter=" ")
    cells = dict(zip(results.columns, line, strict=True))
    assert (cells["seed"], cells["height"], cells["image_index"]) == ("5", "64", "0")
    assert json.loads(cells["safety_scores"])["concept_0"] == round(json.loads(cells["safety_scores"])["concept_0"], 3)


def test_a_safety_outage_raises_and_a_retry_continues(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTENT_SAFETY_KEY", KEY)
    monkeypatch.setenv("BATCH_INFER_SAFETY", "azure")
    file = prompts(tmp_path / "in.csv", 12)
    with serving(faults=lambda request: status(500) if request.kind == "image" else None) as service:
        monkeypatch.setenv("CONTENT_SAFETY_ENDPOINT", service.endpoint)
        endpoint = deployment.read_deployment(str(out))
        assert endpoint.settings.safety.service
        safety = replace(
            endpoint.settings.safety, service=structs.replace(endpoint.settings.safety.service, timeout_seconds=0.5)
        )
        worker = MiniBatchScorer(replace(endpoint, settings=replace(endpoint.settings, safety=safety)))
        with pytest.raises(ServiceError, match="has not answered"):
            worker.score([file])
        worker.close()
        service.script([])
        worker = MiniBatchScorer(endpoint)  # with the usual timeout, which a slow machine keeps
        assert worker.score([file])["status"].to_pylist() == ["ok"] * 12
        worker.close()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"BATCH_INFER_STEPS": "many"}, "'many' is not a valid integer"),
        ({"BATCH_INFER_SLOTS": "auto"}, "BATCH_INFER_SLOTS=auto: use a number"),
        ({"BATCH_INFER_OVERWRITE": "true"}, "BATCH_INFER_OVERWRITE is set"),
        ({"BATCH_INFER_SINK": "webdataset"}, "BATCH_INFER_SINK is set"),
        ({"BATCH_INFER_PREDICTIONS": "five"}, "BATCH_INFER_PREDICTIONS=five: use full or card"),
        ({"BATCH_INFER_SAFETY": "azure"}, "CONTENT_SAFETY_ENDPOINT is not set"),
        ({"AZUREML_BI_OUTPUT_PATH": ""}, "AZUREML_BI_OUTPUT_PATH is not set"),
        ({"AZUREML_MODEL_DIR": "/nowhere"}, "AZUREML_MODEL_DIR=/nowhere is not a folder"),
        ({"AZ_BATCHAI_GPU_COUNT_FOUND": "2", "BATCH_INFER_DEVICE": "auto"}, "this worker has no GPU"),
    ],
)
def test_init_refuses_invalid_settings(
    out: Path, monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], message: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        batch.init()
    assert not out.exists()


def test_another_model_or_policy_in_the_same_out_is_refused(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(prompts(tmp_path / "in.csv"))
    monkeypatch.setenv("BATCH_INFER_SAFETY", "checker")
    message = "was made with safety none, and this run has safety .*: give the job another output path$"
    with pytest.raises(SettingsError, match=message):
        batch.init()
    for part in (out / "manifest").glob("part-*"):
        part.unlink()
    with pytest.raises(SettingsError, match=message):
        batch.init()  # another worker may have written run.json and not committed rows yet
    (out / "run.json").unlink()
    batch.init()
    assert runs.run_json(out)["identity"]["safety"] != "none"


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize(
    ("variables", "name"),
    [({"BATCH_INFER_SCHEDULER": "EulerDiscreteScheduler"}, "scheduler"), ({"BATCH_INFER_SAFETY": "checker"}, "safety")],
)
def test_workers_with_different_settings_cannot_share_a_new_out(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str, links: bool
) -> None:
    """Both workers read OUT before either writes to it."""
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", mock.Mock(side_effect=PermissionError(1, "no links here")))
    first = deployment.read_deployment(str(out))
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    second = deployment.read_deployment(str(out))
    worker = MiniBatchScorer(first)
    try:
        with pytest.raises(SettingsError, match=f"was made with {name} .*: give the job another output path$"):
            MiniBatchScorer(second)
        assert worker.score([prompts(tmp_path / "in.csv")])["status"].to_pylist() == ["ok"] * 3
        (out / "run.json").write_text(json.dumps(second.record, default=str))  # as if both workers found no run.json
        with pytest.raises(SettingsError, match=f"was made with {name}"):
            worker.score([prompts(tmp_path / "more.csv")])
    finally:
        worker.close()


def test_a_truncated_run_json_is_read_again(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount truncates it to the cached size of an earlier file."""
    score(prompts(tmp_path / "in.csv"))
    whole = (out / "run.json").read_bytes()
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) % 3 == 0:
            (out / "run.json").write_bytes(whole)

    monkeypatch.setattr(deployment, "time", mock.Mock(sleep=wait))
    (out / "run.json").write_bytes(whole[:100])
    batch.init()
    (out / "run.json").write_bytes(whole[:100])
    assert len(batch.run([prompts(tmp_path / "more.csv")])) == 3
    assert len(waits) == 6
    monkeypatch.setattr(deployment, "time", mock.Mock(sleep=lambda _: None))
    (out / "run.json").write_bytes(whole[:100])
    with pytest.raises(UsageError, match="run.json cannot be read"):
        batch.init()


def test_a_mini_batch_must_be_a_list_of_paths(out: Path) -> None:
    with pytest.raises(RuntimeError, match="init"):
        batch.run(["a.csv"])
    batch.init()
    for wrong in ("a.csv", pd.DataFrame({"prompt": ["a"]}), [1]):
        with pytest.raises(SettingsError, match="a mini-batch is a list of paths"):
            batch.run(wrong)  # type: ignore[arg-type]


def test_a_registered_model_is_found_in_nested_folders(tmp_path: Path) -> None:
    inner = tmp_path / "1" / "mlflow" / "artifacts"
    inner.mkdir(parents=True)
    with pytest.raises(SettingsError, match="contains no model"):
        deployment.find_model_path(tmp_path)
    (inner / "model").symlink_to(DEMO_MODEL)
    assert deployment.find_model_path(tmp_path) == str(inner / "model")
    assert deployment.find_model_path(inner / "model") == str(inner / "model")
    (inner / "other").symlink_to(DEMO_MODEL)
    with pytest.raises(SettingsError, match="contains several models"):
        deployment.find_model_path(tmp_path)


# Simulated jobs


def simulated(tmp_path: Path, files: int, rows: int, **more: Any) -> SimulationOutcome:
    for k in range(files):
        prompts(tmp_path / "in" / f"prompts-{k:02d}.csv", rows)
    settings = SimulationSettings(
        inputs=(tmp_path / "in",), out=tmp_path / "out", environment=VARIABLES, timeout=600, gpus=0, **more
    )
    return simulate(settings)


def assert_accounted_for(tmp_path: Path, count: int) -> None:
    """Check that every prompt has one image despite kills and duplicates, with the same bytes as in a run."""
    out = tmp_path / "out"
    predictions = pd.read_csv(out / "predictions.csv", sep=" ", header=None)
    assert predictions[0].nunique() == count
    assert len(runs.images(out)) == count
    assert not list(out.rglob(f"{TEMPORARY_PREFIX}*"))
    assert runs.command("merge", out).code == 0
    runs.assert_whole(out)
    assert runs.run(tmp_path / "in", tmp_path / "plain", "--steps", "2", "--safety", "none").code == 0
    assert runs.hashes(out) == runs.hashes(tmp_path / "plain")
    assert len(runs.hashes(out)) == count


@pytest.mark.promises
def test_killed_workers_and_duplicate_deliveries(tmp_path: Path) -> None:
    outcome = simulated(tmp_path, 6, 4, workers=2, mini_batch_size=2, kill=1.0, duplicate=0.34, seed=1)
    # The first kill comes within a tenth of a second of the start of its mini-batch. Later kills may come too late.
    assert outcome.kills >= 1
    assert (outcome.duplicates, outcome.failed_files) == (1, 0)
    assert_accounted_for(tmp_path, 24)


DYING = """
import sys
sys.path.insert(0, {root!r})
from batch_infer.azureml import rendering
from batch_infer.azureml.batch import init, run, shutdown
from tests.dummies import DummyChain
rendering.load_chain = lambda *_: DummyChain(lambda: False)
"""


@pytest.mark.promises
def test_a_row_that_kills_its_worker_in_a_simulated_job(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(DYING.format(root=str(ROOT)))
    table(tmp_path / "in" / "zz.csv", [{"prompt": "a star"}, {"prompt": "die by SIGKILL"}, {"prompt": "a ring"}])
    outcome = simulated(tmp_path, 8, 13, workers=2, mini_batch_size=3, seed=1, script=script)
    assert (outcome.failed_files, outcome.deaths) == (0, 3)
    assert runs.command("merge", tmp_path / "out").code == 0
    results = runs.results(tmp_path / "out")
    assert Counter(row["status"] for row in results) == {"ok": 8 * 13 + 2, "failed": 1}
    runs.assert_whole(tmp_path / "out")


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_thousand_prompts_in_forty_files(tmp_path: Path, seed: int) -> None:
    outcome = simulated(tmp_path, 40, 25, workers=3, mini_batch_size=3, kill=0.2, duplicate=0.1, seed=seed)
    assert outcome.kills + outcome.kills_missed == 3  # of 14 mini-batches; a kill may come too late
    assert outcome.kills >= 1
    assert outcome.duplicates >= 1
    assert outcome.failed_files == 0
    assert_accounted_for(tmp_path, 1000)


def test_the_example_script_renders_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZUREML_BI_OUTPUT_PATH", str(tmp_path))
    monkeypatch.setenv("STEPS", "1")
    spec = importlib.util.spec_from_file_location("one_by_one", ROOT / "examples" / "azureml" / "one_by_one.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.init()
    results = script.run([prompts(tmp_path / "in.csv", 2)])
    assert [(tmp_path / name).is_file() for name in results[2]] == [True, True]
