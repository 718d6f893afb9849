"""Scripts without a main guard that call the package: every spawned process imports them and calls it again."""

from __future__ import annotations

import os
from multiprocessing import current_process

EXIT_CODE = 64
"""The exit code of such a process, by which its parent recognises it. (sysexits.h: a command was used incorrectly.)"""
ADVICE = (
    "the script that calls batch-infer is imported by each of its processes, and calls it again there: put the call "
    'under `if __name__ == "__main__":`'
)


def end_unguarded_process() -> None:
    """End this process if it was spawned and is still importing the main script."""
    if getattr(current_process(), "_inheriting", False):
        os._exit(EXIT_CODE)
