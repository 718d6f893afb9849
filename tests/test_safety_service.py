"""Azure AI Content Safety in whole runs: the command, the real SDK, and a server on loopback."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec import structs
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from batch_infer.jobs import rescore
from batch_infer.manifest import Manifest
from batch_infer.settings import ServiceSettings
from batch_infer.sinks.folder import FolderSink
from tests import runs
from tests.content_safety_server import (
    KEY,
    Fault,
    ReceivedRequest,
    Service,
    malformed,
    serving,
    status,
    with_severity,
    without,
)

RED = "a large red circle, centre, cream background"
BLUE = "a large blue square, centre, cream background"
READ = ServiceSettings.from_environment
WORDS = {"axe": ("Violence", 4), "knife": ("Violence", 2)}
CROSS = ("--on-flagged", "quarantine")
COMPUTE = ("--slots", "8", "--threads", "1", "--device", "cpu", "--num-processes", "0")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a key, and a short timeout for a service that does not answer."""
    monkeypatch.setenv("CONTENT_SAFETY_KEY", KEY)
    wait_for(monkeypatch, 0.5)


def wait_for(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    def from_environment(environment: Mapping[str, str]) -> ServiceSettings | None:
        settings = READ(environment)
        return settings and structs.replace(settings, timeout_seconds=seconds)

    monkeypatch.setattr(ServiceSettings, "from_environment", from_environment)


def table(folder: Path, prompts: Sequence[str]) -> Path:
    path = folder / "t.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["prompt"], *([prompt] for prompt in prompts)])
    return path


def classify_red(image: Image.Image) -> dict[str, int]:
    """Return a severity of 4 for Sexual if more than a twentieth of an image is red."""
    red, *others = np.asarray(image.convert("RGB")).astype(int).transpose(2, 0, 1)
    return {"Sexual": 4} if np.mean(red > np.maximum(*others) + 80) > 0.05 else {}


PROMPTS = [RED, "an axe", BLUE, f"a knife and {BLUE}", "small green ring, centre, white background"]
CROSSES = ["a large red cross on a white ground", BLUE, RED]
SHARP = ("--steps", "12", "--guidance-scale", "5")


def use(monkeypatch: pytest.MonkeyPatch, service: Service, **more: str) -> None:
    monkeypatch.setenv("CONTENT_SAFETY_ENDPOINT", service.endpoint)
    for name, value in more.items():
        monkeypatch.setenv(f"CONTENT_SAFETY_{name}", value)


def test_blocked_prompts_are_not_rendered_and_each_image_is_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with serving(words=WORDS, classify=classify_red) as service:
        use(monkeypatch, service, THRESHOLD="1,Violence=2")
        done = runs.run(table(tmp_path, PROMPTS), out, "--safety", "azure", *SHARP, *CROSS)
        assert done.code == 0, done.stderr
        assert Counter(service.texts) == Counter(PROMPTS)
        assert len(service.images) == 4
        assert runs.run_json(out)["summary"]["row_forwards"] == 4 * 12 * 2
        again = runs.run(table(tmp_path, PROMPTS), out, "--safety", "azure", *SHARP, *CROSS)
        assert (again.code, len(service.requests)) == (0, 9)
    red, axe, blue, knife, ring = runs.results(out)
    assert (axe["status"], axe["generated_image"], axe["nsfw_content_detected"]) == ("blocked", None, True)
    assert axe["error"] == "Azure AI Content Safety refused the prompt (Violence 4)"
    assert axe["safety_scores"] == {"Hate": 0.0, "SelfHarm": 0.0, "Sexual": 0.0, "Violence": 4.0}
    assert (red["status"], red["error"]) == ("flagged", "Azure AI Content Safety flagged the image (Sexual 4)")
    assert red["generated_image"].startswith("quarantine/")
    for row in (blue, knife, ring):
        assert (row["status"], row["nsfw_content_detected"], row["error"]) == ("ok", False, None)
        assert row["safety_checker"] == "azure_content_safety"
    assert (knife["safety_scores"]["Violence"], ring["safety_scores"]["Violence"]) == (2.0, 0.0)
    assert KEY not in (out / "run.json").read_text()
    runs.assert_whole(out)


@pytest.mark.promises
def test_images_do_not_depend_on_the_checkers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"a red circle {k}" for k in range(20)]
    with serving(latency=0.01) as service:
        use(monkeypatch, service)
        assert runs.run(table(tmp_path, prompts), tmp_path / "a", "--safety", "azure").code == 0
    assert runs.run(table(tmp_path, prompts), tmp_path / "b", "--safety", "none").code == 0
    assert runs.hashes(tmp_path / "a") == runs.hashes(tmp_path / "b")


