"""What workers and the one who hands out rows say to each other, and its encoding.

Messages are MessagePack checked against their types, and carried cells Arrow IPC: decoding runs no code of the sender.
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

MOST_BYTES = 2**30
"""Length of the longest message."""


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The first message of a rank that a launcher has started."""

    rank: int


class Found(msgspec.Struct, tag=True, frozen=True):
    """The device that a worker will compute on."""

    device: Device


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded."""


class Wants(msgspec.Struct, tag=True, frozen=True):
    """A worker will soon have rendered what it has. It is answered at once, with NoMore where there is no more."""


class Idle(msgspec.Struct, tag=True, frozen=True):
    """A worker has committed all that it had. It is answered when there is something for it again."""


class Ended(msgspec.Struct, tag=True, frozen=True):
    """A worker has ended in order; without an account it had rendered nothing."""

    account: WorkerReport | None


class Alive(msgspec.Struct, tag=True, frozen=True):
    """A worker's device has come a step further."""


class Committed(msgspec.Struct, tag=True, frozen=True):
    """These rows, without their texts, are in the manifest."""

    rows: Sequence[ResultRow]
    account: WorkerReport


class Logged(msgspec.Struct, tag=True, frozen=True):
    """A log record of a worker."""

    name: str
    level: int
    text: str
    created: float

    @classmethod
    def of(cls, record: logging.LogRecord) -> Logged:
        return cls(record.name, record.levelno, encodable(record.getMessage()), record.created)

    def handle(self) -> None:
        """Log it in this process too."""
        values = {"name": self.name, "levelno": self.level, "levelname": logging.getLevelName(self.level)}
        record = logging.makeLogRecord({**values, "msg": self.text, "created": self.created})
        logging.getLogger(self.name).handle(record)


class Broken(msgspec.Struct, tag=True, frozen=True):
    """A worker ends with an error: the name of its class, its message, and the traceback of a bug."""

    kind: str
    told: str
    trace: str


class Begin(msgspec.Struct, tag=True, frozen=True):
    """What a worker renders with."""

    settings: WorkerSettings


class Rows(msgspec.Struct, tag=True, frozen=True):
    """A chunk of rows; `carried` has their carried cells as an Arrow IPC stream."""

    requests: tuple[PromptRequest, ...]
    apart: bool
    carried: bytes

    @classmethod
    def of(cls, chunk: Chunk, carried: pa.Schema) -> Rows:
        bare = tuple(replace(request, carried={}) for request in chunk.requests)
        if not len(carried):
            return cls(bare, chunk.apart, b"")
        cells = [to_array([request.carried.get(field.name) for request in chunk.requests], field.type)
                 for field in carried]  # fmt: skip
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, carried) as stream:
            stream.write_batch(pa.record_batch(cells, schema=carried))
        return cls(bare, chunk.apart, sink.getvalue().to_pybytes())

    def chunk(self) -> Chunk:
        if not self.carried:
            return Chunk(self.requests, self.apart)
        with pa.ipc.open_stream(self.carried) as stream:
            table = stream.read_all()
        columns = [to_values(column) for column in table.columns]
        cells = [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]
        rows = zip(self.requests, cells, strict=True)
        return Chunk(tuple(replace(request, carried=row) for request, row in rows), self.apart)


class NoMore(msgspec.Struct, tag=True, frozen=True):
    """There are no more rows for now."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Give up what is under way, commit what is finished, and end."""


FromWorker = Hello | Found | Ready | Wants | Idle | Alive | Committed | Logged | Broken | Ended
ToWorker = Begin | Rows | NoMore | Stop


def encodable(text: str) -> str:
    """Text with escapes for what UTF-8 does not have: file names may hold any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def encode(message: FromWorker | ToWorker) -> bytes:
    return _encoder.encode(message)


def decode_from_worker(content: bytes) -> FromWorker:
    """Raises msgspec.DecodeError."""
    return _from_worker.decode(content)


def decode_to_worker(content: bytes) -> ToWorker:
    """Raises msgspec.DecodeError."""
    return _to_worker.decode(content)


def _plain(value: Any) -> bytes:
    if isinstance(value, Path):
        return os.fsencode(value)
    if isinstance(value, pa.Schema):
        return bytes(value.serialize())
    raise NotImplementedError(f"no message has a {type(value).__name__}")


def _typed(kind: type, value: Any) -> Any:
    if issubclass(kind, Path):
        return Path(os.fsdecode(value))
    if kind is pa.Schema:
        return pa.ipc.read_schema(pa.py_buffer(value))
    raise NotImplementedError(f"no message has a {kind.__name__}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker, dec_hook=_typed)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker, dec_hook=_typed)
