"""Commands of the benchmark, which run in its folder."""

import sys

TABLE = "prompts.parquet"
OUT = "out"
BATCH_INFER = (sys.executable, "-m", "batch_infer")
RUN = (
    *(*BATCH_INFER, "run", TABLE, "--out", OUT),
    *("--steps", "4", "--device", "cpu", "--slots", "8", "--threads", "1"),
)
PLAN = tuple("plan" if word == "run" else word for word in RUN)
OPEN_INDEX = (
    *(sys.executable, "-c"),
    "from batch_infer.manifest import Manifest; index = Manifest('out').index()",
)
HASH = ("sh", "-c", f"find {OUT}/images -type f -print0 | xargs -0 sha256sum")