def test_both_checkers_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are also the default if the environment sets the endpoint. The built-in model's checker flags crosses."""
    prompts = [CROSSES[0], RED, BLUE]
    with serving(classify=classify_red) as service:
        use(monkeypatch, service)
        done = runs.run(table(tmp_path, prompts), tmp_path / "out", *SHARP)
        assert done.code == 0, done.stderr
    cross, red, blue = runs.results(tmp_path / "out")
    assert {row["safety_checker"] for row in (cross, red, blue)} == {"stable_diffusion+azure_content_safety"}
    assert all({"concept_0", "Hate"} <= set(row["safety_scores"]) for row in (cross, red, blue))
    assert (cross["status"], red["status"], blue["status"]) == ("flagged", "flagged", "ok")
    assert red["error"] == "Azure AI Content Safety flagged the image (Sexual 4)"


FAULTS = [status(429, "0"), status(429), status(500), status(503), malformed(b"<html>"), malformed(b"{}"),
          without("Hate"), with_severity("Sexual", None), Fault(reset=True),
          Fault(429, body=b'{"error": {"code": 429, "message": {}}}')]  # fmt: skip


def test_transient_errors_are_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fault of each kind, among prompts and among images."""
    out, prompts = tmp_path / "out", [f"a blue ring {k}" for k in range(16)]
    with serving(faults=[*FAULTS, *[None] * 12, *FAULTS]) as service:
        use(monkeypatch, service)
        wait_for(monkeypatch, 30)
        done = runs.run(table(tmp_path, prompts), out, "--safety", "azure")
        assert done.code == 0, done.stderr
        assert len(service.requests) == 2 * len(prompts) + 2 * len(FAULTS)
    assert [row["status"] for row in runs.results(out)] == ["ok"] * 16


@pytest.mark.parametrize("fault", [status(500), status(400), without("Violence")], ids=["500", "400", "no category"])
def test_a_row_without_an_answer_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    def faults(request: ReceivedRequest) -> Fault | None:
        return fault if request.kind == "text" and "cursed" in request.content else None

    out = tmp_path / "out"
    with serving(faults=faults) as service:
        use(monkeypatch, service)
        done = runs.run(table(tmp_path, ["a ring", "a cursed ring", "a circle"]), out, "--safety", "azure")
    assert done.code == 3, done.stderr
    ring, cursed, circle = runs.results(out)
    assert (ring["status"], cursed["status"], circle["status"]) == ("ok", "failed", "ok")
    assert cursed["generated_image"] is None and "Azure AI Content Safety" in cursed["error"]


@pytest.mark.promises
@pytest.mark.parametrize("fault", [status(500), Fault(hang=60)], ids=["500", "silence"])
def test_a_service_outage_ends_the_run_and_the_next_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    out, prompts = tmp_path / "out", [f"a ring {k}" for k in range(24)]
    images = 0

    def faults(request: ReceivedRequest) -> Fault | None:
        nonlocal images
        images += request.kind == "image"
        return fault if images > 10 else None

    with serving(faults=faults) as service:
        use(monkeypatch, service)
        done = runs.run(table(tmp_path, prompts), out, "--safety", "azure")
        assert done.code == 75
        assert "has not answered" in done.stderr and service.endpoint in done.stderr
    rows = runs.results(out)
    assert 0 < len(rows) < 24 and {row["status"] for row in rows} == {"ok"}
    runs.assert_whole(out)
    with serving() as service:
        use(monkeypatch, service)
        assert runs.run(table(tmp_path, prompts), out, "--safety", "azure").code == 0
        assert len(service.images) == 24 - len(rows)
    assert len(runs.results(out)) == 24
    runs.assert_whole(out)


def test_a_key_refused_during_a_run_keeps_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, images = tmp_path / "out", 0

    def faults(request: ReceivedRequest) -> Fault | None:
        nonlocal images
        images += request.kind == "image"
        return status(401) if images > 10 else None

    with serving(faults=faults) as service:
        use(monkeypatch, service)
        done = runs.run(table(tmp_path, [f"a ring {k}" for k in range(24)]), out, "--safety", "azure")
    assert done.code == 75 and "CONTENT_SAFETY_KEY" in done.stderr
    assert runs.results(out)
    runs.assert_whole(out)


def test_retry_uses_the_endpoint_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with serving(words=WORDS) as service:
        use(monkeypatch, service)
        assert runs.run(table(tmp_path, ["an axe"]), out, "--safety", "azure").code == 0
    with serving() as service:
        use(monkeypatch, service)
        assert runs.command("retry", out, "--status", "blocked").code == 0
        assert service.texts == ["an axe"]
    monkeypatch.delenv("CONTENT_SAFETY_ENDPOINT")
    done = runs.command("retry", out, "--status", "blocked")
    assert done.code == 2 and "CONTENT_SAFETY_ENDPOINT is not set" in done.stderr


@pytest.mark.promises
def test_a_key_refused_in_a_worker_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with serving(words=WORDS) as service:
        use(monkeypatch, service)
        monkeypatch.setenv("CONTENT_SAFETY_KEY", "another")
        done = runs.run(table(tmp_path, PROMPTS), out, "--safety", "azure", "--num-processes", "1")
        assert done.code == 2
        assert "CONTENT_SAFETY_KEY" in done.stderr and "Traceback" not in done.stderr
        assert set(service.statuses) == {401}
        assert not (out / "run.json").exists()


@pytest.mark.parametrize(
    ("endpoint", "threshold", "report"),
    [
        (None, "1", "--safety azure: CONTENT_SAFETY_ENDPOINT is not set"),
        ("my-resource", "1", "CONTENT_SAFETY_ENDPOINT=my-resource: expected https://"),
        ("http://127.0.0.1:1", "high", "CONTENT_SAFETY_THRESHOLD=high: expected a number from 0 to 7"),
        ("http://127.0.0.1:1", "Hat=1", "the categories are Hate, SelfHarm, Sexual, Violence"),
        ("http://127.0.0.1:1", "Hate=1,Hate=3", "each once"),
        ("http://safety.example.com", "1", "expected https://"),
        ("https://me:secret@safety.example.com", "1", "expected https://"),
    ],
)
def test_missing_settings_are_reported_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str | None, threshold: str, report: str
) -> None:
    monkeypatch.delenv("CONTENT_SAFETY_ENDPOINT", raising=False)
    if endpoint:
        monkeypatch.setenv("CONTENT_SAFETY_ENDPOINT", endpoint)
    monkeypatch.setenv("CONTENT_SAFETY_THRESHOLD", threshold)
    done = runs.run(table(tmp_path, PROMPTS), tmp_path / "out", "--safety", "azure")
    assert done.code == 2 and report in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["2024-9-1", "latest", "2024-09-01-beta", "2024-09-01&x=1"])
def test_a_malformed_api_version_is_reported_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("CONTENT_SAFETY_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("CONTENT_SAFETY_API_VERSION", version)
    done = runs.run(table(tmp_path, PROMPTS), tmp_path / "out", "--safety", "azure")
    assert done.code == 2 and f"CONTENT_SAFETY_API_VERSION={version}: expected YYYY-MM-DD" in done.stderr
    assert not (tmp_path / "out").exists()


def test_only_another_api_version_is_in_run_json_and_it_does_not_change_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`retry` takes the version from the environment, like the endpoint."""
    out, preview = tmp_path / "out", "2024-09-15-preview"
    with serving() as service:
        use(monkeypatch, service, API_VERSION="2024-09-01")
        assert runs.run(table(tmp_path, PROMPTS[:1]), out, "--safety", "azure", *runs.QUICK).code == 0
    assert "api_version" not in runs.run_json(out)["settings"]["safety"]["service"]
    with serving(api_version=preview) as service:
        use(monkeypatch, service, API_VERSION=preview)
        done = runs.run(table(tmp_path, PROMPTS[:2]), out, "--safety", "azure", *runs.QUICK)
        assert (done.code, service.texts) == (0, ["an axe"]), done.stderr
        assert runs.run_json(out)["settings"]["safety"]["service"]["api_version"] == preview
    with serving() as service:
        use(monkeypatch, service, API_VERSION="")
        next(iter(out.glob("images/*/*.png"))).unlink()
        done = runs.command("retry", out, "--status", "missing")
        assert (done.code, set(service.statuses)) == (0, {200}), done.stderr
    assert "api_version" not in runs.run_json(out)["settings"]["safety"]["service"]


