"""Which model, and what is changed about it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from batch_infer.errors import SettingsError


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which model, and how it computes. `name` None is the built-in demo model."""

    name: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    scheduler: SchedulerSpec | None = None
    loras: tuple[LoraSpec, ...] = ()
    long_prompts: bool = False


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """A diffusers scheduler class and the options to make it with, beside the model's own."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> SchedulerSpec:
        """Read `NAME[:key=value,...]`; a value is JSON where it can be, else a string. Raises SettingsError."""
        name, _, rest = text.partition(":")
        options = []
        for part in rest.split(",") if rest else []:
            key, equals, value = part.partition("=")
            if not equals or not key.strip().isidentifier():
                raise SettingsError(f"--scheduler {text}: {part!r} is not key=value")
            options.append((key.strip(), _value(value.strip())))
        if not name.isidentifier():
            raise SettingsError(f"--scheduler {text}: {name!r} is not the name of a diffusers scheduler class")
        return cls(name, tuple(sorted(options)))

    def __str__(self) -> str:
        options = ",".join(f"{key}={json.dumps(value)}" for key, value in self.options)
        return f"{self.name}:{options}" if options else self.name


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """A LoRA's file, and how much of it is added to the model's weights."""

    file: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraSpec:
        """Read `FILE[:WEIGHT]`; FILE ends in .safetensors, and colons may stand in its path. Raises SettingsError."""
        file, ending, rest = text.rpartition(".safetensors")
        colon, weight = rest[:1], rest[1:]
        if not ending or colon not in ("", ":"):
            raise SettingsError(f"--lora {text}: say FILE.safetensors or FILE.safetensors:WEIGHT")
        try:
            found = float(weight) if colon else 1.0
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise SettingsError(f"--lora {text}: the weight {weight!r} is not a finite number")
        return cls(file + ending, found)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)
