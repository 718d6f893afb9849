"""What an Azure ML online endpoint runs: batch-infer's door, which reads its settings from the environment."""

from batch_infer.azureml.online import init, run

__all__ = ["init", "run"]
