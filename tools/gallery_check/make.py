"""Make a gallery of made-up results with the real exporter. Its thumbnails are hard links to a few hundred pictures."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
from PIL import ImageFilter

from batch_infer.galleries import GalleryInfo, Snapshot, TileOptions, write_gallery
from batch_infer.galleries.pictures import make_name
from batch_infer.manifest import SCHEMA
from batch_infer.store import open_store
from tools.gallery_check.pictures import draw_landscape, encode

THUMBNAIL_SIDE = 256
DISTINCT = 500
FULL_SIDE = 768
DISTINCT_FULL = 24
IMAGES_PER_PROMPT = 4
BATCH = 2000
STATUSES = ("ok", "flagged", "blocked", "invalid", "failed")
WEIGHTS = (930, 25, 10, 15, 20)
ERRORS = {
    "flagged": "The safety checker flagged the image.",
    "blocked": "The prompt was blocked: Violence 6.",
    "invalid": "height: 513 is not a multiple of 8.",
    "failed": "Out of memory while decoding. Lower --slots or use --offload model.",
}
PLACES = ("a mountain lake", "rolling hills", "a quiet valley", "a desert plain", "a northern coast", "a river delta")
TIMES = ("at dawn", "at dusk", "in fog", "after rain", "under a pale sun", "in late autumn")
STYLES = ("watercolour", "35 mm film", "oil on canvas", "woodblock print", "pencil sketch", "matte painting")
DETAILS = "soft light, fine detail, muted colours, wide angle, gentle grain, distant ridges fading into haze"
CARRIED = {"style": pa.string(), "campaign": pa.string(), "weight": pa.float64(), "note": pa.string()}
SCHEMA_WITH_CARRIED = pa.schema([*SCHEMA, *CARRIED.items()])
START = datetime(2026, 3, 1, 22, tzinfo=timezone.utc)
SUMMARY = {
    **{"images_per_second": 2.04, "occupancy": 0.973, "mfu": 0.41, "cost": 12.3},
    "stage_shares": {"encode": 0.02, "denoise": 0.86, "decode": 0.1, "check": 0.02},
}


class LinkedImages:
    """Images of OUT that exist, so that the exporter reads none of those whose thumbnail exists."""

    def has(self, path: str) -> bool:
        return True

    def read(self, path: str) -> bytes | None:
        return None

    def link(self, path: str) -> str | None:
        return f"../{quote(path)}"


def make_result(number: int) -> dict[str, Any]:
    """Return a made-up result. Results of one prompt follow each other and differ in seed and guidance."""
    prompt_number, index = divmod(number, IMAGES_PER_PROMPT)
    shared, own = random.Random(prompt_number), random.Random(f"result {number}")
    style = shared.choice(STYLES)
    prompt = f"{shared.choice(PLACES)} {shared.choice(TIMES)}, {style}, number {prompt_number}, "
    (status,) = own.choices(STATUSES, WEIGHTS)
    has_image = status in ("ok", "flagged")
    row = {
        **{"id": f"prompts-{prompt_number:08d}", "image_index": index, "prompt": prompt + DETAILS},
        "generated_image": f"images/{number % DISTINCT_FULL}.png" if has_image else None,
        **{"nsfw_content_detected": status == "flagged" if has_image else None, "status": status},
        **{"error": ERRORS.get(status), "negative_prompt": shared.choice([None, "blurry, low quality"])},
        **{"seed": (prompt_number * 7919) % 2**32 + index, "height": FULL_SIDE, "width": FULL_SIDE},
        **{"num_inference_steps": shared.choice([20, 30, 50]), "guidance_scale": (3.5, 5.0, 7.5, 9.0)[index]},
        **{"guidance_rescale": 0.0, "scheduler": "EulerDiscreteScheduler", "prompt_tokens": 38},
        **{"prompt_truncated": prompt_number % 40 == 0, "safety_checker": "checker" if has_image else None},
        **{"sha256": f"{number:064x}" if has_image else None, "image_bytes": 812_345 if has_image else None},
        **{"slots": 16, "seconds": 1.2 + own.random() if has_image else None, "attempt": 1},
        **{"worker": f"gpu-{number % 4}", "finished_at": START + timedelta(seconds=number / 2 + own.random())},
        **{"source_file": "prompts.csv", "source_row": prompt_number, "fingerprint": f"{prompt_number:032x}"},
        **{"style": style, "campaign": f"campaign {shared.randrange(40):02d}", "weight": round(shared.random(), 3)},
        "note": f"note {prompt_number}",
    }
    if has_image:
        row["safety_scores"] = [{"category": name, "score": own.random() ** 4} for name in ("nsfw", "violence")]
    return row


def write_pictures(folder: Path) -> None:
    """Write the distinct thumbnails, plain and blurred, and the full images, unless they exist."""
    pool, images = folder / "pictures", folder / "images"
    pool.mkdir(parents=True, exist_ok=True)
    images.mkdir(exist_ok=True)
    for number in range(DISTINCT):
        path = pool / f"{number}.webp"
        if not path.exists():
            picture = draw_landscape(number, THUMBNAIL_SIDE)
            blurred = picture.filter(ImageFilter.GaussianBlur(THUMBNAIL_SIDE / 12))
            (pool / f"flagged-{number}.webp").write_bytes(encode(blurred, "webp", quality=80, method=2))
            path.write_bytes(encode(picture, "webp", quality=80, method=2))
    for number in range(DISTINCT_FULL):
        path = images / f"{number}.png"
        if not path.exists():
            path.write_bytes(encode(draw_landscape(number, FULL_SIDE), "png"))


def link_thumbnails(folder: Path, rows: int) -> None:
    """Put a thumbnail under the name that the exporter gives it for each result with an image."""
    for number in range(rows):
        result = make_result(number)
        if result["generated_image"] is None:
            continue
        is_flagged = result["status"] == "flagged"
        path = folder / "gallery" / "thumbs" / make_name("thumbnail", THUMBNAIL_SIDE, is_flagged, result["sha256"])
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = number % DISTINCT_FULL + DISTINCT_FULL * (number // DISTINCT_FULL % (DISTINCT // DISTINCT_FULL))
            os.link(folder / "pictures" / f"{'flagged-' if is_flagged else ''}{picture}.webp", path)


def iterate_tables(rows: int) -> Iterator[pa.Table]:
    """Yield the results in tables."""
    for start in range(0, rows, BATCH):
        results = [make_result(number) for number in range(start, min(rows, start + BATCH))]
        yield pa.Table.from_pylist(results, SCHEMA_WITH_CARRIED)


def make_gallery(folder: Path, rows: int) -> Path:
    """Write a gallery of synthetic results, and return the path of its page. An existing one is written again."""
    write_pictures(folder)
    link_thumbnails(folder, rows)
    model = "stabilityai/stable-diffusion-xl-base-1.0"
    run = {
        **{"model": model, "model_options": ["--model", model], "on_flagged": "keep"},
        **{"scheduler": "EulerDiscreteScheduler", "started_at": str(START), "summary": SUMMARY | {"seconds": rows / 2}},
    }
    with Snapshot(SCHEMA_WITH_CARRIED) as snapshot, open_store(folder / "gallery").locked() as store:
        for table in iterate_tables(rows):
            snapshot.add(table)
        info = GalleryInfo("landscapes", "out/landscapes", f"check-{rows}", 0, time.time(), run)
        write_gallery(store, snapshot, LinkedImages(), info, TileOptions(THUMBNAIL_SIDE, 2))
    return folder / "gallery" / "index.html"
