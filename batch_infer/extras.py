"""List the optional packages of each extra in pyproject.toml, and say how to install them."""

from __future__ import annotations

import re
import shlex

EXTRAS = {
    "s3": ("s3fs",),
    "gs": ("gcsfs",),
    "abfss": ("adlfs",),
    "https": ("aiohttp",),
    "plot": ("matplotlib",),
    "lora": ("peft",),
    "long-prompts": ("compel", "pyparsing"),
    "quantize": ("torchao", "bitsandbytes"),
    "mlflow": ("mlflow-skinny",),
    "azure": ("azure-ai-contentsafety", "azure-identity", "tenacity", "pyrate-limiter", "requests"),
    "ray": ("ray",),
    "nvml": ("nvidia-ml-py",),
    "sign": ("cryptography",),
    "provenance": ("c2pa-python", "wmforge<0.2"),
    "azureml": ("azureml-inference-server-http",),
}
"""The packages of each extra. One that needs an upper bound has it."""


def install_command(extra: str, package: str | None = None) -> str:
    """Return the pip command that installs the packages of an extra, or the one named `package`.

    Messages name the packages and not the extra, so that the command works wherever batch-infer itself came from.
    """
    names = {re.split("[<>=]", requirement)[0]: requirement for requirement in EXTRAS[extra]}
    requirements = list(names.values()) if package is None else [names[package]]
    return shlex.join(["pip", "install", *requirements])
