"""Test what every store promises: in a local folder, on S3, and on Azure Blob Storage."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from batch_infer.errors import LockedError, StoppedError, StorageError
from batch_infer.store import FileDigest, Store, StoredFile, open_store, prefetch, unless_removed
from tests.object_servers import serve_objects

IMAGE, BACKUP = "images/t-00000/a-0.png", "images/t-00000/.original-a-0.png"


@pytest.fixture(scope="module", params=["local", "s3", "azure"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A folder or URL that contains the OUT of each test."""
    folder = tmp_path_factory.mktemp("stores")
    if request.param == "local":
        yield str(folder)
        return
    with serve_objects(request.param, folder) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setattr(tempfile, "tempdir", str(folder))
        yield server.make_bucket().url


@pytest.fixture
def store(place: str, request: pytest.FixtureRequest) -> Iterator[Store]:
    """A locked store in a separate OUT for each test."""
    with open_store(f"{place}/{request.node.originalname}").locked() as store:
        yield store


def put(store: Store, name: str, content: bytes = b"x") -> None:
    with store.write(name) as path:
        path.write_bytes(content)


def publish(store: Store, name: str, content: bytes) -> None:
    store.stage(name, content)
    store.publish([name])


def visible(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def test_files_are_read_as_written(store: Store) -> None:
    put(store, "run.json", b"{}")
    put(store, "manifest/part-1.parquet", b"part")
    assert (store.read("run.json"), store.read("missing"), store.read("missing/x")) == (b"{}", None, None)
    names = ("run.json", "manifest", "manifest/part-1.parquet", "manifest/part", "missing")
    assert [store.exists(name) for name in names] == [True, True, True, False, False]
    assert visible(store.list_folder("")) == ["manifest", "run.json"]
    assert (store.list_folder("manifest"), store.list_folder("missing")) == (["part-1.parquet"], [])
    assert store.locate("run.json") == f"{store.location}/run.json"
    put(store, "run.json", b"again")
    assert open_store(store.address).read("run.json") == b"again"
    store.check()
    open_store(store.address).check()


def test_a_failed_write_leaves_the_old_file(store: Store) -> None:
    put(store, "run.json", b"old")
    with pytest.raises(ZeroDivisionError), store.write("run.json") as path:
        path.write_bytes(b"half")
        raise ZeroDivisionError
    with pytest.raises(StorageError, match="No space left"), store.write("run.json") as path:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert store.read("run.json") == b"old"
    assert visible(store.list_folder("")) == ["run.json"]


def test_parts_are_opened_in_their_order(store: Store) -> None:
    names = [f"manifest/part-{number}.parquet" for number in range(5)]
    for name in names:
        put(store, name, name.encode())
    files = [StoredFile(store, name) for name in names]
    for name, file in zip(names, prefetch(files), strict=True):
        with store.open_file(file.path) as stream:
            assert stream.read() == name.encode()
        assert (file.name, str(file)) == (name.removeprefix("manifest/"), store.locate(name))
    with pytest.raises(FileNotFoundError), store.open_file("manifest/missing"):
        pass
    with unless_removed(StoredFile(store, "manifest/missing")):
        raise StorageError("it is missing")
    with pytest.raises(StorageError), unless_removed(files[0]):
        raise StorageError("it is there")


def test_find_yields_files_at_any_depth(store: Store) -> None:
    for name in ("run.json", "images/a", "images/t-0/a", "images/t-0/b", "logs/a"):
        put(store, name)
    assert sorted(store.find(["images", "quarantine"], lambda name: name == "a")) == ["images/a", "images/t-0/a"]
    assert list(store.find([""], lambda name: name in ("a", "run.json"))) == ["run.json"]


def test_images_are_listed_by_path_and_hashed(store: Store) -> None:
    names = ["images/a-1/x.png", "images/a.png", "images/a/b/y.png", "images/a/z.png", "images/a0.png", "quarantine/q"]
    for name in reversed(names):
        publish(store, name, name.encode())
    put(store, "manifest/part-1.parquet")
    assert sorted(names) == names
    assert list(store.list_image_files()) == [(name, len(name)) for name in names]
    assert [name for name, _ in store.list_image_files(needs_sizes=False)] == names
    images = [*((name, len(name)) for name in names), ("images/none.png", 1)]
    expected = [FileDigest(hashlib.sha256(name.encode()).hexdigest(), len(name)) for name in names]
    assert store.hash_images(images) == [*expected, None]
    (larger,) = store.hash_images([(names[0], 3)])
    assert larger is not None
    assert larger.size > 3
    assert store.hash_images([(names[0], 1000)]) == expected[:1]


def test_of_several_processes_one_creates_a_file(store: Store) -> None:
    """In one process, the threads would share the name of a temporary file."""
    assert [store.create("run.json", str(number).encode()) for number in range(3)] == [True, False, False]
    assert store.read("run.json") == b"0"


def test_rename_replaces_a_file(store: Store) -> None:
    put(store, "manifest/a", b"1")
    put(store, "manifest/b", b"2")
    store.rename("manifest/a", "manifest/b")
    assert (store.read("manifest/a"), store.read("manifest/b")) == (None, b"1")
    with pytest.raises(StorageError):
        store.rename("manifest/a", "manifest/b")
    assert store.read("manifest/b") == b"1"


def test_only_files_in_out_are_removed(store: Store, place: str) -> None:
    outside = open_store(f"{place}/outside")
    with outside.locked() as other:
        put(other, "x")
    put(store, "images/a")
    store.remove(["missing", "images/missing", "../outside/x", "images/../../outside/x", "/x", "images//a", "", "."])
    assert (store.read("images/a"), outside.read("x")) == (b"x", b"x")
    store.remove(["images/a"])
    assert store.read("images/a") is None


def test_a_folder_is_removed_until_a_stop(store: Store) -> None:
    names = [f"images/{folder}/{number}" for folder in "abc" for number in range(3)]
    for name in (*names, "images-2/x", "run.json"):
        put(store, name)
    with pytest.raises(StoppedError):
        store.remove_folder("images", lambda: True)
    assert list(store.find(["images"], lambda name: True))
    for name in ("images", "run.json", "missing"):
        store.remove_folder(name, lambda: False)
    assert visible(store.list_folder("")) == ["images-2"]
    put(store, "images/a/0", b"new")
    assert store.read("images/a/0") == b"new"


def test_tables_in_out_are_recognised(store: Store) -> None:
    assert store.contains(f"{store.location}/images/t.csv", ["images", "logs"])
    assert store.contains(f"{store.location}/results.csv", ["results.csv"])
    assert not store.contains(f"{store.location}/images-2/t.csv", ["images"])
    assert not store.contains(f"{store.location}-2/images/t.csv", ["images"])


def test_images_appear_when_they_are_published(store: Store) -> None:
    publish(store, IMAGE, b"first")
    store.stage(IMAGE, b"second")
    assert [store.read_image(IMAGE, length) for length in (None, 5, 4)] == [b"first", b"first", None]
    store.publish([IMAGE])
    assert store.read_image(IMAGE) == b"second"
    assert [store.has_image(name) for name in (IMAGE, "images/t-00000", "images/x")] == [True, False, False]


def test_images_are_backed_up_once(store: Store) -> None:
    publish(store, IMAGE, b"old")
    for content in (b"new", b"newer"):
        store.stage(IMAGE, content)
        store.back_up({IMAGE: BACKUP, "images/missing": "images/.original-missing"})
        store.publish([IMAGE])
    assert [store.read_image(name) for name in (IMAGE, BACKUP, "images/.original-missing")] == [b"newer", b"old", None]
    store.rename(BACKUP, IMAGE)
    assert [store.read_image(name) for name in (IMAGE, BACKUP)] == [b"old", None]


def test_a_locked_out_names_its_holder(store: Store, place: str) -> None:
    holder = store.find_holder()
    assert holder is not None
    assert f"process {os.getpid()}, since " in holder
    with pytest.raises(LockedError, match=f"is locked by another command .*process {os.getpid()}"):
        open_store(store.location).locked().__enter__()
    with open_store(f"{place}/another").locked() as another:
        assert another.find_holder() is not None
    assert open_store(f"{place}/another").find_holder() is None


def test_a_private_file_has_the_time_of_the_storage(store: Store) -> None:
    assert store.read_private(".crew") is None
    store.write_private(".crew", b"secret")
    file = store.read_private(".crew")
    assert file is not None
    assert file.content == b"secret"
    assert -2 <= store.now() - file.written_at <= 600


def test_the_traceback_of_an_error_is_logged(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.open_log("logs/run.log") as file:
        file.write("a message\n")
        raise ZeroDivisionError
    (name,) = store.find(["logs"], lambda name: name.startswith("run"))
    text = (store.read(name) or b"").decode()
    assert "a message\n" in text
    assert "ZeroDivisionError" in text


def test_many_threads_write_images(store: Store) -> None:
    names = [f"images/t-{number % 7}/{number}.png" for number in range(50)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.stage(name, name.encode()), names))
    store.publish(names)
    assert [store.read_image(name) for name in names] == [name.encode() for name in names]