def test_a_missing_endpoint_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTENT_SAFETY_ENDPOINT", raising=False)
    done = runs.run(table(tmp_path, PROMPTS), tmp_path / "out")
    assert done.code == 2 and "CONTENT_SAFETY_KEY is set but CONTENT_SAFETY_ENDPOINT is not" in done.stderr


def test_without_a_key_and_an_identity_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTENT_SAFETY_KEY")
    with serving() as service:
        use(monkeypatch, service)
        done = runs.run(table(tmp_path, PROMPTS), tmp_path / "out", "--safety", "azure")
        assert (done.code, service.requests) == (2, [])
    assert "CONTENT_SAFETY_KEY" in done.stderr
    assert not (tmp_path / "out").exists()


# Rescoring


class Killed(BaseException):
    """Simulates a kill, since no code handles it."""


def without_bookkeeping(out: Path) -> list[dict[str, Any]]:
    changing = {"slots", "seconds", "attempt", "worker", "finished_at"}
    return [{name: value for name, value in row.items() if name not in changing} for row in runs.results(out)]


@pytest.mark.parametrize("policy", ["blank", "quarantine", *(pytest.param(name, marks=pytest.mark.promises) for name in
                                    ("keep", "blur", "drop"))])  # fmt: skip
def test_rescored_images_equal_those_checked_at_once(tmp_path: Path, policy: str) -> None:
    path, checks = table(tmp_path, CROSSES), ("--safety", "checker", "--on-flagged", policy)
    assert runs.run(path, tmp_path / "again", *SHARP, "--safety", "none").code == 0
    done = runs.command("rescore", tmp_path / "again", *checks, "--json")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["judged"] == 3 and report["flagged"] == report["changed"] >= 1
    assert runs.run(path, tmp_path / "once", *SHARP, *checks).code == 0
    assert without_bookkeeping(tmp_path / "again") == without_bookkeeping(tmp_path / "once")
    runs.assert_whole(tmp_path / "again")
    more = runs.run(path, tmp_path / "again", *SHARP, *checks)
    assert (more.code, "nothing to render" in more.stdout) == (0, True)
    assert runs.command("rescore", tmp_path / "again", *checks, "--json").stdout.startswith('{"judged": 0')


