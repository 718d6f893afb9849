"""Do in Python what the commands do. `import batch_infer` loads these functions when one is first used."""

from batch_infer.api.functions import gallery, plan, recipe, results, run, status, verify
from batch_infer.jobs import Gallery, Plan, RunStatus, Summary, Verification

__all__ = [
    "Gallery",
    "Plan",
    "RunStatus",
    "Summary",
    "Verification",
    "gallery",
    "plan",
    "recipe",
    "results",
    "run",
    "status",
    "verify",
]
