"""The command line: options become settings, one call of `jobs`, an exit code. No torch: --help answers at once."""

from batch_infer.cli.config import detect_log_format
from batch_infer.cli.environment import settings_from_environment
from batch_infer.cli.logs import is_json, log_error, restore_stderr, set_up_logging
from batch_infer.cli.main import commands
from batch_infer.cli.names import with_suggestion

__all__ = [
    "commands",
    "restore_stderr",
    "is_json",
    "set_up_logging",
    "settings_from_environment",
    "detect_log_format",
    "log_error",
    "with_suggestion",
]