def test_a_kept_original_is_restored_when_no_longer_flagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, path = tmp_path / "out", table(tmp_path, [*CROSSES, "an axe"])
    with serving(classify=classify_red, words=WORDS) as service:
        use(monkeypatch, service)
        assert runs.run(path, out, *SHARP, "--safety", "azure", *CROSS).code == 0
        flagged = [row["id"] for row in runs.results(out) if row["status"] == "flagged"]
        assert flagged
        use(monkeypatch, service, THRESHOLD="4")
        before = len(service.requests)
        done = runs.command("rescore", out, "--safety", "azure", "--on-flagged", "blank")
        assert done.code == 0, done.stderr
        assert Counter(request.kind for request in service.requests[before:]) == {"image": 3, "text": 4}
    rows = {row["id"]: row for row in runs.results(out)}
    assert [rows[name]["status"] for name in flagged] == ["ok"] * len(flagged)
    assert all(rows[name]["generated_image"].startswith("images/") for name in flagged)
    assert "t-00000003" not in rows and "1 left: `batch-infer run` renders them" in done.stdout
    with serving(classify=classify_red, words=WORDS) as service:
        use(monkeypatch, service, THRESHOLD="3")
        assert runs.command("rescore", out, "--safety", "azure", "--on-flagged", "blank").code == 0
    runs.assert_whole(out)


