"""Do in Python what the commands do. `import batch_infer` loads these functions when one is first used."""

from batch_infer.api.functions import plan, recipe, results, run, status, verify
from batch_infer.jobs import Plan, RunStatus, Summary, Verification

__all__ = [
    "Plan",
    "RunStatus",
    "Summary",
    "Verification",
    "plan",
    "recipe",
    "results",
    "run",
    "status",
    "verify",
]
