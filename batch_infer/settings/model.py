"""Define the settings of the model, its scheduler and its LoRAs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from batch_infer.errors import SettingsError

Quantization = Literal["fp8", "int8", "nf4"]

_KARRAS = {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_WITH_KARRAS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", _SDE),
    "dpm++ sde": ("DPMSolverSinglestepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}
SHORT_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    **_WITH_KARRAS,
    **{f"{name} karras": (class_name, {**options, **_KARRAS}) for name, (class_name, options) in _WITH_KARRAS.items()},
    "euler a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
"""Short names, most of them sampler names of AUTOMATIC1111, with diffusers' classes and options.

diffusers documents many of these equivalents:
https://huggingface.co/docs/diffusers/api/schedulers/overview
"""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Model settings. If `name` is None, the demo model is used.

    `lora_folder` contains the LoRAs that rows may name in their column `lora`.
    """

    name: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    scheduler: SchedulerSpec | None = None
    loras: tuple[LoraSpec, ...] = ()
    long_prompts: bool = False
    quantize: Quantization | None = None
    lora_folder: str | None = None
    embeddings: tuple[EmbeddingSpec, ...] = ()

    def as_options(self) -> list[str]:
        """Return the command line options that select this model, without --device, which chooses where it runs."""
        values: dict[str, Iterable[object]] = {
            **{"--model": [self.name], "--revision": [self.revision], "--variant": [self.variant]},
            **{"--lora": self.loras, "--lora-folder": [self.lora_folder], "--embedding": self.embeddings},
            **{"--quantize": [self.quantize], "--scheduler": [self.scheduler]},
            "--dtype": [None if self.dtype == "auto" else self.dtype],
        }
        words = [word for name, items in values.items() for item in items if item for word in (name, str(item))]
        return [*words, "--long-prompts"] if self.long_prompts else words


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """Diffusers scheduler class, with options that override the model's."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> SchedulerSpec:
        """Parse `NAME[:key=value,...]`. Raises SettingsError.

        NAME is the name of a class or one of SHORT_NAMES. In short names, case does not matter, and hyphens or
        underscores may replace spaces. A value is JSON, True, False or None; any other text is a string.
        """
        word, _, rest = text.partition(":")
        short = re.sub(r"[\s_-]+", " ", word.strip().lower()).replace("dpmpp", "dpm++")
        name, preset = SHORT_NAMES.get(short, (word.strip(), {}))
        options = dict(preset)
        for part in rest.split(",") if rest else []:
            key, equals, value = part.partition("=")
            if not equals or not key.strip().isidentifier():
                raise SettingsError(f"--scheduler {text}: {part!r} is not key=value")
            options[key.strip()] = _parse_value(value.strip())
        if not name.isidentifier():
            similar = get_close_matches(short, SHORT_NAMES, n=2)
            hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
            raise SettingsError(f"--scheduler {text}: {name!r} is not the name of a diffusers scheduler class{hint}")
        return cls(name, tuple(sorted(options.items())))

    def __str__(self) -> str:
        options = ",".join(f"{key}={json.dumps(value)}" for key, value in self.options)
        return f"{self.name}:{options}" if options else self.name


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """LoRA file, and the weight with which it is added to the model."""

    file: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraSpec:
        """Parse `FILE[:WEIGHT]`. FILE ends in .safetensors and may contain colons. Raises SettingsError."""
        name, suffix, rest = text.rpartition(".safetensors")
        colon, number = rest[:1], rest[1:]
        if not suffix or colon not in ("", ":"):
            raise SettingsError(f"--lora {text}: expected FILE.safetensors or FILE.safetensors:WEIGHT")
        try:
            return cls(name + suffix, parse_weight(number) if colon else 1.0)
        except ValueError as error:
            raise SettingsError(f"--lora {text}: {error}") from error

    def __str__(self) -> str:
        return f"{self.file}:{self.weight}"


def parse_weight(text: str) -> float:
    """Parse the weight of a LoRA. Raises ValueError."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"the weight {text!r} is not a finite number")
    return weight


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """File of a textual inversion embedding, and the token that represents it, or None for the file's own."""

    file: str
    token: str | None = None

    @classmethod
    def parse(cls, text: str) -> EmbeddingSpec:
        """Parse `FILE[:TOKEN]`. FILE ends in .safetensors and may contain colons. Raises SettingsError."""
        name, suffix, rest = text.rpartition(".safetensors")
        if not suffix or rest == ":" or rest[:1] not in ("", ":"):
            raise SettingsError(f"--embedding {text}: expected FILE.safetensors or FILE.safetensors:TOKEN")
        return cls(name + suffix, rest[1:] or None)

    def __str__(self) -> str:
        return self.file if self.token is None else f"{self.file}:{self.token}"


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)
