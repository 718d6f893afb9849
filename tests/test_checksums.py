"""manifest/SHA256SUMS and its digest in run.json cover all results and images, and can be signed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_infer.jobs import checksums
from batch_infer.jobs.checksums import check_checksums, read_checksums, write_checksums
from batch_infer.manifest import Manifest
from batch_infer.records import ResultRow, utc_now
from batch_infer.store import LocalStore
from tests.runs import CommandResult, command, run, run_json
from tests.tables import write_csv

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data" / "earlier_version"
NONE = pa.schema([])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    table = write_csv(folder / "t.csv", [["id", "prompt"], ["a", "a red circle"], ["b", "a blue square"]])
    assert run(table, folder / "out", "--results", "csv").code == 0
    return folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """The files of a private and a public key."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private, public = tmp_path / "key.pem", tmp_path / "pub.pem"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def verify(out: Path, *options: str | Path) -> CommandResult:
    return command("verify", out, "--json", *options)


def counts(out: Path, *options: str | Path) -> dict[str, int]:
    return dict(json.loads(verify(out, *options).stdout)["counts"])


def is_root(out: Path) -> bool:
    """Check the root digest, as docs/verify.md does."""
    section = (ROOT / "docs" / "verify.md").read_text("utf-8").partition("## SHA256SUMS and the root digest")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    assert 8 <= len(code.strip().splitlines()) <= 12
    digest = json.loads((out / "run.json").read_text())["root_digest"]
    with mock.patch("sys.argv", ["check.py", str(out), digest]):
        try:
            exec(compile(code, "check.py", "exec"), {})
        except SystemExit as end:
            return not end.code
    return True


def commit(out: Path, name: str, run: int = 1) -> str:
    row = ResultRow(
        id=name, image_index=0, prompt="x", status="failed", finished_at=utc_now(), source_file="t.csv",
        source_row=0, fingerprint="f",
    )  # fmt: skip
    return f"manifest/{Manifest(out, run).commit([row], NONE)}"


@pytest.mark.parametrize("step", ["run", "merge", "retry", "rescore"])
def test_every_merge_updates_the_root_digest(out: Path, step: str) -> None:
    steps = {
        "merge": ("merge", out, "--results", "jsonl"),
        "retry": ("retry", out, "--status", "missing"),
        "rescore": ("rescore", out, "--safety", "checker", "--on-flagged", "keep"),
    }
    before = run_json(out)["root_digest"]
    if step == "retry":
        next((out / "images").glob("*/a-0.png")).unlink()
    if step != "run":
        assert command(*steps[step]).code == 0
        assert (run_json(out)["root_digest"] != before) == (step != "rescore"), "no flag changes"
    content = (out / "manifest" / "SHA256SUMS").read_bytes()
    assert run_json(out)["root_digest"] == hashlib.sha256(content).hexdigest()
    lines = content.decode().splitlines()
    names = [line.partition("  ")[2] for line in lines]
    parts = [part.path for part in Manifest(out).parts()]
    formats = ["metadata.parquet", "results.csv", *(["results.jsonl"] if step == "merge" else []), "results.parquet"]
    assert names == sorted([*parts, *formats])
    for line in lines:
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert is_root(out)
    assert counts(out) == {}


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_checks_the_file(out: Path) -> None:
    line = ["sha256sum", "--check", "--strict", "--quiet", "manifest/SHA256SUMS"]
    assert subprocess.run(line, cwd=out, check=False).returncode == 0
    with (out / "results.csv").open("a") as stream:
        stream.write("x")
    done = subprocess.run(line, cwd=out, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "results.csv: FAILED\n")


def test_a_changed_list_does_not_match_the_root(out: Path) -> None:
    path = out / "manifest" / "SHA256SUMS"
    path.write_bytes(path.read_bytes().replace(b"results.csv", b"results.CSV"))
    assert not is_root(out)
    problems = {p["path"] for p in json.loads(verify(out).stdout)["problems"]}
    assert problems == {"manifest/SHA256SUMS", "results.csv"}
    path.write_text(f"{'0' * 64}  ../../etc/passwd\n{'0' * 64}  manifest/../run.json\n")
    assert read_checksums(LocalStore(out)) == {}, "it names no file outside OUT"
    path.unlink()
    assert counts(out) == {"damaged_part": 1}


