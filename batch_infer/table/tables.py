"""Read all tables of a run as one stream of requests and invalid results, in input order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import msgspec

from batch_infer import __version__
from batch_infer.errors import TableError
from batch_infer.records import PromptRequest, ResultRow, Source, digest
from batch_infer.settings import FIELDS, LORA_FIELD, IdSource, TableSettings
from batch_infer.store import hash_file
from batch_infer.table.base import (
    BLANK_ROW,
    ID_DIGITS,
    NoticeCounts,
    RawRow,
    Scratch,
    TableFile,
    make_default_id,
    raise_storage_error,
    replace_surrogates,
)
from batch_infer.table.columns import (
    CellReader,
    OpenTable,
    describe_columns,
    describe_unused_loras,
    make_carried_schema,
    map_fields,
)
from batch_infer.table.files import find_files, number_names
from batch_infer.table.formats import open_reader, parse_name
from batch_infer.table.ids import Ids, assign_stems, find_colliding_stems, reject_equal_ids
from batch_infer.table.prompt_syntax import find_foreign_syntax
from batch_infer.table.rows import (
    FindLora,
    HasFinalResult,
    RowCells,
    RowRules,
    make_invalid,
    make_requests,
    read_lora,
)
from batch_infer.table.urls import parse_path_columns


@dataclass(frozen=True, slots=True)
class SharedFolder:
    """A folder in which this run reads only some tables. `names` contains the names of all files in the folder.

    `has_id(id, file)` returns whether a file that sorts before `file` has committed a row with this id.

    If files share a stem, the first table by name uses the stem in its default ids, and the others use their full name
    (`p.txt-00000000` next to p.csv). No file is rejected, since it is unknown which files will be read. For the same
    reason, a row must not use the default id of a row in another file, even if that file is never read.
    """

    names: Collection[str]
    has_id: Callable[[str, str], bool]


class Tables:
    """The tables of a run.

    `carried` is the schema of the columns that are carried to the results. `ignored_files` contains the files in
    folders and globs that are not read. `close` removes the copies of downloaded, piped and decompressed tables.
    """

    def __init__(
        self,
        settings: TableSettings,
        result_columns: Iterable[str],
        shared_folder: SharedFolder | None = None,
        find_lora: FindLora | None = None,
    ) -> None:
        """Open every file and find its columns. Without `find_lora`, rows cannot name a LoRA.

        Raises TableError if no TABLE is given. Without `shared_folder`, also raises it if a named file cannot be read,
        if no file can be read, or if default ids would collide. Raises ServiceError if a service fails, StorageError
        if the disk fails or the temporary folder is full.
        """
        self._settings, self._shared_folder, self._find_lora = settings, shared_folder, find_lora
        self._limit = None if settings.limit is None else min(settings.limit, sys.maxsize)
        self._owners: Mapping[str, str] = {}
        self._notice_counts = NoticeCounts()
        self._scratch = Scratch()
        with ExitStack() as undo:
            undo.callback(self.close)
            files, self.ignored_files = find_files(settings.tables, settings.folder, self._scratch)
            self._tables = self._open_shared(files, shared_folder) if shared_folder else self._open_all(files)
            undo.pop_all()
        self._readable = [table for table in self._tables if isinstance(table, OpenTable)]
        self._files = [table.file if isinstance(table, OpenTable) else table for table in self._tables]
        names = self.files if shared_folder is None else sorted(map(replace_surrogates, shared_folder.names))
        self._colliding = find_colliding_stems(Source(name, 0).stem for name in names)
        paths = [file.path.absolute() for file in files if file.origin == "file" and file.error is None]
        self._stamps = {path: _get_stamp(path) for path in paths}
        self.carried, warnings = make_carried_schema(self._readable, frozenset(result_columns))
        unused = [] if find_lora else describe_unused_loras(self._readable)
        self._notices = [*describe_columns(self._readable, settings.columns), *unused, *warnings]

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._scratch.close()

    @property
    def files(self) -> list[str]:
        """Displayed names of all files."""
        return [file.name for file in self._files]

    @property
    def unreadable_files(self) -> dict[str, str]:
        """Error messages of unreadable files, by file name."""
        return {file.name: file.error for file in self._files if file.error is not None}

    @property
    def locations(self) -> list[str]:
        """Absolute paths of the user's local tables, and URLs of remote ones without secrets."""
        return [*map(str, self._stamps), *(file.name for file in self._files if file.origin == "url")]

    @property
    def notices(self) -> list[str]:
        """Notices about files, and about the rows of the last pass that ended. They are not errors."""
        return [*self._notices, *self._notice_counts.format_sentences()]

    @property
    def default_id_source(self) -> IdSource | None:
        """Source of the ids in tables without an id column, or None if all readable tables have one."""
        return None if all("id" in table.fields for table in self._readable) else self._settings.id_from

    def compute_digest(self, rules: RowRules) -> str | None:
        """Return a digest of all that determines the rows: the bytes and names of the files, the settings and `rules`.

        Equal digests mean equal rows. Return None if the rows also depend on other files: on LoRAs that rows name, or
        on the other files of a shared folder, or if a file cannot be read. Raises StorageError.
        """
        if self._find_lora is not None or self._shared_folder is not None:
            return None
        files = []
        for file in self._files:
            try:
                content = hash_file(file.path) if file.error is None else file.error
            except OSError as error:
                raise_storage_error(error, file.name, was_opened=True)
                return None
            files.append([file.name, file.stem, content])
        settings = [dict(self._settings.columns), self._settings.limit, self._settings.id_from]
        return digest([__version__, files, settings, msgspec.to_builtins(rules)])

    def changed_files(self) -> list[str]:
        """Return the paths of local tables that changed since they were opened."""
        return [str(path) for path, stamp in self._stamps.items() if _get_stamp(path) != stamp]

    def read_rows(
        self, rules: RowRules, has_final_result: HasFinalResult = lambda _: False
    ) -> Iterator[PromptRequest | ResultRow]:
        """For each row up to the limit, in input order, yield requests or an invalid result. See `make_requests`."""
        return (item for item, _ in self.compare_rows(rules, [], has_final_result))

    def compare_rows(
        self, rules: RowRules, others: Sequence[RowRules], has_final_result: HasFinalResult = lambda _: False
    ) -> Iterator[tuple[PromptRequest | ResultRow, list[PromptRequest | ResultRow | None]]]:
        """Yield the items of `read_rows`, each with the item for the same image under each of `others`, or None."""
        notices = NoticeCounts()
        for cells, error in self._read_cells(notices):
            if error is not None:
                yield make_invalid(cells, error), [None for _ in others]
                continue
            for notice in find_foreign_syntax(cells.fields.get("prompt")):
                notices.add(notice, cells.source)
            other_items = [
                {item.image_index: item for item in make_requests(cells, other, has_final_result)} for other in others
            ]
            for item in make_requests(cells, rules, has_final_result):
                yield item, [items.get(item.image_index) for items in other_items]
        self._notice_counts = notices

    def _open_all(self, files: list[TableFile]) -> list[OpenTable | TableFile]:
        """Open all tables of a run. Raises TableError if the run must not start."""
        # Report arguments without a table, which may be misspelt, before reading any file.
        if errors := [file.error for file in files if file.error is not None and file.is_named]:
            raise TableError(" · ".join(dict.fromkeys(errors)))
        tables = [self._open(file) for file in number_names(files)]
        unreadable = [table for table in tables if isinstance(table, TableFile)]
        if len(unreadable) < len(tables):  # an unreadable file in a folder or glob becomes one invalid result
            unreadable = [file for file in unreadable if file.is_named]
        if unreadable:
            raise TableError(" · ".join(str(file.error) for file in unreadable))
        if self._settings.id_from == "row":
            reject_equal_ids([table for table in tables if isinstance(table, OpenTable)])
        return tables

    def _open_shared(self, files: list[TableFile], folder: SharedFolder) -> list[OpenTable | TableFile]:
        """Open tables with stems that are unique among all files of their folder."""
        stems = assign_stems(map(replace_surrogates, folder.names))
        self._owners = {stem: name for name, stem in stems.items() if parse_name(name)}
        tables = []
        for file in files:
            name = file.name.removeprefix("./")  # the caller adds ./ to distinguish a name from a URL
            error = file.error and file.error.removeprefix("./")
            tables.append(self._open(replace(file, name=name, stem=stems.get(name, file.stem), error=error)))
        return tables

    def _open(self, file: TableFile) -> OpenTable | TableFile:
        """Open a file. If it cannot be read, return it with its error."""
        if file.error is not None:
            return file
        columns = self._settings.columns
        try:
            reader = open_reader(file, columns.get("prompt", "prompt"), self._scratch)
            # In a shared folder, file.name lacks the folders of the path, which may be columns.
            path_columns = parse_path_columns(file.path.as_posix() if self._shared_folder else file.name)
            names = list(dict.fromkeys([*reader.schema.names, *path_columns]))
            known = FIELDS if self._find_lora is None else (*FIELDS, LORA_FIELD)
            fields = map_fields(file, names, columns, reader.renamed, known)
        except TableError as error:
            return replace(file, error=str(error))
        lora_column = fields.pop(LORA_FIELD, None)
        carried = {name: name for name in names if name not in fields.values()}
        return OpenTable(file, reader, path_columns, fields, carried, lora_column)

    def _find_conflict(self, name: str, file: str) -> str | None:
        """Return an error message if an id in this file belongs or may belong to another file, else None."""
        stem, _, number = name.rstrip("+").rpartition("-")
        owner = self._owners.get(stem, file) if len(number) == ID_DIGITS and number.isdecimal() else file
        if owner != file:
            return f"the id {name!r} would be the default id of a row of {owner}: give it another"
        is_used = self._shared_folder is not None and self._shared_folder.has_id(name, file)
        return f"duplicate id {name!r}" if is_used else None

    def _read_cells(self, notices: NoticeCounts) -> Iterator[tuple[RowCells, str | None]]:
        """Yield the cells of at most `limit` rows, each with an error message or None."""
        # Default ids are distinct, and need no storage, if their stems differ by more than case.
        stems = {file.stem.lower() for file in self._files}
        is_distinct = len(stems) == len(self._files) and not any("id" in table.fields for table in self._readable)
        with closing(Ids(self._find_conflict if self._shared_folder else None, distinct=is_distinct)) as ids:
            yield from islice(self._read_all(ids, notices), self._limit)

    def _read_all(self, ids: Ids, notices: NoticeCounts) -> Iterator[tuple[RowCells, str | None]]:
        for table in self._tables:
            if isinstance(table, TableFile):
                name = ids.reserve_unique(make_default_id(table.stem, 0), table.name)
                yield RowCells(name, Source(table.name, 0), {}, {}), table.error
                continue
            reader = CellReader(table, self.carried)
            for row in table.read_rows():
                if row.notice is not None:
                    notices.add(row.notice, Source(table.file.name, row.number, row.line))
                    if row.notice.kind == BLANK_ROW:
                        continue
                yield self._read_row(table.file, reader, row, ids)

    def _read_row(self, file: TableFile, reader: CellReader, row: RawRow, ids: Ids) -> tuple[RowCells, str | None]:
        fields = reader.read_fields(row)
        value = fields.pop("id", None)
        carried, too_large = reader.read_carried(row)
        name, error = (None, None) if value is None else ids.reserve_cell(value, file.name)
        if name is None and self._settings.id_from == "content":
            name = ids.reserve_numbered(reader.digest(fields, row), file.name)
        elif name is None:
            name = ids.reserve_unique(make_default_id(file.stem, row.number), file.name)
        source = Source(file.name, row.number, row.line)
        stem_collides = bool(self._colliding) and source.stem in self._colliding
        lora = read_lora(reader.read_lora(row), self._find_lora)
        cells = RowCells(name, source, fields, carried, too_large, ids.collides(name), stem_collides, lora)
        return cells, row.error or error


def _get_stamp(path: Path) -> tuple[int, int] | None:
    """Return the size and modification time of a file, or None if it no longer exists."""
    with suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return None
