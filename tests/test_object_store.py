"""Test stores of objects with a real S3 server and, where it is installed, Azure's storage emulator."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from batch_infer.errors import LockedError, SettingsError, StoppedError, StorageError
from batch_infer.store import Store, StoreAddress, open_store
from batch_infer.store.objects import ObjectStore, downloads, s3, spool
from batch_infer.store.objects import files as object_files
from batch_infer.store.objects.lease import Lease
from tests.object_servers import AzureContainer, Bucket, ObjectServer, serve_objects

ODD_NAMES = ["a b", "~x", "a+b", "é", "名前", "a%20b", "[a]*", "x=1&y", "'q'", "a,b;c"]
IMAGE, OTHER_IMAGE = "images/t-00000/a-0.png", "images/t-00001/b-0.png"
LEASE = ".lease"


@pytest.fixture(scope="module", params=["s3", "azure"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with serve_objects(request.param, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def bucket(server: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    """An empty bucket, whose server this process finds. Spools are in a folder of the test."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "spool").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "spool"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return server.make_bucket()


@pytest.fixture
def store(bucket: Bucket) -> ObjectStore:
    return ObjectStore(StoreAddress(f"{bucket.url}/deep/out"))


def put(store: Store, name: str, content: bytes = b"x") -> None:
    with store.write(name) as path:
        path.write_bytes(content)


def make_folder_object(bucket: Bucket, name: str) -> None:
    """Create the empty object by which the console of S3, or blobfuse, shows a folder."""
    if isinstance(bucket, AzureContainer):
        bucket.client.upload_blob(name, b"", metadata={"hdi_isfolder": "true"})
    else:
        bucket.write(f"{name}/", b"")


def publish(store: Store, name: str, content: bytes) -> None:
    store.stage(name, content)
    store.publish([name])


# Files


def test_files_are_objects_below_out(store: ObjectStore, bucket: Bucket) -> None:
    put(store, "run.json", b"{}")
    put(store, "manifest/part-1.parquet", b"part")
    bucket.write("deep/outside.txt", b"")
    bucket.write("deep/out-2/run.json", b"")
    assert bucket.read("deep/out/manifest/part-1.parquet") == b"part"
    assert (store.read("run.json"), store.read("missing"), store.read("manifest")) == (b"{}", None, None)
    assert [store.exists(name) for name in ("", "run.json", "manifest", "manifest/part", "missing")] == [
        *(True, True, True, False, False)
    ]
    assert store.list_folder("") == ["manifest", "run.json"]
    assert (store.list_folder("manifest"), store.list_folder("missing"), store.list_folder("run.json")) == (
        *(["part-1.parquet"], [], []),
    )
    assert store.locate("run.json") == f"{bucket.url}/deep/out/run.json"
    assert open_store(f"{bucket.url}/deep/out/").location == store.location
    assert open_store(store.address).read("run.json") == b"{}"


def test_find_yields_files_at_any_depth(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_files, "LISTINGS_AHEAD", 2)
    names = ["run.json", "images/a", *(f"images/t-0000{k}/{name}" for k in range(4) for name in "ab"), "images/x/y/z/a"]
    for name in names:
        put(store, name)
    expected = sorted(name for name in names if name.startswith("images") and name.endswith("a"))
    assert sorted(store.find(["images", "missing"], lambda name: name == "a")) == expected
    assert list(store.find([""], lambda name: True)) == ["run.json"]


def test_odd_names(store: ObjectStore) -> None:
    names = sorted(f"images/{name}/{name}.png" for name in ODD_NAMES)
    for name in names:
        publish(store, name, name.encode())
    assert sorted(store.find(["images"], lambda name: True)) == names
    assert store.list_folder("images") == sorted(ODD_NAMES)
    assert [store.read_image(name) for name in names] == [name.encode() for name in names]
    store.rename(names[0], f"{names[0]} 2")
    assert store.read(f"{names[0]} 2") == names[0].encode()
    store.remove([f"{names[0]} 2", *names])
    assert store.list_folder("images") == []


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_names_with_marks_of_urls(store: ObjectStore) -> None:
    """No file in OUT has such a name, and adlfs and gcsfs cannot read them."""
    for name in ("images/a#b.png", "images/a?b.png"):
        publish(store, name, name.encode())
        assert store.read_image(name) == name.encode()


