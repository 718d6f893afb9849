"""Adapt batch-infer to Azure ML: scoring scripts for batch and real-time endpoints, and the code of the MLflow model.

Real-time endpoints and the MLflow model render rows with `serving`, and batch endpoints with `worker`.
"""
