"""What an Azure ML batch endpoint runs: batch-infer's door, which reads its settings from the environment."""

from batch_infer.azureml.batch import init, run, shutdown

__all__ = ["init", "run", "shutdown"]