def test_out_may_be_a_whole_bucket(bucket: Bucket) -> None:
    store = ObjectStore(StoreAddress(bucket.url))
    with store.locked() as locked:
        publish(locked, IMAGE, b"1")
        assert (locked.exists(""), locked.list_folder("")) == (True, [LEASE, "images"])
        assert list(locked.find(["images"], lambda name: True)) == [IMAGE]
        locked.check()
    assert bucket.names() == [LEASE, IMAGE]
    store.remove_folder("images", lambda: False)
    assert bucket.names() == [LEASE]


def test_remove_ignores_missing_files_and_edited_names(store: ObjectStore, bucket: Bucket) -> None:
    """Names of images come from manifest parts, which anyone may have edited."""
    bucket.write("precious", b"")
    bucket.write("deep/out/images/a", b"")
    edited = ["../../precious", "images/../../../precious", "/precious", "images//a", "", ".", "images/\0"]
    store.remove(["missing", "images/missing", *edited])
    assert bucket.names() == ["deep/out/images/a", "precious"]
    assert [store.has_image(name) for name in edited] == [False] * len(edited)
    assert [store.read_image(name) for name in edited] == [None] * len(edited)


def test_remove_folder(store: ObjectStore, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_files, "BATCH", 2)
    names = [f"images/{folder}/{number}" for folder in "abc" for number in range(5)]
    for name in (*names, "images-2/x", "run.json"):
        bucket.write(f"deep/out/{name}", b"")
    make_folder_object(bucket, "deep/out/images")
    calls = iter([False] * 3 + [True])
    with pytest.raises(StoppedError, match="deep/out/images; run again"):
        store.remove_folder("images", lambda: next(calls))
    assert 0 < len(list(store.find(["images"], lambda name: True))) < len(names)
    store.remove_folder("images", lambda: False)
    store.remove_folder("run.json", lambda: False)
    store.remove_folder("missing", lambda: False)
    assert bucket.names() == ["deep/out/images-2/x"]


def test_tables_in_out(store: ObjectStore, bucket: Bucket) -> None:
    assert store.contains(f"{store.location}/images/t.csv", ["images", "logs"])
    assert store.contains(f"{store.location}/results.csv", ["results.csv"])
    other_protocol = "s3a" if store.location.startswith("s3") else "az"
    path = store.location.partition("://")[2]
    assert store.contains(f"{other_protocol}://{path}/images/t.csv", ["images"])
    assert store.contains(f"{other_protocol.upper()}://{path}/images/t.csv?versionId=1", ["images"])
    assert store.contains(f"simplecache::{store.location}/images/t.csv", ["images"])
    assert store.contains(f"zip://t.csv::simplecache::{store.location}/images/t.zip", ["images"])
    assert not store.contains(f"zip://images/t.csv::{store.location}/t.zip", ["images"])
    for table in (
        f"{store.location}/images-2/t.csv",
        f"{bucket.url}/images/t.csv",
        "images/t.csv",
        "http://x/images/t",
    ):
        assert not store.contains(table, ["images"])


@pytest.mark.parametrize("server", ["azure"], indirect=True)
def test_tables_in_out_by_the_name_of_the_account(store: ObjectStore) -> None:
    container, _, path = store.location.removeprefix("abfs://").partition("/")
    url = f"abfss://{container}@tester.dfs.core.windows.net/{path}"
    assert store.contains(f"{url}/images/t.csv", ["images"])
    assert not store.contains(f"{url}-2/images/t.csv", ["images"])


# Parts


