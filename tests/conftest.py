"""Shared fixtures: one thread, a temporary cache, and tiny checkpoints that are made once per session."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings

# Set before torch and transformers are imported, and inherited by child processes: spinning threads slow each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# These libraries would print hints for developers below pytest's last line.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from batch_infer.autotune.probe import Probe
from batch_infer.cli.logs import restore_stderr, set_log_format
from batch_infer.models import DEMO_MODEL
from batch_infer.stopping import Stopper

# hypothesis draws the same examples each time, and has no deadline, because machines differ in speed.
settings.register_profile("same", derandomize=True, database=None, deadline=None, print_blob=True)
settings.load_profile("same")
# A shell that starts pytest in the background makes it ignore SIGINT, which child processes would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch  # imported here, because the controller of pytest-xdist also loads this file and needs no torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _keep_process_alive() -> Iterator[None]:
    """Prevent an interrupted command from ending this process, even if the command is slow to stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stopper, "_limit_shutdown", lambda self: None)
        patch.setattr(Stopper, "_end_process", lambda self: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _temporary_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep measurements of this machine out of the user's cache and out of later sessions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _initial_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start each test with Python's initial logging, which a command in this process changes and does not restore."""
    for module, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    pytest_showwarning = warnings.showwarning
    _reset_logging()
    warnings.showwarning = pytest_showwarning  # captureWarnings(False) may have restored that of an earlier test
    yield
    _reset_logging()


def _reset_logging() -> None:
    for name in ("batch_infer", "py.warnings", "stderr"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
    logging.captureWarnings(False)
    restore_stderr()
    set_log_format("text")


@pytest.fixture
def default_hangup() -> Iterator[None]:
    """Set SIGHUP, which `nohup` ignores, to its default action, also in processes that the test starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def probe_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a plan's functions for the model in this process, which has already imported torch."""
    monkeypatch.setattr(Probe, "_call", lambda _, function, *arguments: function(*arguments))


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return DEMO_MODEL


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.x checkpoint, with a checker. Copy it before changing anything in it."""
    from tests import checkpoints

    return checkpoints.save_sd1(tmp_path_factory.mktemp("checkpoints") / "sd1")


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 2.x checkpoint, without a checker. Copy it before changing anything in it."""
    from tests import checkpoints

    return checkpoints.save_sd2(tmp_path_factory.mktemp("checkpoints") / "sd2")


@pytest.fixture(scope="session")
def decidiffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeciDiffusion checkpoint, with a checker. Copy it before changing anything in it."""
    from tests import checkpoints

    return checkpoints.save_decidiffusion(tmp_path_factory.mktemp("checkpoints") / "decidiffusion")


@pytest.fixture(scope="session")
def lcm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny latent consistency model, without a checker. Copy it before changing anything in it."""
    from tests import checkpoints

    return checkpoints.save_lcm(tmp_path_factory.mktemp("checkpoints") / "lcm")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion XL checkpoint. Copy it before changing anything in it."""
    from tests import checkpoints_xl

    return checkpoints_xl.save_sdxl(tmp_path_factory.mktemp("checkpoints") / "sdxl")


@pytest.fixture(scope="session")
def sdxl_turbo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL Turbo checkpoint. Copy it before changing anything in it."""
    from tests import checkpoints_xl

    return checkpoints_xl.save_sdxl_turbo(tmp_path_factory.mktemp("checkpoints") / "sdxl_turbo")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder that does not exist yet."""
    return tmp_path / "out"