def test_the_policy_of_the_run_is_kept_unless_another_is_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rescore` keeps it, and so does the same `run` command afterwards."""
    monkeypatch.delenv("CONTENT_SAFETY_KEY")
    out, path = tmp_path / "out", table(tmp_path, CROSSES)
    assert runs.command("run", path, "-o", out, *COMPUTE, *SHARP, "--on-flagged", "keep").code == 0
    before = runs.hashes(out)
    done = runs.command("rescore", out, "--safety", "checker")
    assert done.code == 0 and "original" not in done.stderr
    assert runs.run_json(out)["settings"]["safety"]["on_flagged"] == "keep"
    assert runs.hashes(out) == before, "no image was replaced"
    done = runs.command("rescore", out, "--safety", "checker", "--on-flagged", "quarantine", "--json")
    report = json.loads(done.stdout)
    assert (done.code, report["changed"]) == (0, 0)
    assert report["moved"] == report["flagged"] == len(list((out / "quarantine").rglob("*.png"))) >= 1
    again = runs.command("rescore", out, "--safety", "checker", "--on-flagged", "keep")
    assert f"0 changed, {report['moved']} moved or replaced" in again.stdout
    assert runs.command("rescore", out, "--safety", "checker", "--on-flagged", "quarantine").code == 0
    assert any(path.startswith("quarantine/") for path in runs.images(out))
    again = runs.command("run", path, "-o", out, *COMPUTE, *SHARP, "--json")
    assert (again.code, json.loads(again.stdout)["rendered"]) == (0, 0), again.stderr
    assert runs.hashes(out) == before
    other = runs.command("run", path, "-o", out, *COMPUTE, *SHARP, "--on-flagged", "blank")
    assert other.code == 2 and "on flagged quarantine, and this run has safety" in other.stderr
    runs.assert_whole(out)


@pytest.mark.parametrize(
    ("policy", "loss"),
    [
        ("blank", "replaced by a black image"),
        *(pytest.param(*case, marks=pytest.mark.promises) for case in (
            ("blur", "replaced by a blurred image"), ("drop", "removed"), ("keep", None), ("quarantine", None))),
    ],
)  # fmt: skip
def test_a_warning_names_what_will_be_lost_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, loss: str | None
) -> None:
    """The policy is that of the run."""
    out, path = tmp_path / "out", table(tmp_path, CROSSES)
    assert runs.run(path, out, *SHARP, "--safety", "none", "--on-flagged", policy).code == 0
    before = runs.hashes(out)

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("batch_infer.jobs.rescore.Rescorer.rescore", die)
        runs.command("rescore", out, "--safety", "checker")
    assert runs.hashes(out) == before
    done = runs.command("rescore", out, "--safety", "checker")
    assert (f"images that are flagged now will be {loss} (--on-flagged {policy})" in done.stderr) == bool(loss)
    assert "original" not in runs.command("rescore", out, "--safety", "checker").stderr, "no image is left to check"


def test_a_prompt_refused_by_rescore_flags_its_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, path = tmp_path / "out", table(tmp_path, [f"a knife and {BLUE}", "an axe", BLUE])
    with serving(words=WORDS) as service:
        use(monkeypatch, service, THRESHOLD="3")
        assert runs.run(path, out, "--safety", "azure").code == 0
        use(monkeypatch, service, THRESHOLD="1")
        assert runs.command("rescore", out, "--safety", "azure", "--on-flagged", "drop").code == 0
    knife, axe, blue = runs.results(out)
    assert (knife["status"], knife["generated_image"]) == ("flagged", None)
    assert knife["error"] == axe["error"].replace("4", "2") == "Azure AI Content Safety refused the prompt (Violence 2)"
    assert (axe["status"], blue["status"]) == ("blocked", "ok")
    runs.assert_whole(out)


def test_a_blanked_image_is_never_rescored_as_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, path = tmp_path / "out", table(tmp_path, CROSSES)
    assert runs.run(path, out, *SHARP, "--safety", "checker", "--on-flagged", "blank").code == 0
    for policy in ("keep", "quarantine", "blank"):
        with serving() as service:
            use(monkeypatch, service)
            assert runs.command("rescore", out, "--safety", "azure", "--on-flagged", policy).code == 0
        cross = runs.results(out)[0]
        assert (cross["status"], cross["nsfw_content_detected"]) == ("flagged", True)
        assert cross["error"].count("cannot be judged again") == 1
    runs.assert_whole(out)


def test_a_missing_or_broken_image_fails_and_is_rendered_by_the_next_run(tmp_path: Path) -> None:
    out, path = tmp_path / "out", table(tmp_path, CROSSES)
    assert runs.run(path, out, "--safety", "none").code == 0
    first, second, _ = (out / row["generated_image"] for row in runs.results(out))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    checks = ("--safety", "checker", "--on-flagged", "keep")
    done = runs.command("rescore", out, *checks)
    assert done.code == 3 and "2 failed" in done.stdout
    assert [row["status"] for row in runs.results(out)][:2] == ["failed", "failed"]
    assert runs.run(path, out, *checks).code == 0
    assert "failed" not in {row["status"] for row in runs.results(out)}
    runs.assert_whole(out)


def test_a_service_outage_keeps_rescored_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, path = tmp_path / "out", table(tmp_path, CROSSES)
    assert runs.run(path, out, "--safety", "none").code == 0
    before = runs.results(out)
    with serving(faults=lambda request: status(500)) as service:
        use(monkeypatch, service)
        assert runs.command("rescore", out, "--safety", "azure").code == 75
    assert runs.results(out) == before
    with serving() as service:
        use(monkeypatch, service)
        assert runs.command("rescore", out, "--safety", "azure").code == 0
    assert {row["safety_checker"] for row in runs.results(out)} == {"azure_content_safety"}


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table and an OUT whose images were not checked. Copy it."""
    folder = tmp_path_factory.mktemp("unjudged")
    path = table(folder, [*CROSSES, *CROSSES])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CONTENT_SAFETY_KEY", raising=False)
        assert runs.run(path, folder / "out", *SHARP, "--safety", "none").code == 0
    return folder


METHODS = [(FolderSink, "back_up"), (FolderSink, "publish"), (Manifest, "commit"), (FolderSink, "remove")]


@pytest.mark.promises
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "method"), METHODS, ids=[method for _, method in METHODS])
@pytest.mark.parametrize("policy", ["blank", "blur", "quarantine", "drop", "keep"])
def test_a_killed_rescore_is_continued(
    unchecked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, owner: Any, method: str, after: bool
) -> None:
    """Kill it at any moment of its second batch. Until it finishes, other commands refuse OUT, and no image is lost."""
    folder = tmp_path / "folder"
    shutil.copytree(unchecked, folder)
    out, path = folder / "out", folder / "t.csv"
    checks = ("--safety", "checker", "--on-flagged", policy)
    monkeypatch.setattr("batch_infer.jobs.rescore.BATCH", 3)
    real, calls = getattr(owner, method), Counter[str]()

    def dying(self: Any, *arguments: Any) -> Any:
        calls[method] += 1
        if calls[method] != 2:
            return real(self, *arguments)
        if after:
            real(self, *arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, dying)
        try:
            runs.command("rescore", out, *checks)
        except Killed:
            assert "rescoring" in runs.run_json(out)
            for line in (("merge", out), ("run", path, "-o", out, *runs.QUICK, *SHARP, *checks)):
                refused = runs.command(*line)
                assert refused.code == 2 and f"rescore {out} --safety checker" in refused.stderr
            assert "rescoring" in runs.command("status", out).stdout
            (out / "images" / ".tmp-0123abcd-1-0123456789ab-t.png").write_bytes(b"of the process that was killed")
    done = runs.command("rescore", out, *checks, "--json")
    assert (done.code, json.loads(done.stdout)["failed"]) == (0, 0), done.stderr
    shutil.copytree(unchecked, tmp_path / "once")
    assert runs.command("rescore", tmp_path / "once" / "out", *checks).code == 0
    assert without_bookkeeping(out) == without_bookkeeping(tmp_path / "once" / "out")
    assert runs.images(out) == runs.images(tmp_path / "once" / "out")
    runs.assert_whole(out)


@pytest.mark.promises
@pytest.mark.parametrize("requests", [1, 3, 5])
@pytest.mark.parametrize("policy", ["blank", "blur", "quarantine", "drop"])
def test_a_rescore_whose_process_is_killed_is_continued(
    unchecked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, requests: int
) -> None:
    """SIGKILL while the process waits for the service's verdict on an image, in different batches."""
    shutil.copytree(unchecked, tmp_path / "folder")
    shutil.copytree(unchecked, tmp_path / "once")
    out, once = tmp_path / "folder" / "out", tmp_path / "once" / "out"
    checks = ("--safety", "azure", "--on-flagged", policy)
    started = Event()

    def hold(request: ReceivedRequest) -> Fault | None:
        if request.kind == "image" and len(service.images) >= requests:
            started.set()
            return Fault(hang=600.0)
        return None

    program = "import batch_infer.jobs.rescore as r; r.BATCH = 2; from batch_infer.__main__ import main; main()"
    with serving(classify=classify_red, faults=hold) as service:
        use(monkeypatch, service)
        line = [sys.executable, "-c", program, "rescore", str(out), *checks]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert runs.wait_for(process, started.is_set), process.communicate()[1]
            process.kill()
            process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert "rescoring" in runs.run_json(out)
    with serving(classify=classify_red) as service:
        use(monkeypatch, service)
        done = runs.command("rescore", out, *checks, "--json")
        assert done.code == 0, done.stderr
        assert json.loads(done.stdout)["failed"] == 0
        assert runs.command("rescore", once, *checks).code == 0
    assert without_bookkeeping(out) == without_bookkeeping(once)
    assert runs.images(out) == runs.images(once)
    runs.assert_whole(out)


DYING = """
import os, signal
import batch_infer.jobs.rescore as rescore
from batch_infer.__main__ import main
from batch_infer.manifest import Manifest
from batch_infer.sinks.folder import FolderSink

rescore.BATCH, owner, calls = 3, {owner}, []
real = owner.{method}

def dying(*arguments):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

owner.{method} = dying
main()
"""


@pytest.mark.promises
@pytest.mark.parametrize(("owner", "method"), METHODS, ids=[method for _, method in METHODS])
def test_a_rescore_whose_process_is_killed_during_a_commit_is_continued(
    unchecked: Path, tmp_path: Path, owner: Any, method: str
) -> None:
    shutil.copytree(unchecked, tmp_path / "folder")
    shutil.copytree(unchecked, tmp_path / "once")
    out, once = tmp_path / "folder" / "out", tmp_path / "once" / "out"
    checks = ("--safety", "checker", "--on-flagged", "blur")
    program = DYING.format(owner=owner.__name__, method=method)
    killed = subprocess.run([sys.executable, "-c", program, "rescore", str(out), *checks], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = runs.command("rescore", out, *checks, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["failed"] == 0
    assert runs.command("rescore", once, *checks).code == 0
    assert without_bookkeeping(out) == without_bookkeeping(once)
    runs.assert_whole(out)


@pytest.mark.promises
@pytest.mark.parametrize("policy", ["blur", "quarantine"])
def test_a_killed_rescore_can_be_undone(
    unchecked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """New files are published but not committed. Then the first checkers check the images again."""
    shutil.copytree(unchecked, tmp_path / "folder")
    out = tmp_path / "folder" / "out"
    first = ("--safety", "checker", "--on-flagged", "keep")
    assert runs.command("rescore", out, *first).code == 0
    before = runs.hashes(out)

    def commit(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Manifest, "commit", commit)
        runs.command("rescore", out, "--safety", "checker", "--on-flagged", policy)
    done = runs.command("rescore", out, *first, "--json")
    assert (done.code, json.loads(done.stdout)["failed"]) == (0, 0), done.stderr
    assert runs.hashes(out) == before
    runs.assert_whole(out)


def test_a_rescore_after_a_killed_run_is_counted(
    unchecked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second command is killed. `status` counts remaining results, and the third treats no new image as damaged."""
    shutil.copytree(unchecked, tmp_path / "folder")
    out, path = tmp_path / "folder" / "out", tmp_path / "folder" / "t.csv"
    with path.open("a", newline="") as stream:
        csv.writer(stream).writerows([[""], *([prompt] for prompt in CROSSES)])
    checks = ("--safety", "checker", "--on-flagged", "blank")

    def read_status() -> dict[str, Any]:
        status = json.loads(runs.command("status", out, "--json").stdout)
        counts = {name: count for name, count in status["counts"].items() if count}
        total = sum(counts.values()) + status["left"]
        return {"state": status["state"], "left": status["left"], **counts, "total": total}

    def dying(last_call: int) -> Callable[..., str]:
        calls = [last_call]

        def commit(self: Manifest, *arguments: Any) -> str:
            calls[0] -= 1
            if not calls[0]:
                raise Killed
            return real(self, *arguments)

        return commit

    real: Callable[..., str] = vars(Manifest)["commit"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("batch_infer.worker.committing.COMMIT_ROWS", 2)
        patch.setattr("batch_infer.worker.committing.COMMIT_SECONDS", 3600.0)
        patch.setattr(Manifest, "commit", dying(3))  # the invalid row is first
        runs.run(path, out, *SHARP, "--safety", "none", "--slots", "2")
    assert read_status() == {"state": "stopped", "left": 1, "ok": 8, "invalid": 1, "total": 10}
    monkeypatch.setattr("batch_infer.jobs.rescore.BATCH", 3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Manifest, "commit", dying(2))
        runs.command("rescore", out, *checks)
    status = read_status()
    assert (status["state"], status["left"], status["total"]) == ("rescoring", 1, 10)
    assert runs.command("rescore", out, *checks).code == 0
    status = read_status()
    assert (status["state"], status["left"], status["total"]) == ("stopped", 1, 10)
    assert status["flagged"] >= 1
    done = runs.run(path, out, *SHARP, *checks, "--json")
    assert json.loads(done.stdout)["rendered"] == 1, done.stderr
    assert "missing or damaged" not in done.stderr
    runs.assert_whole(out)


@pytest.mark.parametrize("policy", ["blank", "blur"])
def test_an_image_keeps_its_format_with_its_name(unchecked: Path, tmp_path: Path, policy: str) -> None:
    """The last run, which rendered one more row, may have had another --image-format."""
    shutil.copytree(unchecked, tmp_path / "folder")
    out, path = tmp_path / "folder" / "out", tmp_path / "folder" / "t.csv"
    with path.open("a", newline="") as stream:
        csv.writer(stream).writerow([CROSSES[0]])
    assert runs.run(path, out, *SHARP, "--safety", "none", "--image-format", "jpeg").code == 0
    assert {name.rpartition(".")[2] for name in runs.images(out)} == {"png", "jpg"}
    assert runs.command("rescore", out, "--safety", "checker", "--on-flagged", policy).code == 0
    flagged = [row["generated_image"] for row in runs.results(out) if row["status"] == "flagged"]
    assert {name.rpartition(".")[2] for name in flagged} == {"png", "jpg"}
    for name in runs.images(out):
        with Image.open(out / name) as image:
            assert image.format == ("PNG" if name.endswith(".png") else "JPEG")
    runs.assert_whole(out)


def test_images_with_more_text_than_pillow_allows_are_checked(tmp_path: Path) -> None:
    """An image that cannot be opened affects no other row and does not block OUT."""
    out, path = tmp_path / "out", table(tmp_path, CROSSES)
    assert runs.run(path, out, *SHARP, "--safety", "none").code == 0
    first, second, _ = runs.results(out)
    texts = PngInfo()
    for k in range(70):
        texts.add_text("parameters", f"{k}" * 2**20, zip=k % 2 == 0)
    with Image.open(out / first["generated_image"]) as image:
        image.save(out / first["generated_image"], pnginfo=texts)
    (out / second["generated_image"]).write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for part in (out / "manifest").glob("part-*"):
        with_files(part, out)
    done = runs.command("rescore", out, "--safety", "checker", "--on-flagged", "keep")
    assert done.code == 3 and "2 images checked: 1 flagged" in done.stdout, done.stderr
    cross, blue, red = runs.results(out)
    assert (cross["status"], blue["status"], red["status"]) == ("flagged", "failed", "ok")
    assert blue["error"].startswith("its image cannot be opened (")
    again = runs.run(path, out, *SHARP, "--safety", "checker", "--json")
    assert (again.code, json.loads(again.stdout)["rendered"]) == (0, 1), again.stderr


@pytest.mark.parametrize("column", ["id", "prompt"])
def test_a_damaged_part_does_not_block_a_rescore(unchecked: Path, tmp_path: Path, column: str) -> None:
    """The damage is in an indexed column or in another one. The part is set aside, and `run` renders its rows."""
    shutil.copytree(unchecked, tmp_path / "folder")
    out, checks = tmp_path / "folder" / "out", ("--safety", "checker", "--on-flagged", "keep")
    parts = sorted((out / "manifest").glob("part-*"))
    rows = pa.concat_tables([pq.read_table(part) for part in parts])
    half = len(rows) // 2
    for k, piece in enumerate((rows.slice(0, half), rows.slice(half))):
        pq.write_table(piece, out / "manifest" / f"part-{k}.parquet", write_page_checksum=True)
    for part in parts:
        part.unlink()
    damage(out / "manifest" / "part-0.parquet", column)
    done = runs.command("rescore", out, *checks, "--json")
    assert done.code == 0, done.stderr
    assert "part-0.parquet is damaged" in done.stderr
    report = json.loads(done.stdout)
    assert (report["judged"], report["counts"]["left"]) == (len(rows) - half, half)
    assert "rescoring" not in runs.run_json(out)


def damage(part: Path, column: str) -> None:
    """Overwrite the pages of a column."""
    file = pq.ParquetFile(part)
    chunk = file.metadata.row_group(0).column(file.schema_arrow.get_field_index(column))
    content = bytearray(part.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    end = start + chunk.total_compressed_size
    for place in range(end - 12, end - 4):
        content[place] ^= 255
    part.write_bytes(content)


def with_files(part: Path, out: Path) -> None:
    """Rewrite a part so that it describes the files as they are."""
    rows = pq.read_table(part)
    files = [(out / path).read_bytes() for path in rows["generated_image"].to_pylist()]
    for name, values in {
        "sha256": [hashlib.sha256(file).hexdigest() for file in files],
        "image_bytes": [len(file) for file in files],
    }.items():
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, rows.schema.field(name), [values])
    pq.write_table(rows, part)


def test_a_second_rescore_sees_the_results_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that the first one blanked while the second loaded its checker are not treated as originals."""
    out, path = tmp_path / "out", table(tmp_path, CROSSES)
    assert runs.run(path, out, *SHARP, "--safety", "checker", "--on-flagged", "keep").code == 0
    real: Callable[[Any], Any] = vars(rescore)["find_model"]
    done: list[int] = []

    def find_model(settings: Any) -> Any:
        if not done:
            done.append(True)
            assert runs.command("rescore", out, "--safety", "checker", "--on-flagged", "blank").code == 0
        return real(settings)

    monkeypatch.setattr(rescore, "find_model", find_model)
    with serving() as service:
        use(monkeypatch, service)
        assert runs.command("rescore", out, "--safety", "azure", "--on-flagged", "keep").code == 0
    assert runs.results(out)[0]["status"] == "flagged"


def test_rescore_refuses_fewer_tables_than_in_the_run(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("a ring\n")
    two.write_text("a star\n")
    out = tmp_path / "out"
    assert runs.command("run", one, two, "-o", out, *runs.QUICK, "--safety", "none").code == 0
    done = runs.command("rescore", out, one, "--safety", "checker")
    assert done.code == 2 and "name all" in done.stderr
    assert len(runs.results(out)) == 2


def test_a_run_with_other_checkers_is_pointed_to_rescore(tmp_path: Path) -> None:
    path = table(tmp_path, CROSSES)
    assert runs.run(path, tmp_path / "out", "--safety", "none").code == 0
    done = runs.run(path, tmp_path / "out", "--safety", "checker")
    assert done.code == 2 and "`batch-infer rescore`" in done.stderr
    for options in (("--safety", "none"), ()):
        assert runs.command("rescore", tmp_path / "out", *options).code == 2
