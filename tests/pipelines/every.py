"""All tiny pipelines by the name of their class."""

from __future__ import annotations

from tests.pipelines import language, qwen, texts, unets
from tests.pipelines.parts import TinyPipeline

PIPELINES: dict[str, TinyPipeline] = {
    **unets.PIPELINES,
    **texts.PIPELINES,
    **language.PIPELINES,
    **qwen.PIPELINES,
}