def test_parts_are_downloaded_once_and_in_advance(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []
    real_download = store._cache._download

    def download(name: str, path: Path) -> None:
        downloads.append(name)
        real_download(name, path)

    monkeypatch.setattr(store._cache, "_download", download)
    monkeypatch.setattr(object_files, "DOWNLOADS_AHEAD", 3)
    names = [f"manifest/part-{number}" for number in range(9)]
    for name in names:
        put(store, name, name.encode())
    assert downloads == []
    for index, name in enumerate(store.prefetch(iter(names))):
        with store.open_file(name) as file:
            assert file.read() == name.encode()
            assert file.size() == len(name)
        assert set(downloads) <= set(names[: index + 4])
    with store.open_file(names[0]):
        pass
    assert sorted(downloads) == names
    store.remove([names[0]])
    with pytest.raises(FileNotFoundError) as error, store.open_file(names[0]):
        pass
    assert (error.value.errno, error.value.filename) == (2, store.locate(names[0]))
    assert list(store.prefetch(["manifest/missing"])) == ["manifest/missing"]


def test_the_cache_of_parts_is_bounded(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "CACHED_BYTES", 250)
    names = [f"part-{number}" for number in range(5)]
    for name in names:
        put(store, name, name.encode() * 20)
    with ExitStack() as stack:
        files = [stack.enter_context(store.open_file(name)) for name in names]
        assert sum(path.stat().st_size for path in (store.spool.folder / "parts").iterdir()) <= 250
        assert [file.read() for file in files] == [name.encode() * 20 for name in names]
    for name in names:
        with store.open_file(name) as file:
            assert file.read() == name.encode() * 20


def test_a_part_that_vanishes_from_the_cache_is_downloaded_again(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that cleans TMPDIR removes it, or the whole folder."""
    put(store, "part", b"part")
    parts = store.spool.folder / "parts"
    for _ in range(2):
        with store.open_file("part") as file:
            assert file.read() == b"part"
        for path in parts.iterdir():
            path.unlink()
    with store.open_file("part"):
        pass
    assert store._cache._bytes == 4
    store._cache.discard("part")
    assert (store._cache._bytes, list(parts.iterdir())) == (0, [])
    real_mkdir = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, *a, **k: real_mkdir(path, *a, **k) if path != parts else None)
    shutil.rmtree(store.spool.folder)
    with pytest.raises(StorageError, match="cannot read .*/part: .* is missing; set TMPDIR"), store.open_file("part"):
        pass


def test_a_part_that_is_discarded_during_its_download_is_not_kept(store: ObjectStore) -> None:
    put(store, "part", b"old")
    real_download = store._cache._download
    begun, discarded = threading.Event(), threading.Event()

    def download(name: str, path: Path) -> None:
        real_download(name, path)
        begun.set()
        assert discarded.wait(60)

    store._cache._download = download
    old = store._cache.request("part")
    assert begun.wait(60)
    put(store, "part", b"newer")
    discarded.set()
    with store.open_file("part") as file:
        assert file.read() == b"newer"
    old.download.result()
    assert store._cache._bytes == 5
    assert [path.read_bytes() for path in old.path.parent.iterdir()] == [b"newer"]


def test_a_damaged_connection_is_not_a_missing_part(
    store: ObjectStore, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that cannot be read for now must not be set aside."""
    put(store, "part")
    fail_fast(store, monkeypatch)
    server.stop()
    try:
        with pytest.raises(StorageError, match="cannot read .*deep/out/part: "), store.open_file("part"):
            pass
    finally:
        server.start()
    with store.open_file("part") as file:
        assert file.read() == b"x"


# Images


def test_images_appear_when_they_are_published(store: ObjectStore, bucket: Bucket) -> None:
    publish(store, IMAGE, b"first")
    store.stage(IMAGE, b"second")
    store.stage(OTHER_IMAGE, b"other")
    assert bucket.names() == [f"deep/out/{IMAGE}"]
    assert (store.read_image(IMAGE), store.read_image(IMAGE, 5), store.read_image(IMAGE, 4)) == (
        b"first",
        b"first",
        None,
    )
    store.publish([IMAGE, OTHER_IMAGE])
    assert (store.read_image(IMAGE), store.read_image(OTHER_IMAGE)) == (b"second", b"other")
    assert [store.has_image(name) for name in (IMAGE, "images/t-00000", "images/x")] == [True, False, False]
    assert not list((store.spool.folder / "staged").rglob("*.png")), "published images leave the spool"
    with pytest.raises(StorageError, match=IMAGE):
        store.publish([IMAGE])


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_a_backup_needs_few_requests(store: ObjectStore) -> None:
    """`docs/object-stores.md` lists them."""
    publish(store, IMAGE, b"old")
    requests: list[str] = []
    store.system.s3.meta.events.register("before-call.s3", lambda model, **_: requests.append(model.name))
    store.back_up({IMAGE: "images/backup"})
    store.remove(["images/backup"])
    assert requests == ["HeadObject", "ListObjectsV2", "CopyObject", "DeleteObject"]


def test_a_file_that_vanishes_from_the_spool_is_named(store: ObjectStore) -> None:
    """A program that cleans TMPDIR has removed it. That does not mean that the bucket is missing."""
    store.stage(IMAGE, b"x")
    store.spool.staged_path(IMAGE).unlink()
    with pytest.raises(StorageError, match=f"cannot write .*{IMAGE}: .*is missing; set TMPDIR") as error:
        store.publish([IMAGE])
    assert not isinstance(error.value, SettingsError)
    with pytest.raises(StorageError, match="is missing; set TMPDIR"), store.write("run.json") as path:
        path.write_bytes(b"x")
        path.unlink()


def test_many_images_are_published_concurrently(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(8)
    real_put = store.put

    def put_together(path: Path, name: str) -> None:
        barrier.wait(60)
        real_put(path, name)

    monkeypatch.setattr(store, "put", put_together)
    names = [f"images/{number}.png" for number in range(40)]
    for name in names:
        store.stage(name, hashlib.sha256(name.encode()).digest())
    store.publish(names)
    assert all(store.read_image(name) == hashlib.sha256(name.encode()).digest() for name in names)


# The lock


def test_a_locked_out_is_refused(store: ObjectStore, bucket: Bucket) -> None:
    assert store.find_holder() is None
    with store.locked() as locked:
        holder = store.find_holder() or ""
        assert f"process {os.getpid()}, since " in holder
        with pytest.raises(LockedError) as error, open_store(store.location).locked():
            pass
        assert str(error.value).startswith(f"{store.location} is locked by another command ({holder}); run again when ")
        locked.check()
        worker = open_store(locked.address)
        worker.check()
        assert (worker.address, store.address.marker) == (locked.address, None)
        store.check()
    assert bucket.names() == [f"deep/out/{LEASE}"]
    assert store.find_holder() is None
    with store.locked() as locked:
        locked.check()


def test_one_of_several_runs_gets_the_lock(store: ObjectStore) -> None:
    assert run_together(store, 8) == 1


def test_one_of_several_runs_takes_over_the_lease_of_a_crashed_run(store: ObjectStore) -> None:
    """A crashed run no longer renews its lease."""
    Lease(store._lease, seconds=1).acquire()
    while store.find_holder() is not None:
        pass
    assert run_together(store, 8) == 1


def run_together(store: ObjectStore, count: int) -> int:
    """Lock OUT in several threads at once, and return in how many that succeeds."""
    begin, end = threading.Barrier(count), threading.Barrier(count)

    def run(_: int) -> bool:
        other = ObjectStore(store.address)
        begin.wait(60)
        with ExitStack() as stack:
            try:
                stack.enter_context(other.locked()).check()
            except LockedError:
                return False
            finally:
                end.wait(60)
            return True

    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(run, range(count)))


def test_a_run_notices_that_another_has_taken_over(store: ObjectStore, bucket: Bucket) -> None:
    with store.locked() as locked:
        worker = ObjectStore(locked.address)
        bucket.remove(f"deep/out/{LEASE}")
        with store.locked() as other:
            assert isinstance(locked._lock, Lease)
            locked._lock.renew()
            for loser in (locked, worker):
                with pytest.raises(StorageError, match="another run has taken over .*deep/out"):
                    loser.check()
            other.check()
        with pytest.raises(StorageError, match="taken over"):
            locked.check()


CHANGES: dict[str, Callable[[Store], object]] = {
    "write": lambda store: put(store, "run.json", b"new"),
    "create": lambda store: store.create("new", b""),
    "rename": lambda store: store.rename("run.json", "new"),
    "remove": lambda store: store.remove(["run.json"]),
    "remove_folder": lambda store: store.remove_folder("images", lambda: False),
    "publish": lambda store: publish(store, IMAGE, b"new"),
    "back_up": lambda store: store.back_up({IMAGE: "images/backup"}),
    "write_private": lambda store: store.write_private("new", b""),
}


@pytest.mark.parametrize("is_worker", [False, True])
def test_a_run_that_has_lost_the_lock_changes_nothing(store: ObjectStore, bucket: Bucket, is_worker: bool) -> None:
    """A run is suspended for two minutes, for example while it clears OUT. Another run takes over."""
    with store.locked() as locked:
        loser: Store = ObjectStore(locked.address) if is_worker else locked
        put(locked, "run.json", b"old")
        publish(locked, IMAGE, b"old")
        assert isinstance(locked._lock, Lease)
        locked._lock._renewed_at -= 120
        bucket.remove(f"deep/out/{LEASE}")
        with store.locked():
            before = read_all(bucket)
            for name, change in CHANGES.items():
                with pytest.raises(StorageError, match="another run has taken over .*deep/out"):
                    change(loser)
                    pytest.fail(name)
            assert read_all(bucket) == before
    for name, change in CHANGES.items():
        with pytest.raises(StorageError, match="its lease was released"):
            change(loser)
            pytest.fail(name)
    assert read_all(bucket) == before


def read_all(bucket: Bucket) -> dict[str, bytes]:
    """Return all objects except the lease."""
    return {name: bucket.read(name) for name in bucket.names() if not name.endswith(LEASE)}


def test_publishing_stops_when_another_run_takes_over(
    store: ObjectStore, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only puts that have begun are not stopped."""
    names = [f"images/{number}.png" for number in range(60)]
    begun: list[str] = []
    with store.locked() as locked:
        for name in names:
            locked.stage(name, b"")
        lease = locked._lock
        assert isinstance(lease, Lease)
        real_put = locked.put_unchecked
        all_begin = threading.Barrier(object_files.THREADS)

        def put_unchecked(path: Path, name: str) -> None:
            begun.append(name)
            all_begin.wait(60)
            lease._is_lost = True
            real_put(path, name)

        monkeypatch.setattr(locked, "put_unchecked", put_unchecked)
        with pytest.raises(StorageError, match="another run has taken over"):
            locked.publish(names)
    assert sorted(read_all(bucket)) == sorted(f"deep/out/{name}" for name in begun)
    assert len(begun) == object_files.THREADS


def test_the_clock_of_the_service(store: ObjectStore) -> None:
    assert not store.keeps_file_owners
    before = store.now()
    store.write_private("cache.json", b"{}")
    file = store.read_private("cache.json")
    assert file is not None
    assert (file.content, file.is_trusted) == (b"{}", False)
    assert int(before) <= file.written_at <= store.now()
    assert store.read_private("missing") is None


# Logs

KILLED = """
import os, signal, sys
from batch_infer.store import open_store
with open_store(sys.argv[1]).open_log("logs/worker-1.log") as file:
    os.write(file.fileno(), b"last words")
    print("ready", flush=True)
    signal.pause()
"""


def test_a_log_is_an_object_of_its_own(store: ObjectStore, bucket: Bucket) -> None:
    for number in range(2):
        with pytest.raises(ZeroDivisionError), store.open_log("logs/run.log") as file:
            file.write(f"run {number}\n")
            file.flush()
            raise ZeroDivisionError("odd")
    names = bucket.names()
    assert len(names) == 2
    for number, name in enumerate(names):
        assert name.startswith("deep/out/logs/run-")
        assert name.endswith(f"-{os.getpid()}.log")
        lines = bucket.read(name).decode().splitlines()
        assert (lines[0], lines[-1]) == (f"run {number}", "ZeroDivisionError: odd")
    assert not list(spool.list_logs(store.spool.folder))


def test_a_log_is_uploaded_while_it_grows(store: ObjectStore, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "UPLOAD_SECONDS", 0.01)
    with store.open_log("logs/run.log") as file:
        for text in ("began", "went on"):
            file.write(text)
            file.flush()
            while not (names := bucket.names()) or text not in bucket.read(names[0]).decode():
                pass


@pytest.mark.skipif(os.name != "posix", reason="dead processes are recognised on POSIX only")
def test_the_log_of_a_killed_process_is_uploaded_by_another(store: ObjectStore, bucket: Bucket) -> None:
    for location in (store.location, f"{bucket.url}/elsewhere"):
        line = [sys.executable, "-c", KILLED, location]
        with subprocess.Popen(line, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as process:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGKILL)
    with store.open_log("logs/run.log"):
        (name,) = bucket.names()
        assert name.startswith("deep/out/logs/worker-1-")
        assert bucket.read(name) == b"last words"
    folders = [folder for folder in Path(tempfile.gettempdir()).iterdir() if folder != store.spool.folder]
    assert [spool._read_out(folder) for folder in folders] == [f"{bucket.url}/elsewhere"], "its log is kept"
    with open_store(f"{bucket.url}/elsewhere").locked():
        assert len([name for name in bucket.names() if name.startswith("elsewhere/logs/")]) == 1


def test_an_unreachable_service_masks_no_error(
    store: ObjectStore, server: ObjectServer, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_fast(store, monkeypatch)
    try:
        with pytest.raises(ZeroDivisionError), store.open_log("logs/run.log") as file:
            file.write("began")
            server.stop()
            raise ZeroDivisionError
    finally:
        server.start()
    ((name, path),) = spool.list_logs(store.spool.folder)
    assert store._upload_log(name, path), "it is kept for the next process"
    assert b"ZeroDivisionError" in bucket.read(f"deep/out/{name}")


# Errors


def fail_fast(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the client library of a store repeat no request."""
    if hasattr(store.system, "retries"):
        monkeypatch.setattr(store.system, "retries", 1)
    else:
        for policy in store.system.service_client._pipeline._impl_policies:
            if hasattr(policy, "total_retries"):
                monkeypatch.setattr(policy, "total_retries", 0)


def call_all(store: ObjectStore) -> dict[str, Callable[[], object]]:
    store.stage(IMAGE, b"")
    return {
        "locked": lambda: ExitStack().enter_context(store.locked()),
        "write": lambda: put(store, "a"),
        "publish": lambda: store.publish([IMAGE]),
        "create": lambda: store.create("a", b""),
        "read": lambda: store.read("a"),
        "read_private": lambda: store.read_private("a"),
        "open_file": lambda: ExitStack().enter_context(store.open_file("a")),
        "find_holder": lambda: store.find_holder(),
    }


def test_a_missing_bucket_is_a_settings_error(bucket: Bucket) -> None:
    store = ObjectStore(StoreAddress(f"{bucket.url}0/out"))
    for name, call in call_all(store).items():
        with pytest.raises(SettingsError, match=f"{store.location}.*: its bucket or container does not exist"):
            call()
            pytest.fail(name)


def test_wrong_credentials_are_a_settings_error(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "WRONG-SECRET")
    text = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text.replace("AccountKey=", "AccountKey=U0VDUkVU"))
    store = ObjectStore(StoreAddress(f"{bucket.url}/out"))
    for name, call in call_all(store).items():
        with pytest.raises(SettingsError, match=f"cannot [a-z]+ {store.location}.*: HTTP 403") as error:
            call()
            pytest.fail(name)
        assert "SECRET" not in str(error.value)
        assert error.value.__suppress_context__


def test_a_server_that_is_down_is_a_storage_error(
    store: ObjectStore, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_fast(store, monkeypatch)
    server.stop()
    try:
        for name, call in call_all(store).items():
            with pytest.raises(StorageError, match=f"cannot [a-z]+ {store.location}") as error:
                call()
                pytest.fail(name)
            assert "?" not in str(error.value)
    finally:
        server.start()


def test_a_run_survives_a_restart_of_the_server(
    store: ObjectStore, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server starts again after the first requests have failed, and the library repeats them."""
    if not hasattr(store.system, "retries"):
        pytest.skip("the SDK of Azure waits for 15 seconds before it repeats a request")
    failed = threading.Event()
    real_is_transient = s3._is_transient

    def is_transient(error: Exception) -> bool:
        failed.set()
        return real_is_transient(error)

    import s3fs.core

    monkeypatch.setattr(s3fs.core, "CUSTOM_ERROR_HANDLER", is_transient)
    names = [f"images/{number}.png" for number in range(40)]
    for name in names:
        store.stage(name, name.encode())
    server.stop()
    with ThreadPoolExecutor(1) as pool:
        published = pool.submit(store.publish, names)
        assert failed.wait(60)
        server.start()
        published.result()
    assert [store.read_image(name) for name in names] == [name.encode() for name in names]


@pytest.mark.parametrize(
    ("status", "is_repeated"), [(500, True), (502, True), (503, True), (429, True), (403, False), (404, False)]
)
def test_temporary_failures_of_s3_are_repeated(status: int, is_repeated: bool) -> None:
    metadata = {"HTTPStatusCode": status}
    error = ClientError({"Error": {"Code": str(status)}, "ResponseMetadata": metadata}, "PutObject")
    assert s3._is_transient(error) == is_repeated
    assert s3._is_transient(EndpointConnectionError(endpoint_url="http://x"))
    assert not s3._is_transient(NoCredentialsError())


@pytest.mark.parametrize(
    "url", ["s3://u:SECRET@b/out", "s3://b/out?versionId=SECRET", "s3://b/a#b", "s3://b/a//b", "s3://b/../b", "s3://"]
)
def test_unsuitable_urls_are_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="the URL of OUT must") as error:
        open_store(url)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("url", ["ftp://u:SECRET@host/out", "memory://out", "http://host/out", "adl://host/out"])
def test_protocols_without_conditional_puts_are_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="OUT cannot be on .* begins with one of s3://, .*gs://") as error:
        open_store(url)
    assert "SECRET" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_infer.store.clients.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"writing to s3:// needs s3fs: pip install s3fs"):
        open_store("s3://b/out")


def test_missing_credentials_are_a_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AZURE_"):
            monkeypatch.delenv(name)
    with pytest.raises(SettingsError, match="cannot open az://c/out: .*account"):
        open_store("az://c/out")


def test_spools_are_removed_with_their_process(store: ObjectStore) -> None:
    assert store.spool.folder.is_dir()
    store.stage(IMAGE, b"x")
    store.spool._finalizer()
    assert not store.spool.folder.exists()


def test_a_local_out_loads_no_fsspec(tmp_path: Path) -> None:
    script = "import sys, filelock; known = {*sys.modules};"  # old versions of filelock load asyncio
    script += "from batch_infer.store import open_store; open_store(sys.argv[1]).exists('run.json');"
    script += "print(sorted({'fsspec', 'asyncio', 'pyarrow'} & (sys.modules.keys() - known)))"
    line = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert done.stdout == "[]\n"
