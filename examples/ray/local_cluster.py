"""Start a Ray cluster of two nodes on this machine, and render prompts on it with `batch-infer run --engine ray`.

Each simulated node has one CPU, so it gets one worker. On a real cluster, only the command is needed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

PROMPTS = Path(__file__).parent.parent / "prompts.csv"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="ray-out", help="folder for images and results (default: ray-out)")
    parser.add_argument("--limit", default="20", help="number of prompts (default: 20)")
    parser.add_argument("--steps", default="20", help="number of steps (default: 20)")
    options = parser.parse_args()
    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, include_dashboard=False)
        command = [sys.executable, "-m", "batch_infer", "run", str(PROMPTS), "--out", options.out]
        command += ["--limit", options.limit, "--steps", options.steps]
        command += ["--engine", "ray", "--ray-address", cluster.address, "--device", "cpu"]
        return subprocess.run(command, check=False).returncode
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
