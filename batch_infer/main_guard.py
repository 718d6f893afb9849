"""End a spawned process whose main script has no main guard, since importing the script calls batch-infer again."""

from __future__ import annotations

import os
from multiprocessing import current_process

EXIT_CODE = 64
"""Exit code that tells the parent why the process has ended (EX_USAGE in sysexits.h)."""
ADVICE = (
    "the script that calls batch-infer has no main guard, so every process that it starts would call batch-infer "
    'again: put the call under `if __name__ == "__main__":`'
)


def end_unguarded_process() -> None:
    """End this process if it was spawned and is still importing the main script."""
    if getattr(current_process(), "_inheriting", False):
        os._exit(EXIT_CODE)
