"""Log files in OUT: what is told on a terminal, and more, for those who look later."""

from __future__ import annotations

import logging
import time
from typing import TextIO


def log_to(file: TextIO) -> logging.Handler:
    """A handler that writes to a file, with the time in UTC."""
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(file)
    handler.setFormatter(formatter)
    return handler
