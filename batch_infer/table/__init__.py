"""Tables of prompts: files, folders, globs and URLs are found, opened by format and read row by row.

Each row becomes its requests, or the one invalid result that says what is wrong with it.
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
