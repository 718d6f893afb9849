"""Run one part in its own process: `python -m tools.gpu_check.child NAME DEVICE SCRATCH OUT`."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from pathlib import Path

from tools.gpu_check.plan import select_parts
from tools.gpu_check.recorder import Recorder


def main(name: str, device: str, scratch: str, out: str) -> int:
    """Run one part. Return 1 if a section failed, else 0."""
    # SIGTERM raises SystemExit, so that a stopped part ends its own processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped at the time limit"))
    (part,) = select_parts([name], device)
    recorder = Recorder(name, device, part.architecture, Path(scratch), Path(out))
    import_module(f"tools.gpu_check.parts.{part.module}").run(recorder)
    return int(recorder.failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
