"""Read tables of prompts from files, folders, globs, URLs, standard input and memory.

Each row that is not blank becomes one request per image, or a single invalid result with an error message.
"""

from batch_infer.store import redact_url
from batch_infer.table.base import make_default_id
from batch_infer.table.json import DocumentFormat, parse_element, parse_payload_columns
from batch_infer.table.jsonl import is_too_deep
from batch_infer.table.keys import read_keys
from batch_infer.table.memory import in_memory_tables, is_in_memory, make_in_memory
from batch_infer.table.rows import FindLora, RowRules, parse_rows
from batch_infer.table.selection import is_ignored_name
from batch_infer.table.tables import SharedFolder, Tables

__all__ = [
    "DocumentFormat",
    "FindLora",
    "SharedFolder",
    "RowRules",
    "Tables",
    "in_memory_tables",
    "is_in_memory",
    "parse_element",
    "is_ignored_name",
    "is_too_deep",
    "make_default_id",
    "make_in_memory",
    "parse_rows",
    "parse_payload_columns",
    "read_keys",
    "redact_url",
]
