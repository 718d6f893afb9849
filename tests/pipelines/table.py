"""Write docs/pipelines.md: which denoiser calls the rows of each pipeline share, as measured with tiny networks.

Run `python -m tests.pipelines.table`. tests/test_every_pipeline.py checks the lines.
"""

from __future__ import annotations

from pathlib import Path

import torch

from batch_infer.models import AnyPipeline
from tests.pipelines.every import PIPELINES
from tests.pipelines.measuring import make_model, make_pipeline, measure_sharing

TABLE = Path(__file__).parents[2] / "docs" / "pipelines.md"
INTRODUCTION = """\
# Which pipelines batch rows

In a pipeline without a [model family](models.md), each row runs the pipeline's own `__call__`, and rows of
one image size share the calls of its networks. Rows may differ in their texts, steps, guidance and seeds.

Which rows share denoiser calls depends on the pipeline, and is tested when a model is loaded. A call is shared only if
each row gets the result of its own call up to rounding, and the same bytes whatever rows it is batched with. A pipeline
whose rows share no calls renders one row at a time.

The table was measured on a CPU in float32, with tiny random networks of each class, by
`python -m tests.pipelines.table` in a checkout. Other classes are tested in the same way on loading. The classes of
model families are in the table for comparison: their checkpoints do not run like this.

In the last column, a mask is an attention mask that hides the padding of a text. A call that also contains the longest
and the shortest text has two elements that belong to no row, so that the network always pads to the same length. If a
network does not compute the rows of a batch separately, it is called for one row at a time. Parentheses contain the
error of torch or diffusers.

| pipeline | rows that share denoiser calls | how, or why not |
|--|--|--|
"""
PADDED = "texts are padded to one length, with a mask"
WITH_STAND_INS = "each call also contains the longest and the shortest text"


def describe(model: AnyPipeline) -> str:
    """Return the line of a pipeline in the table."""
    plan = model.plan
    notes = [PADDED] * bool(plan.paddings) + [WITH_STAND_INS] * bool(plan.stand_ins) + list(plan.reasons)
    return f"| {type(model.pipeline).__name__} | {measure_sharing(model).describe()} | {'; '.join(notes)} |"


def main() -> None:
    """Measure all pipelines and write the table."""
    torch.set_num_threads(1)
    lines = [describe(make_model(make_pipeline(name))) for name in sorted(PIPELINES)]
    TABLE.write_text(INTRODUCTION + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
