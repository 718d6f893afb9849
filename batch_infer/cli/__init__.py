"""Define the command line. Each command passes its options to functions that do the work, and returns an exit code.

Slow libraries are imported only when a command runs, so that --help is fast.
"""

from batch_infer.cli.config import detect_log_format, with_suggestion
from batch_infer.cli.logs import is_json, log_error, restore_stderr, set_up_logging
from batch_infer.cli.main import commands, settings_from_environment

__all__ = [
    "commands",
    "detect_log_format",
    "is_json",
    "log_error",
    "restore_stderr",
    "set_up_logging",
    "settings_from_environment",
    "with_suggestion",
]
