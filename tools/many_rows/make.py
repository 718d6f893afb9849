"""Make a table with many rows and an OUT with made-up results: `python -m tools.many_rows.make FOLDER ROWS IMAGES`."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_infer.images import encode
from batch_infer.jobs.job import open_tables
from batch_infer.jobs.out import read_existing_run, write_run
from batch_infer.jobs.run_json import read_rules, read_settings
from batch_infer.manifest import Manifest
from batch_infer.records import PromptRequest, ResultRow, utc_now
from batch_infer.sinks import make_sink
from batch_infer.store import open_store
from batch_infer.table import RowRules, Tables
from tools.many_rows.commands import OUT, RUN, TABLE

TABLE_ROWS = 1 << 16
COMMIT_ROWS = 256
COMPACTION_PARTS = 256
IMAGE_SIDES = 37, 51
"""Smallest and largest side of an image of noise, whose file has 4 to 8 kB."""


def write_table(path: Path, rows: int) -> None:
    """Write a table of prompts with one carried column."""
    schema = pa.schema([("prompt", pa.string()), ("topic", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, TABLE_ROWS):
            numbers = range(start, min(rows, start + TABLE_ROWS))
            prompts = [f"a photograph of object {number} in soft light, 35 mm" for number in numbers]
            writer.write_table(pa.table([prompts, [f"topic {number % 100}" for number in numbers]], schema=schema))


def make_out(folder: Path, rows: int, *, images: bool) -> None:
    """Write a table and an OUT as a finished run of it leaves them, except for results.*."""
    table, out = folder / TABLE, folder / OUT
    write_table(table, 1)
    subprocess.run([*RUN, "--quiet"], check=True, cwd=folder)  # writes run.json
    for part in (out / "manifest").iterdir():
        part.unlink()
    write_table(table, rows)
    store = open_store(out)
    record = read_existing_run(store)
    rules = read_rules(record, store.location)
    manifest = Manifest(store, 1)
    with open_tables(read_settings(record, store.location)) as tables:
        for number, batch in enumerate(_make_results(tables, rules, out, images=images)):
            manifest.commit(batch, tables.carried)
            if number % COMPACTION_PARTS == COMPACTION_PARTS - 1:
                manifest.compact(1)
                print(f"\r{(number + 1) * COMMIT_ROWS:,} rows", end="", file=sys.stderr)
        manifest.compact(1)
        digest = tables.compute_digest(rules)
    counts = {"rows": rows, "images": rows, "ok": rows}
    survey = {"total": rows, "done": 0, "pending": rows, "tables_digest": digest, "tables_since": 1}
    record |= {"survey": {**survey, "finished_at": utc_now()}, "summary": {**record["summary"], **counts, "flagged": 0}}
    write_run(store, record)


def _make_results(tables: Tables, rules: RowRules, out: Path, *, images: bool) -> Iterator[list[ResultRow]]:
    """Yield made-up results of all rows in batches, and write their images."""
    sink, start, generator = make_sink(out), utc_now(), random.Random(0)
    requests = (item for item in tables.read_rows(rules) if isinstance(item, PromptRequest))
    while batch := list(islice(requests, COMMIT_ROWS)):
        results = []
        for request in batch:
            content = _make_image(generator) if images else request.id.encode()
            path, digest = sink.path_of(request), hashlib.sha256(content).hexdigest()
            if images:
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                (out / path).write_bytes(content)
            results.append(
                ResultRow(
                    id=request.id,
                    image_index=request.image_index,
                    prompt=request.prompt,
                    generated_image=path,
                    nsfw_content_detected=False,
                    status="ok",
                    seed=request.seed,
                    height=request.params.height,
                    width=request.params.width,
                    num_inference_steps=request.params.num_inference_steps,
                    guidance_scale=request.params.guidance_scale,
                    guidance_rescale=request.params.guidance_rescale,
                    scheduler="DDIMScheduler",
                    prompt_tokens=12,
                    prompt_truncated=False,
                    safety_checker="demo",
                    safety_scores={"red": 0.1},
                    sha256=digest,
                    pixels_sha256=digest,
                    image_bytes=len(content),
                    slots=8,
                    seconds=0.1,
                    worker="host/cpu:0",
                    finished_at=start + timedelta(seconds=request.source.row / 100),
                    source_file=request.source.file,
                    source_row=request.source.row,
                    fingerprint=request.fingerprint,
                    carried=request.carried,
                )
            )
        yield results


def _make_image(generator: random.Random) -> bytes:
    side = generator.randint(*IMAGE_SIDES)
    pixels = np.frombuffer(generator.randbytes(3 * side * side), np.uint8).reshape(side, side, 3)
    return encode(pixels, "png", None, has_mark=False)


if __name__ == "__main__":
    make_out(Path(sys.argv[1]), int(sys.argv[2]), images=sys.argv[3] == "True")
