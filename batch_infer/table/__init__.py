"""Read tables of prompts from files, folders, globs and URLs.

Each row becomes one request per image, or a single invalid result with an error message.
"""

from batch_infer.table.base import make_default_id
from batch_infer.table.columns import is_too_deep
from batch_infer.table.json import DocumentFormat, element_cells, payload_columns
from batch_infer.table.left_out import is_ignored_name
from batch_infer.table.rows import RowRules, parse_rows
from batch_infer.table.tables import OtherTables, Tables
from batch_infer.table.urls import redact_url

__all__ = [
    "DocumentFormat",
    "OtherTables",
    "RowRules",
    "Tables",
    "element_cells",
    "is_ignored_name",
    "is_too_deep",
    "make_default_id",
    "parse_rows",
    "payload_columns",
    "redact_url",
]
