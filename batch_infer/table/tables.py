"""All tables of a run as one stream of requests, in input order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from batch_infer.errors import TableError
from batch_infer.records import PromptRequest, ResultRow, Source
from batch_infer.settings import IdSource, TableSettings
from batch_infer.table.carrying import CellReader, Opened, common_schema, name_carried, with_names
from batch_infer.table.endings import ID_DIGITS, TableFile, read_ending
from batch_infer.table.files import find_files, stems_that_meet, with_distinct_names
from batch_infer.table.ids import Ids, colliding_stems, id_text, stems_among
from batch_infer.table.layout import lay_out
from batch_infer.table.names import doubled_sentence, refuse_doubled
from batch_infer.table.near import near_fields
from batch_infer.table.notes import Notes
from batch_infer.table.partitions import overlap_sentence, partitions_of, with_partitions
from batch_infer.table.raw import RawRow
from batch_infer.table.readers import open_reader
from batch_infer.table.rows import LONGEST_TEXT, Cells, IsFinished, RowRules, invalid, own_cells, requests
from batch_infer.table.scratch import Scratch
from batch_infer.table.text import clean, encoding_fault


@dataclass(frozen=True, slots=True)
class _Refused:
    """A file or argument that cannot be read, and why."""

    file: TableFile
    error: str


@dataclass(frozen=True, slots=True)
class OtherTables:
    """What is known of tables that stand in the same folder and are read elsewhere, at another time.

    `names` are those of all files there; `has_id` says of an id, and the name of the file that has it, whether it is
    another's.

    Of files of one stem the first table by name has it for its rows' default ids, and the others have their whole
    name (`p.txt-00000000` beside p.csv): nobody knows here which of them will be read, so none is refused for another.
    For that, too, no row may have the default id of another file's row for its own, whether or not that one is read.
    """

    names: Collection[str]
    has_id: Callable[[str, str], bool]


class Tables:
    """The tables of a run. `carried` is the schema of the columns that are handed through to the results.

    `left_out` are the files of folders and globs that are no tables.

    What was fetched, piped in or unpacked lies in a temporary folder until `close`.
    """

    def __init__(
        self, settings: TableSettings, result_columns: Iterable[str], others: OtherTables | None = None
    ) -> None:
        """Opens every file and finds its columns.

        With `others`, a file that cannot be read has its fault, and default ids do not meet. Without them, raises
        TableError where an argument cannot be read, no file of folders and globs can be, or default ids would meet.
        Raises ServiceError where a file cannot be fetched now, StorageError where the temporary folder is full.
        """
        self._others = others
        self._owners: Mapping[str, str] = {}
        self._limit = None if settings.limit is None else min(settings.limit, sys.maxsize)
        self._id_from = settings.id_from
        self._remarks: list[str] = []
        self._notes = Notes()
        self._overlaps: list[tuple[str, str]] = []
        self._scratch = Scratch()
        with ExitStack() as undo:
            undo.callback(self._scratch.close)
            found, self.left_out = find_files(settings.tables, settings.folder, self._scratch)
            if others is None:
                _refuse_missing(found)
                found = with_distinct_names(found)
            self._files = [self._open(file, settings.columns) for file in found]
            if others is None:
                self._refuse_unreadable()
                self._refuse_meeting_ids()
            else:
                stems = stems_among(map(clean, others.names))
                self._owners = {stem: name for name, stem in stems.items() if read_ending(name)}
                self._files = [_apart(opened, stems) for opened in self._files]
            undo.pop_all()
        names = self.files if others is None else sorted(map(clean, others.names))
        self._colliding = colliding_stems(Source(name, 0).stem for name in names)
        self._stamps = {path: _stamp(path) for path in self.local_paths}
        carried = name_carried(self._readable(), frozenset(result_columns))
        self._files = [with_names(opened, carried) if isinstance(opened, Opened) else opened for opened in self._files]
        self.carried, warnings = common_schema(self._readable())
        self._remarks += [
            *near_fields(self._readable(), settings.columns),
            *warnings,
            *overlap_sentence(self._overlaps),
        ]

    def __enter__(self) -> Tables:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary folder."""
        self._scratch.close()

    @property
    def files(self) -> list[str]:
        """The names of all files, as the user gave them."""
        return [opened.file.name for opened in self._files]

    @property
    def unreadable_files(self) -> dict[str, str]:
        """Why a file cannot be read, by the name of each that cannot."""
        return {opened.file.name: opened.error for opened in self._files if isinstance(opened, _Refused)}

    @property
    def local_paths(self) -> list[Path]:
        """The absolute paths of those tables that are the user's own files on this machine."""
        files = (opened.file for opened in self._files)
        return [file.path.absolute() for file in files if file.origin == "file" and file.fault is None]

    @property
    def remarks(self) -> list[str]:
        """What the user should know and no row's fault is: of the files, and once `rows` is through, of their rows."""
        return [*self._remarks, *self._notes.sentences()]

    @property
    def default_id_source(self) -> IdSource | None:
        """What the ids of rows are made of in tables without an id column, None where there is no such table."""
        return None if all("id" in opened.layout.fields for opened in self._readable()) else self._id_from

    def changed_files(self) -> list[str]:
        """The user's own files that are not what they were when they were opened."""
        return [str(path) for path, before in self._stamps.items() if _stamp(path) != before]

    def rows(self, rules: RowRules, is_finished: IsFinished = lambda _: False) -> Iterator[PromptRequest | ResultRow]:
        """Every row, in input order, as its requests or as its invalid result; see `table.rows.requests`."""
        notes = Notes()
        with closing(Ids(self._elsewhere if self._others else None, distinct=self._has_distinct_ids())) as ids:
            for cells, error in islice(self._cells(ids, notes), self._limit):
                if error is None:
                    yield from requests(cells, rules, is_finished)
                else:
                    yield invalid(cells, error)
        self._notes = notes

    def compared_rows(
        self, rules: RowRules, others: Sequence[RowRules], is_finished: IsFinished = lambda _: False
    ) -> Iterator[tuple[PromptRequest | ResultRow, list[PromptRequest | ResultRow | None]]]:
        """Yield every row as `rows` does, each with what it is under each of the other rules."""
        with closing(Ids(self._elsewhere if self._others else None, distinct=self._has_distinct_ids())) as ids:
            for cells, error in islice(self._cells(ids, Notes()), self._limit):
                if error is not None:
                    yield invalid(cells, error), [None for _ in others]
                    continue
                old = [{item.image_index: item for item in requests(cells, other, is_finished)} for other in others]
                for item in requests(cells, rules, is_finished):
                    yield item, [items.get(item.image_index) for items in old]

    def _elsewhere(self, name: str, file: str) -> str | None:
        """Why an id of this file's own is another file's."""
        stem, _, number = name.rstrip("+").rpartition("-")
        owner = self._owners.get(stem, file) if len(number) == ID_DIGITS and number.isdecimal() else file
        if owner != file:
            return f"the id {name!r} would be the default id of a row of {owner}: give it another"
        return f"the id {name!r} stands twice" if self._others and self._others.has_id(name, file) else None

    def _open(self, file: TableFile, columns: Mapping[str, str]) -> Opened | _Refused:
        if file.fault is not None:
            return _Refused(file, file.fault)
        try:
            reader, renamed = open_reader(file, columns.get("prompt", "prompt"), self._scratch)
            values = partitions_of(self._path_of(file))
            self._overlaps += [(file.name, name) for name in values if name in reader.schema.names]
            reader = with_partitions(reader, values)
            layout = lay_out(file, reader.schema.names, columns)
            refuse_doubled(file.name, layout.fields.values(), renamed)
        except TableError as error:
            return _Refused(file, str(error))
        if renamed:
            self._remarks.append(doubled_sentence(file.name, renamed))
        return Opened(file, reader, layout)

    def _path_of(self, file: TableFile) -> str:
        """The path whose folders are columns; beside others, a file is named by its last part alone."""
        return file.path.as_posix() if self._others else file.name

    def _readable(self) -> list[Opened]:
        return [opened for opened in self._files if isinstance(opened, Opened)]

    def _refuse_unreadable(self) -> None:
        """Raise TableError where a file that the user named cannot be read, or no file at all.

        A file that is only in a folder or glob costs one invalid result.
        """
        refused = [opened for opened in self._files if isinstance(opened, _Refused)]
        if self._readable():
            refused = [opened for opened in refused if opened.file.is_named]
        if refused:
            raise TableError(" · ".join(opened.error for opened in refused))

    def _refuse_meeting_ids(self) -> None:
        if self._id_from == "content":
            return
        readable = self._readable()
        meeting = stems_that_meet(opened.file for opened in readable)
        for opened in readable:
            if opened.file.stem in meeting and "id" not in opened.layout.fields:
                twins = [other.file.name for other in readable if other.file.stem == opened.file.stem]
                raise TableError(_meeting(twins, opened))

    def _has_distinct_ids(self) -> bool:
        """Whether all ids are default ones, of stems that differ by more than case: then the ids do too."""
        named = any("id" in opened.layout.fields for opened in self._readable())
        stems = [opened.file.stem.lower() for opened in self._files]
        return not named and len(set(stems)) == len(stems)

    def _cells(self, ids: Ids, notes: Notes) -> Iterator[tuple[Cells, str | None]]:
        for opened in self._files:
            if isinstance(opened, _Refused):
                file = opened.file
                yield Cells(ids.own(file.default_id(0), file.name), Source(file.name, 0), {}, {}), opened.error
                continue
            cells = CellReader(opened, self.carried)
            for raw in opened.reader.rows():
                if raw.note is not None:
                    notes.add(raw.note, Source(opened.file.name, raw.number, raw.line))
                    if raw.note.kind == "blank":
                        continue
                yield self._row(opened.file, cells, raw, ids)

    def _row(self, file: TableFile, cells: CellReader, raw: RawRow, ids: Ids) -> tuple[Cells, str | None]:
        own = cells.own(own_cells(cells.fields, raw.cells.get))
        value = own.pop("id", None)
        carried, fault = cells.carried(raw)
        name, wrong = (None, None) if value is None else _own_id(file, value, ids)
        if name is None and self._id_from == "content":
            name = ids.numbered(cells.digest(own, raw), file.name)
        elif name is None:
            name = ids.own(file.default_id(raw.number), file.name)
        source = Source(file.name, raw.number, raw.line)
        collides = ids.collides(name), bool(self._colliding) and source.stem in self._colliding
        return Cells(name, source, own, carried, fault, *collides), raw.error or wrong


