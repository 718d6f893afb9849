"""Prepare a workspace for both deployment scripts: connection, environment and model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from azure.ai.ml import MLClient
from azure.ai.ml.constants import AssetTypes
from azure.ai.ml.entities import BuildContext, Environment, Model
from azure.identity import DefaultAzureCredential

HERE = Path(__file__).resolve().parent
CONTEXT = HERE / "environment"
MODEL, ENVIRONMENT = "decidiffusion", "batch-infer"


def add_arguments(parser: argparse.ArgumentParser, endpoint: str) -> None:
    parser.add_argument("--endpoint", default=endpoint, help="a name that is not in use in the region")
    parser.add_argument("--model", default=f"azureml:{MODEL}@latest", help="a model in the workspace")
    parser.add_argument("--register", type=Path, metavar="DIR", help=f"first register this folder as {MODEL}")
    parser.add_argument("--content-safety", metavar="ENDPOINT", help="also use Azure AI Content Safety")
    parser.add_argument("--subscription", help="used only with --workspace")
    parser.add_argument("--resource-group", help="used only with --workspace")
    parser.add_argument("--workspace", help="default: the workspace in config.json, in this folder or a parent")
    parser.add_argument("--dry-run", action="store_true", help="print the YAML of all resources without connecting")


def make_environment() -> Environment:
    """Return the environment that environment.yml defines."""
    health, score = {"path": "/", "port": 5001}, {"path": "/score", "port": 5001}
    return Environment(
        name=ENVIRONMENT,
        description="batch-infer for batch and online endpoints",
        build=BuildContext(path=str(CONTEXT), dockerfile_path="Dockerfile"),
        inference_config={"liveness_route": health, "readiness_route": health, "scoring_route": score},
    )


def safety_variables(arguments: argparse.Namespace) -> dict[str, str]:
    if not arguments.content_safety:
        return {"BATCH_INFER_SAFETY": "auto"}
    return {"BATCH_INFER_SAFETY": "checker,azure", "CONTENT_SAFETY_ENDPOINT": arguments.content_safety}


def print_yaml(*entities: Any) -> None:
    """Print entities as YAML that the CLI accepts."""
    for entity in entities:
        print("---")
        if values := entity.dump(sys.stdout):  # endpoints return a dictionary instead of writing YAML
            yaml.safe_dump(json.loads(json.dumps(values)), sys.stdout)


def connect(arguments: argparse.Namespace) -> MLClient:
    credential = DefaultAzureCredential()
    if arguments.workspace is None:
        return MLClient.from_config(credential)
    return MLClient(credential, arguments.subscription, arguments.resource_group, arguments.workspace)


def prepare(client: MLClient, arguments: argparse.Namespace) -> None:
    """Create the environment, and register the model if --register names a folder."""
    if not list(CONTEXT.glob("batch_infer-*.whl")):
        sys.exit(f"{CONTEXT} has no wheel: pip wheel --no-deps --wheel-dir {CONTEXT} {HERE.parent.parent}")
    client.environments.create_or_update(make_environment())
    if arguments.register:
        client.models.create_or_update(Model(name=MODEL, path=arguments.register, type=AssetTypes.CUSTOM_MODEL))
