"""Adapt batch-infer to Azure ML: scoring scripts for batch and real-time endpoints, and the code of the MLflow model.

Rows are rendered by `serving` (real-time endpoints) and by the worker of `jobs` (batch endpoints).
"""
