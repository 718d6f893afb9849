"""The scoring script of a batch endpoint. Its settings are environment variables."""

from batch_infer.azureml.batch import init, run, shutdown

__all__ = ["init", "run", "shutdown"]
