"""Speed up networks with memory formats, fused projections and compilation, and count their FLOP."""

from __future__ import annotations

import atexit
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from batch_infer.errors import CompilationError
from batch_infer.models.quantization import is_quantized
from batch_infer.records import PromptRequest, SamplingParams, Source
from batch_infer.store import temporary_file_errors

if TYPE_CHECKING:
    from batch_infer.models.latent_diffusion import LatentDiffusion

log = logging.getLogger(__name__)

MAX_SHAPES = 256
"""Maximum number of compiled shapes per network. torch's default is 8, and a table may contain more sizes."""
UNRELATED = ("InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton", "LoweringException")
"""Names of torch._inductor errors that damaged cache files do not cause: they report, say, a missing compiler.

A list of the errors that damaged files do cause would be too broad: it would include RuntimeError (a truncated .py
file, or any error in a compilation process) and CppCompileError (a truncated .cpp file).
"""

LatentShape = tuple[int, int, int]


def optimize_networks(
    networks: Iterable[torch.nn.Module], device: torch.device, *, compiled: bool, threads: int | None = None
) -> None:
    """Optimize networks that are called with one fixed batch shape per image size.

    On a GPU, convolutions are fastest with channels last, and one product for queries, keys and values is faster than
    three. Compilation (Ansel et al., PyTorch 2, ASPLOS 2024) takes about a minute per shape, so it pays
    off only in long runs. `threads` limits the number of compilation processes, because workers share the cores of a
    machine.
    """
    for network in networks:
        if device.type == "cuda":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            # For UNets only: in joint transformers, diffusers' fused attention omits the norms. Quantized weights
            # cannot be joined.
            fuse: Any = getattr(network, "fuse_qkv_projections", None)
            if fuse and hasattr(network, "down_blocks") and not is_quantized(network):
                fuse()
        if compiled:
            network.forward = Compiled(cast(Any, network.forward), threads)


def is_compiled(networks: Sequence[torch.nn.Module]) -> bool:
    """Return whether all networks are compiled, or False if there are none."""
    return bool(networks) and all(isinstance(network.forward, Compiled) for network in networks)


class Compiled:
    """A forward method that is compiled separately for each input shape."""

    def __init__(self, forward: Callable[..., Any], threads: int | None = None) -> None:
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor
        from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
        from torch._inductor import exc

        dynamo.cache_size_limit = MAX_SHAPES
        if threads is not None and "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
            inductor.compile_threads = max(1, min(inductor.compile_threads or 1, threads))
        # With this option, torch chooses kernels by rule instead of by timing, so later runs give the same bytes.
        options: dict[str, Any] = {"deterministic": True} if hasattr(inductor, "deterministic") else {}
        self._errors = TorchDynamoException, FailOnRecompileLimitHit
        self._backend_error = BackendCompilerFailed
        unrelated = [getattr(exc, name) for name in UNRELATED if hasattr(exc, name)]
        self._unrelated = (torch.OutOfMemoryError, *unrelated)
        self._compiled = torch.compile(forward, dynamic=False, fullgraph=True, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled method. Raises CompilationError, StorageError.

        There is no fallback to the uncompiled method: its bytes differ, and other workers would not fall back.
        """
        try:
            try:
                return self._compiled(*args, **kwargs)
            except self._backend_error as error:
                is_unrelated = isinstance(getattr(error, "inner_exception", None), self._unrelated)
                if is_unrelated or not _cache.replace(_reason(error)):
                    raise
                return self._compiled(*args, **kwargs)
        except self._errors as error:
            raise CompilationError(f"torch.compile failed ({_reason(error)}); --no-compile turns it off") from error


class CompilerCache(ExitStack):
    """The folder in which this process caches the results of torch.compile. Closing it removes a temporary one.

    By default, other processes and later runs share the folder. If a process is killed while it writes a file, later
    compilations may fail on the truncated file.
    """

    _is_temporary = False

    def replace(self, reason: str) -> bool:
        """Switch to an empty temporary folder. Returns False if this already happened. Raises StorageError."""
        from torch._inductor import utils

        if self._is_temporary:
            return False
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "the cache")  # torch sets it if the user does not
        log.warning(
            f"torch.compile failed ({reason}); compiling again with an empty cache, because files in {folder} may be "
            "damaged. If you see this in every run, remove that folder"
        )
        fresh_cache = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache  # the name before torch 2.8
        with temporary_file_errors():
            self.enter_context(fresh_cache())
        self._is_temporary = True
        atexit.register(self.close)
        return True


_cache = CompilerCache()


def _reason(error: BaseException) -> str:
    return " ".join(str(error).strip().splitlines()[:2])  # the first line may name only the backend


def denoise_flops(model: LatentDiffusion, latent_shape: LatentShape) -> int:
    """Return the FLOP of one denoiser evaluation for one batch element, on latents (C, h, w).

    Only matrix products, including those of attention, and convolutions count, with two FLOP per multiply-add. An empty
    prompt is encoded, but the denoiser is only traced.
    """
    params = SamplingParams(8 * latent_shape[1], 8 * latent_shape[2], 1, 1.0, 0.0)
    (conditioning,) = model.condition([PromptRequest("flops", 0, "", None, 0, params, Source("", 0), "")])

    def call() -> None:
        sample = torch.empty(1, *latent_shape, dtype=model.dtype, device=model.device)
        context = {name: part.new_empty(1, *part.shape) for name, part in conditioning.context[0].items()}
        model.denoise(sample, torch.empty(1, device=model.device), context)

    return _trace_flops(call)


def decode_flops(model: LatentDiffusion, latent_shape: LatentShape) -> int:
    """Return the FLOP of decoding one image from latents (C, h, w), without decoding it."""
    return _trace_flops(lambda: model.decode(torch.empty(1, *latent_shape, device=model.device)))


def _count_4bit_flops(inputs: Sequence[int], weight: object, shape: Sequence[int], *_: object, **__: object) -> int:
    """Return the FLOP of a product of inputs (..., in) and a weight whose unpacked shape is (out, in)."""
    return 2 * math.prod(inputs) * shape[0]


def count_flops(call: Callable[[], object]) -> int:
    """Make a call and return its FLOP. It takes longer than usual, because it neither fuses attention nor compiles.

    The counter does not support all fused kernels, and cannot see compiled code.
    """
    library = torch.ops.bitsandbytes
    formulas = {library.gemm_4bit: _count_4bit_flops} if hasattr(library, "gemm_4bit") else {}
    with (
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
    ):
        call()
    return int(counter.get_total_flops())


def _trace_flops(call: Callable[[], object]) -> int:
    """Return the FLOP of a call without making it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return count_flops(call)
