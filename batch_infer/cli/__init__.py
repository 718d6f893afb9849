"""Define the command line. Each command passes its options to functions that do the work, and returns an exit code.

Slow libraries are imported only when a command runs, so that --help is fast.
"""

from batch_infer.cli.config import detect_log_format, with_suggestion
from batch_infer.cli.gallery import update_gallery
from batch_infer.cli.keywords import convert_keywords, make_settings, options_by_keyword
from batch_infer.cli.logs import is_json, log_error, restore_stderr, set_up_logging
from batch_infer.cli.main import commands, settings_from_environment
from batch_infer.cli.metrics import Metrics
from batch_infer.cli.progress import CheckProgress, ProgressBar, ProgressGroup, find_bar_type
from batch_infer.cli.report import format_count
from batch_infer.cli.shells import COMPLETE_VARIABLE
from batch_infer.cli.values import parse_duration, parse_out

__all__ = [
    "COMPLETE_VARIABLE",
    "CheckProgress",
    "Metrics",
    "ProgressBar",
    "ProgressGroup",
    "commands",
    "convert_keywords",
    "detect_log_format",
    "find_bar_type",
    "format_count",
    "is_json",
    "log_error",
    "make_settings",
    "options_by_keyword",
    "parse_duration",
    "parse_out",
    "restore_stderr",
    "set_up_logging",
    "settings_from_environment",
    "update_gallery",
    "with_suggestion",
]
