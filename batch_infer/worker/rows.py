"""Make result rows from requests, and add safety verdicts and stored images."""

from __future__ import annotations

import os
import platform
from dataclasses import replace

from batch_infer.records import PromptRequest, ResultRow, Status, StoredImage, Verdict, utc_now


def make_row(request: PromptRequest, status: Status, error: str | None, *, scheduler: str, worker: str) -> ResultRow:
    """Return the result row of a request, without a verdict or an image."""
    params = request.params
    return ResultRow(
        id=request.id,
        image_index=request.image_index,
        prompt=request.prompt,
        status=status,
        error=error,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        height=params.height,
        width=params.width,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        guidance_rescale=params.guidance_rescale,
        scheduler=scheduler,
        attempt=request.attempt,
        worker=worker,
        finished_at=utc_now(),
        source_file=request.source.file,
        source_row=request.source.row,
        fingerprint=request.fingerprint,
        carried=request.carried,
        line=request.source.line,
    )


def with_verdict(row: ResultRow, verdict: Verdict) -> ResultRow:
    """Return a copy of a row with the safety verdict on its prompt or image."""
    return replace(
        row, nsfw_content_detected=verdict.nsfw, safety_checker=verdict.checker, safety_scores=verdict.scores
    )


def with_image(row: ResultRow, stored: StoredImage | None) -> ResultRow:
    """Return a copy of a row with its stored image, or without an image if `stored` is None."""
    return replace(
        row,
        generated_image=stored.path if stored else None,
        sha256=stored.sha256 if stored else None,
        pixels_sha256=stored.pixels_sha256 if stored else None,
        image_bytes=stored.image_bytes if stored else None,
    )


def explain_flag(verdict: Verdict) -> str:
    """Return the `error` text for the row of a flagged image."""
    return verdict.reason or "the safety check flagged the image"


def format_worker_name(rank: int) -> str:
    """Return the name of this process in result rows: machine, process id and rank."""
    return f"{platform.node()}-{os.getpid()}-{rank}"