def _refuse_missing(files: Iterable[TableFile]) -> None:
    """Raise TableError for all arguments that mean no file, before any file is read: one may be misspelt."""
    if faults := [file.fault for file in files if file.fault is not None and file.is_named]:
        raise TableError(" · ".join(dict.fromkeys(faults)))


def _apart(opened: Opened | _Refused, stems: Mapping[str, str]) -> Opened | _Refused:
    """A file with the stem that is its own in its folder. `./`, which tells a name from a URL, is no part of it."""
    name = opened.file.name.removeprefix("./")
    file = replace(opened.file, name=name, stem=stems.get(name, opened.file.stem))
    if isinstance(opened, _Refused):
        return _Refused(file, opened.error.removeprefix("./"))
    return replace(opened, file=file)


def _meeting(names: Collection[str], opened: Opened) -> str:
    fault = f"{' and '.join(names)} would give their rows the same ids ({opened.file.default_id(0)}, ...): "
    if any(name.rpartition("#")[0] in names for name in names):
        return (
            f"{fault}add an id column, use --id-from content, or save one under another name (#2 is a URL that differs "
            "only in parts that may be secret and are not shown)"
        )
    return f"{fault}rename one, name the folder that holds them, or add an id column"


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of a file, None where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _own_id(file: TableFile, value: Any, ids: Ids) -> tuple[str | None, str | None]:
    """The id that a row has itself, or what is wrong with it."""
    own = id_text(value)
    if isinstance(value, (list, dict)):
        return None, f"the id is not text but {type(value).__name__}"
    if len(own) > LONGEST_TEXT:
        return None, f"the id has {len(own)} characters, and {LONGEST_TEXT} are the most"
    if "\0" in own:
        return None, "the id holds a NUL byte"
    if problem := encoding_fault(own):
        return None, f"the id {problem}"
    if fault := ids.elsewhere(own, file.name):
        return None, fault
    return (own, None) if ids.add(own, file.name) else (None, f"the id {own!r} stands twice")
