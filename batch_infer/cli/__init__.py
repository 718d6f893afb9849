"""The command line: options become settings, one call of `jobs`, an exit code. No torch: --help answers at once."""

from batch_infer.cli.config import settle_format_early
from batch_infer.cli.environment import settings_of_environment
from batch_infer.cli.logs import give_stderr_back, in_json, set_up_logging, tell_error
from batch_infer.cli.main import commands
from batch_infer.cli.names import with_suggestion

__all__ = [
    "commands",
    "give_stderr_back",
    "in_json",
    "set_up_logging",
    "settings_of_environment",
    "settle_format_early",
    "tell_error",
    "with_suggestion",
]
