"""Find syntax of other programs in prompts, which is rendered as plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from batch_infer.table.base import Notice
from batch_infer.table.fields import format_value

WILDCARD = re.compile(r"""\{[^{}"]*\|[^{}"]*\}""")
"""Matches alternatives of Dynamic Prompts (`{red|blue}`), but not JSON, whose strings are quoted."""
LORA_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]+>", re.IGNORECASE)
"""Matches extra networks of AUTOMATIC1111's web UI (`<lora:style:0.8>`)."""
SYNTAXES = {
    WILDCARD: "prompts with alternatives such as {red|blue}, which are rendered word for word (write one row for each)",
    LORA_TAG: "prompts with tags such as <lora:name:0.8>, which are rendered word for word (add a LoRA with --lora, or "
    "a LoRA for each row with --lora-folder)",
}
"""The kind of the notice for each syntax."""


def find_foreign_syntax(prompt: Any) -> Iterator[Notice]:
    """Yield a notice for each syntax of another program in a prompt cell."""
    if not isinstance(prompt, str) or not ("{" in prompt or "<" in prompt):
        return
    for pattern, kind in SYNTAXES.items():
        if match := pattern.search(prompt):
            yield Notice(kind, format_value(match[0]))
