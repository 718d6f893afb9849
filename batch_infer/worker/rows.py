"""Result rows: what is said of a request once something has become of it."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from typing import TYPE_CHECKING

from batch_infer.records import PromptRequest, ResultRow, Status, StoredImage, Verdict, utc_now

if TYPE_CHECKING:
    from batch_infer.chain import Rendered


def make_row(request: PromptRequest, status: Status, error: str | None, *, scheduler: str, worker: str) -> ResultRow:
    """A request of which nothing more is known than how it ended."""
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


def set_verdict(row: ResultRow, verdict: Verdict) -> ResultRow:
    """The row with what was said of its prompt or image."""
    return replace(
        row,
        nsfw_content_detected=verdict.nsfw,
        safety_checker=verdict.checker,
        safety_scores=verdict.scores,
    )


def set_image(row: ResultRow, stored: StoredImage | None) -> ResultRow:
    """The row with the image that is stored of it, or with none."""
    return replace(
        row,
        generated_image=stored.path if stored else None,
        sha256=stored.sha256 if stored else None,
        pixels_sha256=stored.pixels_sha256 if stored else None,
        image_bytes=stored.image_bytes if stored else None,
    )


def set_rendering(row: ResultRow, outcome: Rendered, stored: StoredImage | None) -> ResultRow:
    """The row of a request that was rendered; None is stored where the policy drops flagged images."""
    conditioning = outcome.conditioning
    return replace(
        set_image(set_verdict(row, outcome.verdict), stored),
        prompt_tokens=conditioning.prompt_tokens,
        prompt_truncated=conditioning.prompt_truncated,
        slots=outcome.slots,
        seconds=outcome.seconds,
    )


def explain_flag(verdict: Verdict) -> str:
    """The sentence of a flagged image."""
    return verdict.reason or "the safety check flagged the image"


def format_worker_name(rank: int) -> str:
    """The name of a worker in the rows that it commits: machine, process and rank."""
    return f"{platform.node()}-{os.getpid()}-{rank}"
