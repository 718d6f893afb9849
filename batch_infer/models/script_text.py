"""Write values of untrusted files into a Python script, so that none of them can become code.

The text is ASCII. A script therefore compiles whatever the encoding of the stream or file that it is written to.
"""

from __future__ import annotations

import ast
import keyword
from typing import Any

from batch_infer.errors import UsageError

MODULES = ("diffusers", "safetensors.torch")
"""Modules from which a script imports names."""


def write_literal(value: Any) -> str:
    """Return the literal of a value. Raises UsageError for a value that has none, such as infinity."""
    try:
        text = ascii(value)
        ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise UsageError(f"a script cannot contain a value of the run: {error}") from error
    return text


def check_name(name: Any, kind: str) -> str:
    """Return the name of a class or argument. Raises UsageError for anything else, which `kind` describes."""
    if not isinstance(name, str) or not name.isascii() or not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(f"a script cannot name {kind}: {name!a} is not an ASCII identifier")
    return name


def write_comment(text: str) -> str:
    """Return a comment of one line. Other characters than printable ASCII are escaped, and so are line breaks."""
    escaped = (char if char.isascii() and char.isprintable() else ascii(char)[1:-1] for char in text)
    return f"# {''.join(escaped)}"


def check_script(script: str) -> str:
    """Return a script that consists of imports, assignments and calls. Raises UsageError for any other."""
    try:
        statements = ast.parse(script).body
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise UsageError(f"the script would not be valid Python: {error}") from error
    for statement in statements:
        match statement:
            case ast.Assign() | ast.Expr(value=ast.Call()) | ast.Import(names=[ast.alias(name="torch")]):
                continue
            case ast.ImportFrom(module=module) if module in MODULES:
                continue
            case _:
                raise UsageError(f"line {statement.lineno} of the script would not be an import, assignment or call")
    return script
