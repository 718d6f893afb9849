"""Deploy batch-infer to an online endpoint with Azure ML's Python SDK, send a request and store the images."""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Sequence
from pathlib import Path

from azure.ai.ml import MLClient
from azure.ai.ml.entities import (
    CodeConfiguration,
    ManagedOnlineDeployment,
    ManagedOnlineEndpoint,
    OnlineRequestSettings,
    ProbeSettings,
)
from workspace import ENVIRONMENT, HERE, add_arguments, connect, make_environment, prepare, print_yaml, safety_variables


def make_endpoint(arguments: argparse.Namespace) -> ManagedOnlineEndpoint:
    """Return the endpoint that online/endpoint.yml defines."""
    return ManagedOnlineEndpoint(
        name=arguments.endpoint, description="A request with prompts in, their images out", auth_mode="key"
    )


def make_deployment(arguments: argparse.Namespace) -> ManagedOnlineDeployment:
    """Return the deployment that online/deployment.yml defines and explains."""
    probe = ProbeSettings(initial_delay=120, period=30, timeout=10, success_threshold=1, failure_threshold=30)
    return ManagedOnlineDeployment(
        name="packed",
        endpoint_name=arguments.endpoint,
        description="batch-infer, batching across requests",
        model=arguments.model,
        environment=f"azureml:{ENVIRONMENT}@latest",
        code_configuration=CodeConfiguration(code=str(HERE / "online" / "code"), scoring_script="score.py"),
        instance_type=arguments.instance_type,
        instance_count=arguments.instances,
        request_settings=OnlineRequestSettings(request_timeout_ms=180_000, max_concurrent_requests_per_instance=32),
        liveness_probe=probe,
        readiness_probe=probe,
        environment_variables={
            "WORKER_COUNT": "1",
            "GUNICORN_CMD_ARGS": "--threads 40",
            "WORKER_TIMEOUT": "900",
            "BATCH_INFER_REQUEST_TIMEOUT": "170",
            **safety_variables(arguments),
        },
    )


def deploy(client: MLClient, arguments: argparse.Namespace) -> None:
    prepare(client, arguments)
    endpoint, deployment = make_endpoint(arguments), make_deployment(arguments)
    client.online_endpoints.begin_create_or_update(endpoint).result()
    client.online_deployments.begin_create_or_update(deployment).result()
    endpoint.traffic = {deployment.name: 100}
    client.online_endpoints.begin_create_or_update(endpoint).result()


def send_request(client: MLClient, arguments: argparse.Namespace) -> None:
    """Send a request, and write the images of the response as files."""
    response = client.online_endpoints.invoke(endpoint_name=arguments.endpoint, request_file=str(arguments.request))
    for number, row in enumerate(json.loads(response)):
        if row["generated_image"] is None:
            print(f"{row['prompt']}: {row['error']}")
            continue
        file = Path(f"image-{number}.png")
        file.write_bytes(base64.b64decode(row["generated_image"]))
        print(f"{file}: {row['prompt']}")


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, "prompt-to-image")
    parser.add_argument("--instance-type", default="Standard_NC24ads_A100_v4", help="a machine with one GPU")
    parser.add_argument("--instances", type=int, default=1, help="number of machines")
    parser.add_argument(
        "--request", type=Path, metavar="FILE", help="send this request afterwards and store the images"
    )
    arguments = parser.parse_args(command_line)
    if arguments.dry_run:
        print_yaml(make_environment(), make_endpoint(arguments), make_deployment(arguments))
        return
    client = connect(arguments)
    deploy(client, arguments)
    if arguments.request:
        send_request(client, arguments)


if __name__ == "__main__":
    main()
