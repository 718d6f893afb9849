"""Keep imports of the model libraries quiet, offline and short."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path

from tqdm import tqdm

from batch_infer.settings import Quantization

QUANTIZATION_LIBRARIES = {"fp8": "torchao", "int8": "torchao", "nf4": "bitsandbytes"}
"""The library of each value of --quantize."""
USERS = {"diffusers", "peft", "transformers"}
"""Libraries that import them when they are imported themselves, if they are installed."""


def prepare_imports() -> None:
    """Change defaults of libraries. This must be called before they are imported."""
    # Otherwise they log hints for developers, such as about image processors.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # Otherwise transformers would, for some networks, fetch kernels from the Hub and run them.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    # bitsandbytes would do the same on a CPU with AVX512-BF16.
    _hide("kernels")
    # These loggers warn of kernels that are missing and not needed, and of a deprecated call in torchao.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # tqdm's default lock is a named semaphore. If its process is killed, Python warns of a leaked semaphore.
    tqdm.set_lock(threading.RLock())


def skip_quantization_libraries(path: Path, quantize: Quantization | None = None) -> None:
    """Do not import torchao and bitsandbytes in this process, unless the checkpoint or --quantize needs them.

    The libraries in USERS would import them, which takes seconds. If one of USERS is already imported, it is too late.
    """
    is_quantized = any(b'"quantization_config"' in file.read_bytes() for file in path.glob("*/config.json"))
    if quantize is None and not is_quantized and not USERS & sys.modules.keys():
        for name in QUANTIZATION_LIBRARIES.values():
            _hide(name)


def allow_quantization_libraries() -> None:
    """Undo `skip_quantization_libraries`, to import torchao or bitsandbytes after all."""
    for name in set(QUANTIZATION_LIBRARIES.values()):
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]


def _hide(name: str) -> None:
    """Make imports of a module raise ImportError, if it is not imported yet."""
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]
