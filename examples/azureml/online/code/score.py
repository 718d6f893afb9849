"""The scoring script of an online endpoint. Its settings are environment variables."""

from batch_infer.azureml.online import init, run

__all__ = ["init", "run"]
