"""What a service is deployed with, whichever cloud's endpoint it is behind."""

from __future__ import annotations

from dataclasses import dataclass

from batch_infer.models import ModelCard
from batch_infer.settings import Compute, RunSettings
from batch_infer.table import RowRules


@dataclass(frozen=True, slots=True)
class Deployment:
    """The settings, model, compute and row rules that are fixed before the first request comes."""

    settings: RunSettings
    card: ModelCard
    compute: Compute
    rules: RowRules
