"""What makes networks fast on a device without changing what they are: memory format, fused projections, compiling."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import torch

from batch_infer.errors import CompilationError
from batch_infer.store import temporary_file_errors

logger = logging.getLogger(__name__)

SHAPES = 256
"""Shapes that a network is compiled for; torch by itself gives up after 8, and a table may hold more sizes."""
UNRELATED = ("InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton", "LoweringException")
"""Errors of torch._inductor that no damaged file causes: no compiler on this machine, and an operator without a kernel.

A list of those that a damaged file causes would have to name RuntimeError (a truncated .py file, or any error of a
process that compiles) and CppCompileError (a truncated .cpp file).
"""


def optimize_networks(
    networks: Iterable[torch.nn.Module], device: torch.device, *, compiled: bool, threads: int | None = None
) -> None:
    """Prepare networks that are called at one fixed batch shape for each image size.

    On a GPU convolutions want their channels last, and one product for queries, keys and values takes less than three.
    Compiling (Ansel et al., PyTorch 2, ASPLOS 2024) is worth its minute a shape where a run is long.
    `threads`: the most processes that compile kernels at once; workers on one machine share its cores.
    """
    for network in networks:
        if device.type == "cuda":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            # UNets alone: diffusers' fused attention of joint transformers leaves their norms out.
            if hasattr(network, "down_blocks") and (fuse := getattr(network, "fuse_qkv_projections", None)):
                cast(Any, fuse)()
        if compiled:
            network.forward = Compiled(cast(Any, network.forward), threads)


def is_compiled(networks: Iterable[torch.nn.Module]) -> bool:
    """Whether all of these networks are compiled."""
    networks = list(networks)
    return bool(networks) and all(isinstance(network.forward, Compiled) for network in networks)


class Compiled:
    """A network's forward, compiled for every shape it meets."""

    def __init__(self, forward: Callable[..., Any], threads: int | None = None) -> None:
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor
        from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
        from torch._inductor import exc

        dynamo.cache_size_limit = SHAPES
        if threads is not None and "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
            inductor.compile_threads = max(1, min(inductor.compile_threads or 1, threads))
        # Where torch has it: kernels are chosen by rule and not by a race, so that the bytes are the same next time.
        options: dict[str, Any] = {"deterministic": True} if hasattr(inductor, "deterministic") else {}
        self._errors = TorchDynamoException, FailOnRecompileLimitHit
        self._backend_error = BackendCompilerFailed
        names = (name for name in UNRELATED if hasattr(exc, name))
        self._unrelated = torch.OutOfMemoryError, *(getattr(exc, name) for name in names)
        self._compiled = torch.compile(forward, dynamic=False, fullgraph=True, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises CompilationError.

        It does not fall back to the plain forward: that gives other bytes, and other workers would not follow.
        """
        try:
            try:
                return self._compiled(*args, **kwargs)
            except self._backend_error as error:
                if isinstance(getattr(error, "inner_exception", None), self._unrelated):
                    raise
                if not _cache.replace(_reason(error)):
                    raise
                return self._compiled(*args, **kwargs)
        except self._errors as error:
            raise CompilationError(f"torch.compile failed ({_reason(error)}); --no-compile turns it off") from error


class CompilerCache:
    """The folder in which this process keeps what torch.compile made.

    By default it is shared with other processes and later runs. A process that is killed while it writes there leaves a
    truncated file, on which every later compilation would fail.
    """

    def __init__(self) -> None:
        self._temporary = ExitStack()
        self._is_temporary = False

    def replace(self, reason: str) -> bool:
        """Use an empty temporary folder from now on; return False where that was done before. Raises StorageError."""
        from torch._inductor import utils

        if self._is_temporary:
            return False
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "the cache")  # which torch sets where the user does not
        logger.warning(
            f"torch.compile failed ({reason}); compiling again with an empty cache, because files in {folder} may be "
            "damaged. If you see this in every run, remove that folder"
        )
        fresh_cache = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache  # its name before torch 2.8
        with temporary_file_errors():
            self._temporary.enter_context(fresh_cache())
        self._is_temporary = True
        atexit.register(self.close)
        return True

    def close(self) -> None:
        """Remove the temporary folder."""
        self._temporary.close()


_cache = CompilerCache()


def _reason(error: BaseException) -> str:
    return " ".join(str(error).strip().splitlines()[:2])  # the first line may only name the backend
