"""End a spawned process whose main script has no main guard: importing the script would call batch-infer again."""

from __future__ import annotations

import os
from multiprocessing import current_process

EXIT_CODE = 64
"""Exit code by which the parent process recognises this case (sysexits.h: the command was used incorrectly)."""
ADVICE = (
    "the script that calls batch-infer is imported by each of its processes, and calls it again there: put the call "
    'under `if __name__ == "__main__":`'
)


def end_unguarded_process() -> None:
    """End this process if it was spawned and is still importing the main script."""
    if getattr(current_process(), "_inheriting", False):
        os._exit(EXIT_CODE)
