"""Batch the network calls of any diffusers pipeline across rows, without changing the pipeline's own call.

CallStacker runs rows, and CallEvaluator stacks their calls as a StackingPlan says, which make_stacking_plan derives
from trial calls.
"""

from batch_infer.stacking.cache import EncoderCache
from batch_infer.stacking.checking import take_first_step
from batch_infer.stacking.evaluator import CallEvaluator, Observer
from batch_infer.stacking.networks import Kind, Network, copy_pipeline, find_networks, replaced_method
from batch_infer.stacking.plan import StackingPlan
from batch_infer.stacking.recording import RecordedCall, record_pipeline
from batch_infer.stacking.rows import EndedRow
from batch_infer.stacking.stacker import ENCODE_BATCH, ROW_ERRORS, CallStacker
from batch_infer.stacking.trial import make_stacking_plan

__all__ = [
    "CallEvaluator",
    "CallStacker",
    "ENCODE_BATCH",
    "EncoderCache",
    "EndedRow",
    "Kind",
    "Network",
    "Observer",
    "ROW_ERRORS",
    "RecordedCall",
    "StackingPlan",
    "copy_pipeline",
    "find_networks",
    "make_stacking_plan",
    "record_pipeline",
    "replaced_method",
    "take_first_step",
]
