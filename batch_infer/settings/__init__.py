"""Define the settings of a run, from the command line, the environment, a TOML file or Python.

Classes that parse or check their values raise SettingsError.
"""

from batch_infer.settings.model import (
    SHORT_NAMES,
    EmbeddingSpec,
    LoraSpec,
    ModelSettings,
    Quantization,
    SchedulerSpec,
    parse_weight,
)
from batch_infer.settings.run import (
    FIELDS,
    IMAGE_SUFFIXES,
    LORA_FIELD,
    BatchShape,
    Compute,
    ComputeSettings,
    Device,
    EngineName,
    FailureBudget,
    IdSource,
    ImageFormat,
    Offload,
    OutputSettings,
    ResultsFormat,
    RetryStatus,
    RowDefaults,
    RunSettings,
    TableSettings,
)
from batch_infer.settings.safety import CATEGORIES, OnFlagged, SafetyMode, SafetySettings, ServiceSettings

__all__ = [
    "BatchShape",
    "CATEGORIES",
    "Compute",
    "ComputeSettings",
    "Device",
    "EmbeddingSpec",
    "EngineName",
    "FIELDS",
    "FailureBudget",
    "IMAGE_SUFFIXES",
    "IdSource",
    "LORA_FIELD",
    "ImageFormat",
    "LoraSpec",
    "ModelSettings",
    "Offload",
    "OnFlagged",
    "OutputSettings",
    "Quantization",
    "ResultsFormat",
    "RetryStatus",
    "RowDefaults",
    "RunSettings",
    "SHORT_NAMES",
    "SafetyMode",
    "SafetySettings",
    "SchedulerSpec",
    "ServiceSettings",
    "TableSettings",
    "parse_weight",
]
