"""Read the results of a run into a pandas DataFrame."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_infer.errors import UsageError, first_line
from batch_infer.jobs import out as outdir
from batch_infer.store import Out, open_store, to_absolute
from batch_infer.terminal import quote_command

if TYPE_CHECKING:
    import pandas as pd


def read_frame(out: Out) -> pd.DataFrame:
    """Return OUT/results.parquet as a DataFrame, with images as absolute paths or URLs.

    Its columns have Arrow types, so that integers and booleans may be null. Raises StorageError, and UsageError if OUT
    contains no run or no readable results.parquet.
    """
    store = open_store(to_absolute(out))
    outdir.read_existing_run(store)
    path = store.locate("results.parquet")
    merge = quote_command("merge", store.location)
    content = store.read("results.parquet")
    if content is None:
        raise UsageError(f"{path} does not exist yet: run {merge} to write it")
    try:
        table = pq.read_table(pa.BufferReader(content))
    except pa.ArrowException as error:
        raise UsageError(f"{path} cannot be read ({first_line(error)}): run {merge} to write it again") from error
    index = table.column_names.index("generated_image")
    located = pc.binary_join_element_wise(store.location, table["generated_image"], "/")
    return _to_pandas(table.set_column(index, "generated_image", located))


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    import pandas as pd

    frame: pd.DataFrame = table.replace_schema_metadata(None).to_pandas(types_mapper=pd.ArrowDtype)
    return frame
