"""Fusing LoRAs into a pipeline's weights, by diffusers' own loader and peft, so that the loop knows nothing of them."""

from __future__ import annotations

import logging
from typing import Any

from batch_infer.errors import ModelError, first_line
from batch_infer.models.card import ModelCard
from batch_infer.models.lora import Lora
from batch_infer.models.untrusted import LOADING_ERRORS

# It logs why a LoRA does not fit, and raises it too.
logging.getLogger("diffusers.loaders.peft").setLevel(logging.CRITICAL)

ADAPTER = "lora"


def fuse_loras(pipeline: Any, card: ModelCard) -> None:
    """Add the card's LoRAs to the weights of a loaded pipeline, in order. Raises ModelError for one that does not fit.

    diffusers leaves out what it finds no place for, so all that was loaded is counted.
    """
    for lora in card.loras:
        try:
            pipeline.load_lora_weights(
                str(lora.path.parent), weight_name=lora.path.name, adapter_name=ADAPTER, use_safetensors=True,
                local_files_only=True,
            )  # fmt: skip
        except LOADING_ERRORS as error:
            why = " ".join(line.strip() for line in str(error).splitlines()[:2])
            raise _misfit(lora, card, why) from error
        placed = _placed(pipeline)
        if placed != lora.tensors:
            raise _misfit(lora, card, f"{placed} of its {lora.tensors} tensors found a place")
        pipeline.set_adapters(ADAPTER, lora.weight)
        try:
            pipeline.fuse_lora(safe_fusing=True)
        except ValueError as error:
            raise ModelError(f"{lora.path} could not be added to {card.name}: {first_line(error)}") from error
        pipeline.unload_lora_weights()


def _placed(pipeline: Any) -> int:
    """How many tensors of the adapter the pipeline's networks hold."""
    networks = [network for network in pipeline.components.values() if hasattr(network, "named_parameters")]
    names = [name for network in networks for name, _ in network.named_parameters()]
    return sum(f".{ADAPTER}." in name for name in names)


def _misfit(lora: Lora, card: ModelCard, why: str) -> ModelError:
    return ModelError(f"{lora.path} does not fit {card.name}; was it made for another family? ({why})")
