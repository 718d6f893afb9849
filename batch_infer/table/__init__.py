"""Tables of prompts: files in, requests and invalid results out."""

from batch_infer.table.columns import is_deep
from batch_infer.table.endings import default_id
from batch_infer.table.loose import loose_rows
from batch_infer.table.rows import RowRules
from batch_infer.table.selection import is_no_table
from batch_infer.table.shape import Shape, cells_of, column_names
from batch_infer.table.tables import Others, Tables
from batch_infer.table.urls import shown

__all__ = [
    "Others",
    "RowRules",
    "Shape",
    "Tables",
    "cells_of",
    "column_names",
    "default_id",
    "is_deep",
    "is_no_table",
    "loose_rows",
    "shown",
]
