"""Deploy batch-infer to a batch endpoint with Azure ML's Python SDK, score a folder of tables and download images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from azure.ai.ml import Input, MLClient
from azure.ai.ml.constants import AssetTypes, BatchDeploymentOutputAction
from azure.ai.ml.entities import (
    BatchEndpoint,
    BatchRetrySettings,
    CodeConfiguration,
    ModelBatchDeployment,
    ModelBatchDeploymentSettings,
    ResourceConfiguration,
)
from workspace import ENVIRONMENT, HERE, add_arguments, connect, make_environment, prepare, print_yaml, safety_variables


def make_endpoint(arguments: argparse.Namespace) -> BatchEndpoint:
    """Return the endpoint that batch/endpoint.yml defines."""
    return BatchEndpoint(
        name=arguments.endpoint,
        description="Tables of prompts in, images and a table of results out",
        auth_mode="aad_token",
    )


def make_deployment(arguments: argparse.Namespace) -> ModelBatchDeployment:
    """Return the deployment that batch/deployment.yml defines and explains."""
    return ModelBatchDeployment(
        name="packed",
        endpoint_name=arguments.endpoint,
        description="batch-infer, one worker per GPU",
        model=arguments.model,
        environment=f"azureml:{ENVIRONMENT}@latest",
        code_configuration=CodeConfiguration(code=str(HERE / "batch" / "code"), scoring_script="score.py"),
        compute=arguments.compute,
        resources=ResourceConfiguration(instance_count=arguments.instances),
        settings=ModelBatchDeploymentSettings(
            max_concurrency_per_instance=arguments.gpus,
            mini_batch_size=1,
            retry_settings=BatchRetrySettings(max_retries=3, timeout=arguments.timeout),
            error_threshold=-1,
            output_action=BatchDeploymentOutputAction.APPEND_ROW,
            output_file_name="predictions.csv",
            logging_level="info",
            environment_variables={"BATCH_INFER_PREDICTIONS": "card", **safety_variables(arguments)},
        ),
    )


def deploy(client: MLClient, arguments: argparse.Namespace) -> None:
    prepare(client, arguments)
    deployment = make_deployment(arguments)
    client.batch_endpoints.begin_create_or_update(make_endpoint(arguments)).result()
    client.batch_deployments.begin_create_or_update(deployment).result()
    endpoint = client.batch_endpoints.get(arguments.endpoint)
    endpoint.defaults.deployment_name = deployment.name
    client.batch_endpoints.begin_create_or_update(endpoint).result()


def score(client: MLClient, arguments: argparse.Namespace) -> None:
    """Run a job on a folder of tables, and download its output."""
    tables = Input(type=AssetTypes.URI_FOLDER, path=str(arguments.input))
    job = client.batch_endpoints.invoke(endpoint_name=arguments.endpoint, input=tables)
    client.jobs.stream(job.name)
    (scoring,) = client.jobs.list(parent_job_name=job.name)
    client.jobs.download(name=scoring.name, download_path=arguments.out, output_name="score")
    print(f"to write results.parquet, run: batch-infer merge {arguments.out / 'named-outputs' / 'score'}")


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, "prompts-to-images")
    parser.add_argument("--compute", default="azureml:gpu-cluster", help="a compute cluster of the workspace")
    parser.add_argument("--instances", type=int, default=1, help="number of machines")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs per machine, which is the number of workers")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds per mini-batch of one file")
    parser.add_argument("--input", type=Path, metavar="FOLDER", help="score the tables in this folder afterwards")
    parser.add_argument("--out", type=Path, default=Path("scored"), help="output folder")
    arguments = parser.parse_args(command_line)
    if arguments.dry_run:
        print_yaml(make_environment(), make_endpoint(arguments), make_deployment(arguments))
        return
    client = connect(arguments)
    deploy(client, arguments)
    if arguments.input:
        score(client, arguments)


if __name__ == "__main__":
    main()