def test_a_part_keeps_its_digest(tmp_path: Path) -> None:
    """Hashing it again would accept damage."""
    store = LocalStore(tmp_path)
    first = commit(tmp_path, "a")
    write_checksums(store, {"results.parquet": "0" * 64})
    digest = read_checksums(store)[first]
    with (tmp_path / first).open("ab") as stream:
        stream.write(b"x")
    second = commit(tmp_path, "b", run=2)
    root = write_checksums(store, {})
    listed = read_checksums(store)
    assert listed == {first: digest, second: hashlib.sha256((tmp_path / second).read_bytes()).hexdigest()}
    assert root == hashlib.sha256((tmp_path / checksums.CHECKSUMS).read_bytes()).hexdigest()
    (tmp_path / first).unlink()
    write_checksums(store, {})
    assert list(read_checksums(store)) == [second]


def test_a_part_without_a_run_number_is_hashed_again(tmp_path: Path) -> None:
    """An endpoint may render its rows again after damage, and then a part with the same name differs."""
    store, name = LocalStore(tmp_path), commit(tmp_path, "a", run=0)
    write_checksums(store, {})
    commit(tmp_path, "a", run=0)
    write_checksums(store, {})
    assert read_checksums(store)[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def record(root: str | None, tables: list[str], **entries: Any) -> dict[str, Any]:
    return {"settings": {"table": {"tables": tables}}, **({"root_digest": root} if root else {}), **entries}


def test_other_parts_are_problems_only_after_a_run_ended(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first, second = commit(tmp_path, "a"), commit(tmp_path, "b")
    root = write_checksums(store, {})
    assert check_checksums(store, record(root, ["t.csv"])).is_proof
    third = commit(tmp_path, "c", run=2)
    assert check_checksums(store, record(root, ["t.csv"])).problems == [(third, "manifest/SHA256SUMS does not list it")]
    assert check_checksums(store, record(root, [])).problems == [], "an endpoint adds parts"
    assert check_checksums(store, record(root, ["t.csv"], has_strays=True)).problems == []
    (tmp_path / first).unlink()
    with (tmp_path / second).open("ab") as stream:
        stream.write(b"x")
    write(tmp_path / "results.parquet", b"x")
    write_checksums(store, {"results.parquet": "0" * 64})
    ((path, reason),) = check_checksums(store, record(None, ["t.csv"])).problems
    assert (path, "its SHA-256 is" in reason) == (second, True)


def test_an_earlier_version_left_no_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "earlier"
    shutil.copytree(DATA, folder)
    monkeypatch.chdir(folder)
    for path in folder.glob("*/run.json"):
        run_json, out = path.read_text().replace("FOLDER", str(folder)), path.parent
        path.write_text(run_json)
        if out.name == "rescoring":
            assert "is unfinished" in verify(out).stderr
            continue
        problems = json.loads(verify(out).stdout)["problems"]
        expected = [] if out.name == "endpoint" else ["results.parquet"]  # which the test data lacks
        assert [problem["path"] for problem in problems] == expected
        assert command("merge", out).code == 0
        (out / checksums.CHECKSUMS).unlink()
        pq.write_table(pq.read_table(out / "results.parquet").drop_columns(["pixels_sha256"]), out / "results.parquet")
        path.write_text(run_json)
        done = verify(out)
        assert (done.code, json.loads(done.stdout)["counts"]) == (0, {}), done.stdout
        assert json.loads(done.stdout)["rows"] > 0


def test_a_signature(out: Path, finished: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    assert json.loads(verify(out, "--public-key", public).stdout)["problems"][0]["path"] == "manifest/SHA256SUMS.sig"
    assert command("merge", out, "--sign-key", private).code == 0
    signature = out / "manifest" / "SHA256SUMS.sig"
    assert len(signature.read_bytes()) == 64
    assert ", signed with this key\n" in command("verify", out, "--public-key", public).stdout
    assert "signed" not in command("verify", out).stdout
    assert str(private) not in (out / "run.json").read_text()
    signature.write_bytes(bytes(64))
    assert counts(out, "--public-key", public) == {"damaged_part": 1}
    done = command("merge", out)
    assert done.code == 0
    assert not signature.exists(), "it would be that of another file"
    assert "SHA256SUMS.sig, because results.* were written without --sign-key" in done.stderr
    signed = run(finished / "t.csv", tmp_path / "signed", "--sign-key", private)
    assert signed.code == 0
    assert verify(tmp_path / "signed", "--public-key", public).code == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("edit", [{"root_digest": None}, {"has_strays": True}], ids=str)
def test_an_edited_run_json_does_not_weaken_the_signature(
    out: Path, keys: tuple[Path, Path], edit: dict[str, Any]
) -> None:
    """run.json is not signed, so anyone who adds a part can edit it too."""
    private, public = keys
    assert command("merge", out, "--sign-key", private).code == 0
    assert verify(out, "--public-key", public).code == 0
    forged = ResultRow(
        id="a",
        image_index=0,
        prompt="a red circle",
        status="blocked",
        attempt=9,
        finished_at=utc_now(),
        source_file="t.csv",
        source_row=0,
        fingerprint="f",
    )
    part = Manifest(out, 1).commit([forged], NONE)
    record = {**run_json(out), **edit}
    (out / "run.json").write_text(json.dumps({name: value for name, value in record.items() if value is not None}))
    faults = [problem["path"] for problem in json.loads(verify(out, "--public-key", public).stdout)["problems"]]
    assert f"manifest/{part}" in faults


def test_the_key_may_disappear_during_a_run(out: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    write = checksums.write_checksums

    def remove_key_and_write(*arguments: Any) -> str:
        private.unlink()
        return write(*arguments)

    with mock.patch("batch_infer.jobs.merge.write_checksums", remove_key_and_write):
        assert command("merge", out, "--sign-key", private).code == 0
    assert verify(out, "--public-key", public).code == 0


def test_openssl_makes_keys_and_checks_signatures(out: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    private, public = tmp_path / "key.pem", tmp_path / "pub.pem"
    commands = (
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(private)],
        ["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)],
        ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin", "-in", "manifest/SHA256SUMS",
         "-sigfile", "manifest/SHA256SUMS.sig"],
    )  # fmt: skip
    for line in commands[:2]:
        subprocess.run(line, check=True, capture_output=True)
    assert command("merge", out, "--sign-key", private).code == 0
    done = subprocess.run(commands[2], cwd=out, capture_output=True, text=True, check=False)
    if "not supported" in done.stderr or "Unknown option" in done.stderr:
        pytest.skip("this openssl cannot check Ed25519 signatures")
    assert done.returncode == 0, done.stderr
    encrypted = tmp_path / "encrypted.pem"
    line = ["openssl", "pkey", "-in", str(private), "-aes256", "-passout", "pass:x", "-out", str(encrypted)]
    subprocess.run(line, check=True, capture_output=True)
    refused = command("merge", out, "--sign-key", encrypted)
    assert (refused.code, "is encrypted" in refused.stderr) == (2, True)


def test_an_unusable_key_is_refused_before_anything_is_rendered(
    finished: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    other = generate_private_key(SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    wrong = tmp_path / "wrong.pem"
    wrong.write_bytes(other.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    (tmp_path / "text.pem").write_text("no key")
    messages = {
        tmp_path / "none.pem": "No such file",
        tmp_path / "text.pem": "is not a private key in PEM format",
        keys[1]: "is not a private key in PEM format",
        wrong: "is not an Ed25519 key",
    }
    for path, message in messages.items():
        done = run(finished / "t.csv", tmp_path / "out", "--sign-key", path)
        assert (done.code, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()
    assert command("verify", finished / "out", "--public-key", keys[0]).code == 2


def test_without_the_library_the_message_names_the_extra(
    finished: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    with mock.patch.dict("sys.modules", {"cryptography": None, "cryptography.exceptions": None}):
        done = run(finished / "t.csv", tmp_path / "out", "--sign-key", keys[0])
        assert done.code == 2
        assert "pip install cryptography" in done.stderr


def test_images_are_covered(out: Path) -> None:
    """Parts name the digest of each image."""
    (part,) = (out / "manifest").glob("part-*")
    for row in pq.read_table(part).to_pylist():
        assert hashlib.sha256((out / row["generated_image"]).read_bytes()).hexdigest() == row["sha256"]


def test_a_kill_while_results_are_replaced_leaves_no_wrong_digest(
    out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("batch_infer.jobs.merge.write_checksums", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command("merge", out, "--results", "jsonl")
    assert "root_digest" not in run_json(out)
    assert counts(out) == {}
    assert command("merge", out, "--results", "jsonl").code == 0
    assert is_root(out)
    assert counts(out) == {}
