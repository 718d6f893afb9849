"""Serve rows of many clients from one continuously batched pipeline, behind any cloud's endpoint.

A `Service` holds the loaded model. `read_rows` and `score` turn rows into the objects of a response.
"""

from batch_infer.serving.scoring import check_parameters, read_rows, score, score_rows
from batch_infer.serving.service import Client, Deployment, RequestCancelledError, Service

__all__ = [
    "Client",
    "Deployment",
    "RequestCancelledError",
    "Service",
    "check_parameters",
    "read_rows",
    "score",
    "score_rows",
]
