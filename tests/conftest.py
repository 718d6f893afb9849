"""What the tests share: a fixed number of threads, and tiny checkpoints made once a session."""

from __future__ import annotations

import os
import signal

# Before torch and transformers are imported, and for the processes that tests start: threads that spin slow each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Advice for their programmers, which would otherwise stand below pytest's last line.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from batch_infer.autotune.probe import Probe
from batch_infer.models import DEMO_MODEL
from batch_infer.stopping import Stopper

# The examples that hypothesis draws are the same each time, and as slow as the machine makes them.
settings.register_profile("same", derandomize=True, database=None, deadline=None, print_blob=True)
settings.load_profile("same")
# A shell that starts the tests in the background has them ignore Ctrl-C, and so would the processes that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch  # not above: the process that hands out the tests loads this file too, and needs none of it

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_end_of_this_process() -> Iterator[None]:
    """A command that is interrupted in this process does not end it, however long that takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stopper, "_limit_shutdown", lambda self: None)
        patch.setattr(Stopper, "_end_process", lambda self: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a command remembers about this machine is kept out of the user's own cache, and out of later sessions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def default_hangup() -> Iterator[None]:
    """Set SIGHUP to its default action, also for processes that the test starts: `nohup` has it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def probe_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer a plan's questions about the model in this process, which has already imported torch."""
    monkeypatch.setattr(Probe, "_call", lambda _, question, *arguments: question(*arguments))


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
    """Where a run of this test writes: not there yet."""
    return tmp_path / "out"
