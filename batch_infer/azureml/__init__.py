"""Azure ML: the scoring scripts of its batch and real-time endpoints, and the code of the MLflow model.

Only what is Azure's is here; rows are rendered by `serving` (real-time) and by the worker of `jobs` (batch).
"""
