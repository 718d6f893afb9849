"""Tables of prompts: files in, requests and invalid results out."""

from batch_infer.table.layout import common_type
from batch_infer.table.rows import RowRules
from batch_infer.table.tables import Tables
from batch_infer.table.urls import shown

__all__ = ["RowRules", "Tables", "common_type", "shown"]
