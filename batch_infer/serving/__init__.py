"""Serving: rows of many callers, rendered in one continuously batched pipeline."""

from batch_infer.serving.deployment import Deployment
from batch_infer.serving.scoring import check_parameters, read_rows, score, score_rows
from batch_infer.serving.service import Caller, GivenUp, Service

__all__ = ["Caller", "Deployment", "GivenUp", "Service", "check_parameters", "read_rows", "score", "score_rows"]
