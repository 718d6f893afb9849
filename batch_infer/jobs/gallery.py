"""Make a gallery of the results of OUT: a page for looking through the images."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PureWindowsPath
from urllib.parse import quote

from msgspec import UnsetType

from batch_infer.errors import RowError, SettingsError, StorageError
from batch_infer.galleries import GalleryInfo, TileOptions, is_gallery, write_gallery
from batch_infer.jobs import out as outdir
from batch_infer.jobs.compute import count_cores
from batch_infer.jobs.gallery_results import take_snapshot
from batch_infer.jobs.run_json import parse_record
from batch_infer.jobs.summary import JsonStruct
from batch_infer.records import Status, digest
from batch_infer.sinks import is_image_path, make_sink, parse_member
from batch_infer.store import Out, Store, is_url, open_store, redact_url, to_absolute

MAX_RESULTS = 100_000
"""Default limit of results. The page keeps all rows in memory."""
THUMBNAIL_SIZE = 256
THREADS_PER_URL = 16
"""Minimum number of threads if OUT is in an object store, where each image takes a request."""
FOLDERS_LISTED = 64
"""Number of folders whose lists of images are kept, because images in table order may alternate between folders."""


@dataclass(frozen=True, slots=True)
class GalleryOptions:
    """What to show and where.

    `to` is a folder or URL for a gallery that contains all that it shows, or None for OUT/gallery. At most
    `max_results` results are shown, and with `statuses` only those with one of them. `threads` is None for one per
    core.
    """

    to: str | None = None
    max_results: int = MAX_RESULTS
    statuses: tuple[Status, ...] = ()
    thumbnail_size: int = THUMBNAIL_SIZE
    threads: int | None = None


class Gallery(JsonStruct):
    """A gallery that was made. `path` is the page to open.

    `results` is the number of results that it shows, and `left_out` that of results that `max_results` or `statuses`
    left out. `made` and `kept` are the numbers of thumbnails that were made and that existed. `unreadable` is the
    number of images that are missing or damaged.
    """

    path: str
    results: int = 0
    left_out: int = 0
    made: int = 0
    kept: int = 0
    unreadable: int = 0


def make_gallery(
    out: Out,
    options: GalleryOptions = GalleryOptions(),
    on_progress: Callable[[int, int], object] = lambda _, __: None,
    shown_out: str | None = None,
) -> Gallery:
    """Make or update the gallery of OUT, which may be of a run that is active or unfinished, without locking OUT.

    Only the gallery's own folder is locked. `on_progress` receives the number of results so far and their total, and
    may raise an exception to stop; the old page then stays. `shown_out` is OUT in the commands that the page shows.
    Raises StorageError, LockedError if another command makes the same gallery, and UsageError, for example if OUT
    contains no run.
    """
    store = open_store(to_absolute(out))
    outdir.read_existing_run(store)
    target = _open_target(store, options.to)
    snapshot, left_out = take_snapshot(store, options.statuses, options.max_results)
    with snapshot, target.locked() as gallery_store:
        images = _Images(store, is_linked=options.to is None)
        cores = count_cores()
        threads = options.threads or (max(THREADS_PER_URL, cores) if is_url(store.location) else cores)
        totals = write_gallery(
            gallery_store,
            snapshot,
            images,
            _describe(store, shown_out or store.location, left_out),
            TileOptions(options.thumbnail_size, threads),
            lambda done: on_progress(done, snapshot.rows),
        )
    counts = totals.counts
    return Gallery(target.locate("index.html"), snapshot.rows, left_out, counts.made, counts.kept, counts.unreadable)


def _open_target(store: Store, to: str | None) -> Store:
    """Open the place of the gallery. Raises SettingsError if it contains other files or is in a folder of OUT."""
    if to is None:
        location = f"{store.location}/{outdir.GALLERY_FOLDER}"
        if store.is_link(outdir.GALLERY_FOLDER):
            raise SettingsError(f"{location} is a link: replace it with a folder, or give --to")
    else:
        location = str(to_absolute(to))
        if store.contains(location, (*outdir.OWN_NAMES, outdir.GALLERY_FOLDER)):
            raise SettingsError(f"--to {location} is in a folder of {store.location}: give another, or leave it out")
    target = open_store(location)
    if not is_gallery(target) and any(not name.startswith(".") for name in target.list_folder("")):
        raise SettingsError(f"{location} contains files, but no gallery: move them away, or give another --to")
    return target


def _describe(store: Store, shown_out: str, left_out: int) -> GalleryInfo:
    """Describe the run, without secrets of URLs."""
    raw = outdir.read_existing_run(store)
    record = parse_record(raw)
    model, settings = record.model.name, record.settings
    if isinstance(settings, UnsetType):  # of an early version
        options, on_flagged = [] if model is None else ["--model", model], None
    else:
        options, on_flagged = settings.model.as_options(), settings.safety.policy
    run = {
        "model_options": [redact_url(word) for word in options],
        "on_flagged": on_flagged,
        "model": None if model is None else redact_url(model),
        "scheduler": record.scheduler.name,
        "started_at": raw.get("started_at"),
        "summary": raw.get("summary"),
    }
    location = redact_url(store.location)
    title = PureWindowsPath(location.rstrip("/")).name or location
    return GalleryInfo(title, redact_url(shown_out), digest(["gallery", location]), left_out, time.time(), run)


class _Images:
    """Reads the images of OUT for the gallery. This is an `Images`. Only `read` is called from several threads."""

    def __init__(self, store: Store, *, is_linked: bool) -> None:
        """With `is_linked`, the page links to the image files of OUT."""
        self._store, self._sink, self._is_linked = store, make_sink(store), is_linked
        self._names: OrderedDict[str, set[str]] = OrderedDict()

    def has(self, path: str) -> bool:
        """Return whether an image exists. Each folder is listed once, as long as the images are in table order."""
        if parse_member(path) or not is_image_path(path):
            return self._sink.has(path)
        folder, _, name = path.rpartition("/")
        if folder not in self._names:
            try:
                self._names[folder] = self._sink.list_files(folder)
            except StorageError:
                if is_url(self._store.location):
                    raise
                return True  # `read` then says why the image cannot be read
            if len(self._names) > FOLDERS_LISTED:
                self._names.popitem(last=False)
        self._names.move_to_end(folder)
        return name in self._names[folder]

    def read(self, path: str) -> bytes | None:
        try:
            return self._sink.read(path)
        except StorageError as error:
            if is_url(self._store.location):
                raise
            reason = getattr(error.__cause__, "strerror", None) or "the disk cannot read it"
            raise RowError(f"its file cannot be read ({reason})") from error

    def link(self, path: str) -> str | None:
        return f"../{quote(path)}" if self._is_linked and is_image_path(path) else None
