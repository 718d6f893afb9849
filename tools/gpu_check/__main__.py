"""Run the GPU check from the command line."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from tools.gpu_check.environment import describe_machine, has_cuda, make_environment
from tools.gpu_check.orchestrator import Orchestrator
from tools.gpu_check.outputs import Outputs
from tools.gpu_check.plan import PARTS, Part, select_parts
from tools.gpu_check.report import evaluate, format_summary

DEFAULT_SECONDS = {"cuda": 540.0, "cpu": 7200.0}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Exits with a message if it is invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description="Check and measure batch-infer on one NVIDIA GPU, without network, in about nine minutes.",
        epilog=f"Parts: {', '.join(part.name for part in PARTS)}.",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: run the parts that a CPU can run, with tiny sizes",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check-out"), help="folder for the output files")
    parser.add_argument("--seconds", type=float, help="time limit of the check; default: 540 on a GPU, 7200 on a CPU")
    parser.add_argument("--parts", default="", metavar="NAME[,NAME]", help="run only these parts")
    parsed = parser.parse_args(arguments)
    try:
        parsed.parts = select_parts([name for name in parsed.parts.split(",") if name], parsed.device)
    except ValueError as error:
        parser.error(str(error))
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Run the check. Return 0 if all parts succeeded and all checks passed, 2 without a GPU, and 1 otherwise."""
    options = parse_arguments(arguments)
    if options.device == "cuda" and not has_cuda():
        message = "torch finds no CUDA device on this machine; --device cpu runs the parts that a CPU can run"
        print(message, file=sys.stderr)
        return 2
    seconds = options.seconds or DEFAULT_SECONDS[options.device]
    parts: list[Part] = options.parts
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        results = {"started_at": started_at, "device": options.device, "machine": describe_machine(options.device)}
        outputs = Outputs(scratch, out, {**results, "seconds": None, "parts": {}})
        orchestrator = Orchestrator(options.device, seconds, outputs, make_environment(scratch))
        try:
            orchestrator.run(parts)
        finally:
            outputs.results["seconds"] = round(orchestrator.elapsed, 1)
            outputs.collect()
            outputs.save()
    print(format_summary(outputs.results))
    print(f"Results: {out}")
    has_failed = any(part.get("status") not in (None, "ok") for part in outputs.parts.values())
    return int(has_failed or any(check.passed is False for check in evaluate(outputs.results)))


if __name__ == "__main__":
    # SIGTERM raises SystemExit, which stops the parts and saves the results.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    sys.exit(main())
