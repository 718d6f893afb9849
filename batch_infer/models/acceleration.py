"""What makes networks fast on a device without changing what they are: memory format, fused projections, compiling."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from batch_infer.errors import first_line

SHAPES = 256
"""Shapes that a network is compiled for; torch by itself gives up after 8, and a table may hold more sizes."""

log = logging.getLogger("batch_infer")


def speed_up(networks: Iterable[torch.nn.Module], device: torch.device, *, compiled: bool) -> None:
    """Prepare networks that are called at one fixed batch shape for each image size.

    On a GPU convolutions want their channels last, and one product for queries, keys and values takes less than three.
    Compiling (Ansel et al., PyTorch 2, ASPLOS 2024) is worth its minute a shape where a run is long.
    """
    for network in networks:
        if device.type == "cuda":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            # UNets alone: diffusers' fused attention of joint transformers leaves their norms out.
            if hasattr(network, "down_blocks") and (fuse := getattr(network, "fuse_qkv_projections", None)):
                cast(Any, fuse)()
        if compiled:
            network.forward = Compiled(cast(Any, network.forward))


def is_compiled(networks: Iterable[torch.nn.Module]) -> bool:
    """Whether these are compiled, and none was found that cannot be."""
    networks = list(networks)
    works = (isinstance(network.forward, Compiled) and network.forward.works for network in networks)
    return bool(networks) and all(works)


class Compiled:
    """A network's forward, compiled for every shape it meets, and the plain one where that cannot be done."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        dynamo.cache_size_limit = SHAPES
        # Where torch has it: kernels are chosen by rule and not by a race, so that the bytes are the same next time.
        options: dict[str, Any] = {"deterministic": True} if hasattr(inductor, "deterministic") else {}
        self.works = True
        self._plain = forward
        self._compiled = torch.compile(forward, dynamic=False, fullgraph=True, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.works:
            try:
                return self._compiled(*args, **kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                log.warning("torch.compile failed, and the run goes on without it: %s", first_line(error))
                self.works = False
        return self._plain(*args, **kwargs)
