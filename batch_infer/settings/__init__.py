"""What a run was asked to do, as the command line, the environment and a script all say it."""

from batch_infer.settings.compute import BatchShape, Compute, ComputeSettings, Device
from batch_infer.settings.model import SHORT_NAMES, LoraSpec, ModelSettings, SchedulerSpec
from batch_infer.settings.run import (
    FIELDS,
    IMAGE_SUFFIXES,
    FailureBudget,
    IdSource,
    ImageFormat,
    OutputSettings,
    ResultsFormat,
    Retried,
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
    "FIELDS",
    "FailureBudget",
    "IMAGE_SUFFIXES",
    "IdSource",
    "ImageFormat",
    "LoraSpec",
    "ModelSettings",
    "OnFlagged",
    "OutputSettings",
    "ResultsFormat",
    "Retried",
    "RowDefaults",
    "RunSettings",
    "SHORT_NAMES",
    "SafetyMode",
    "SafetySettings",
    "SchedulerSpec",
    "ServiceSettings",
    "TableSettings",
]
