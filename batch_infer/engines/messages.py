"""Define and encode the messages between the supervisor and its workers.

Messages are encoded as MessagePack, and carried cells as Arrow IPC. Decoding checks types, and never runs code from the
sender.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from batch_infer.carried import to_array, to_values
from batch_infer.engines.ledger import Chunk
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.settings import Device
from batch_infer.worker import WorkerReport, WorkerSettings

MAX_MESSAGE_BYTES = 2**30


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The first message of a rank other than 0."""

    rank: int


class DeviceReport(msgspec.Struct, tag=True, frozen=True):
    """The device that a worker will compute on."""

    device: Device


class ModelLoaded(msgspec.Struct, tag=True, frozen=True):
    """The worker has loaded the model."""


class RowRequest(msgspec.Struct, tag=True, frozen=True):
    """The worker will soon need more rows. The supervisor responds at once, with RowChunk or NoMoreRows."""


class WorkerIdle(msgspec.Struct, tag=True, frozen=True):
    """The worker has no rows left. The supervisor responds once it has more rows, or all rows are committed."""


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """The worker has just checked for a stop, so it is not hanging."""


class CommitReport(msgspec.Struct, tag=True, frozen=True):
    """The rows are in the manifest. They are sent without prompts and without carried cells."""

    rows: Sequence[ResultRow]
    report: WorkerReport


class LogMessage(msgspec.Struct, tag=True, frozen=True):
    """A log record of a worker, with the attribute names of logging.LogRecord."""

    name: str
    levelno: int
    msg: str
    created: float

    @classmethod
    def from_record(cls, record: logging.LogRecord) -> LogMessage:
        return cls(record.name, record.levelno, escape_surrogates(record.getMessage()), record.created)

    def handle(self) -> None:
        """Log the record in this process."""
        attributes = {**msgspec.structs.asdict(self), "levelname": logging.getLevelName(self.levelno)}
        logging.getLogger(self.name).handle(logging.makeLogRecord(attributes))


class WorkerError(msgspec.Struct, tag=True, frozen=True):
    """The worker ends with an error. `traceback` is empty for a BatchInferError."""

    class_name: str
    text: str
    traceback: str


class WorkerDone(msgspec.Struct, tag=True, frozen=True):
    """The worker ends without an error. `report` is None if a stop signal interrupted it."""

    report: WorkerReport | None


class StartTask(msgspec.Struct, tag=True, frozen=True):
    """Load the model and render with these settings."""

    settings: WorkerSettings


class RowChunk(msgspec.Struct, tag=True, frozen=True):
    """Rows to render. `carried` has their carried cells as an Arrow IPC stream, and is empty if there are none."""

    requests: tuple[PromptRequest, ...]
    is_isolated: bool
    carried: bytes

    @classmethod
    def from_chunk(cls, chunk: Chunk, carried: pa.Schema) -> RowChunk:
        requests = tuple(replace(request, carried={}) for request in chunk.requests)
        if not len(carried):
            return cls(requests, chunk.is_isolated, b"")
        cells = [
            to_array([request.carried.get(field.name) for request in chunk.requests], field.type) for field in carried
        ]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, carried) as stream:
            stream.write_batch(pa.record_batch(cells, schema=carried))
        return cls(requests, chunk.is_isolated, sink.getvalue().to_pybytes())

    def to_chunk(self) -> Chunk:
        if not self.carried:
            return Chunk(self.requests, self.is_isolated)
        with pa.ipc.open_stream(self.carried) as stream:
            table = stream.read_all()
        rows = zip(*map(to_values, table.columns), strict=True)
        carried = (dict(zip(table.column_names, row, strict=True)) for row in rows)
        pairs = zip(self.requests, carried, strict=True)
        return Chunk(tuple(replace(request, carried=cells) for request, cells in pairs), self.is_isolated)


class NoMoreRows(msgspec.Struct, tag=True, frozen=True):
    """There are no more rows for now. A worker that is idle ends, and any other worker first finishes its rows."""


class StopTask(msgspec.Struct, tag=True, frozen=True):
    """Cancel unfinished rows, commit finished ones, and end."""


FromWorker = (
    Hello
    | DeviceReport
    | ModelLoaded
    | RowRequest
    | WorkerIdle
    | Heartbeat
    | CommitReport
    | LogMessage
    | WorkerError
    | WorkerDone
)
ToWorker = StartTask | RowChunk | NoMoreRows | StopTask


def escape_surrogates(text: str) -> str:
    """Escape surrogates, which UTF-8 cannot encode. In file names, they represent bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _to_bytes(value: Any) -> bytes:
    if isinstance(value, Path):
        return os.fsencode(value)
    if isinstance(value, pa.Schema):
        return bytes(value.serialize())
    raise NotImplementedError(f"a message cannot contain a {type(value).__name__}")


def _from_bytes(kind: type, value: Any) -> Any:
    if issubclass(kind, Path):
        return Path(os.fsdecode(value))
    if kind is pa.Schema:
        return pa.ipc.read_schema(pa.py_buffer(value))
    raise NotImplementedError(f"a message cannot contain a {kind.__name__}")


_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker, dec_hook=_from_bytes)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker, dec_hook=_from_bytes)
encode = msgspec.msgpack.Encoder(enc_hook=_to_bytes).encode
decode_from_worker, decode_to_worker = _from_worker.decode, _to_worker.decode
"""Decode a message from or to a worker. Raises msgspec.DecodeError if the bytes are no such message."""
