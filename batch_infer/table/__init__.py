"""Tables of prompts: files in, requests and invalid results out."""

from batch_infer.table.columns import is_too_deep
from batch_infer.table.endings import make_default_id
from batch_infer.table.loose import parse_rows
from batch_infer.table.rows import RowRules
from batch_infer.table.selection import is_ignored_name
from batch_infer.table.shape import DocumentFormat, element_cells, payload_columns
from batch_infer.table.tables import OtherTables, Tables
from batch_infer.table.urls import redact_url

__all__ = [
    "OtherTables",
    "RowRules",
    "DocumentFormat",
    "Tables",
    "element_cells",
    "payload_columns",
    "make_default_id",
    "is_too_deep",
    "is_ignored_name",
    "parse_rows",
    "redact_url",
]
