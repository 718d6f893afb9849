"""Test which libraries a process may import."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from batch_infer.models import DEMO_MODEL, read_card, skip_quantization_libraries
from batch_infer.models.startup import QUANTIZATION_LIBRARIES, USERS, allow_quantization_libraries
from batch_infer.settings import ModelSettings
from tests.rendering import copy_folder

LIBRARIES = set(QUANTIZATION_LIBRARIES.values())

KILLED = """
import multiprocessing
import os
multiprocessing.set_start_method("spawn")  # as in workers
import batch_infer.models
from tqdm.auto import tqdm
list(tqdm(range(2), disable=True))
os._exit(0)
"""
WORKER = """
from batch_infer.autotune import detect_device
from batch_infer.models import DEMO_MODEL, skip_quantization_libraries
detect_device("auto")
skip_quantization_libraries(DEMO_MODEL)
import batch_infer.worker.loading
"""
PROBE = """
from pathlib import Path
from batch_infer.autotune.probe import _inspect_pipeline
from batch_infer.errors import ModelError
try:
    _inspect_pipeline(Path("missing"))
except ModelError:
    pass
"""
REPORT = """
import sys
from peft import LoraConfig
from diffusers.quantizers import DiffusersAutoQuantizer
from transformers.quantizers import AutoHfQuantizer
print(*(name for name in ("torchao", "bitsandbytes", "kernels") if sys.modules.get(name)))
"""


@pytest.fixture(autouse=True)
def _restored_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LIBRARIES, *USERS):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("script", [WORKER, PROBE], ids=["worker", "probe"])
def test_no_library_imports_those_of_quantized_weights(script: str) -> None:
    assert all(map(find_spec, LIBRARIES)), "this test needs the extra `quantize`"
    done = subprocess.run([sys.executable, "-c", script + REPORT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_checkpoint_with_quantized_weights_imports_them(tmp_path: Path) -> None:
    folder = copy_folder(DEMO_MODEL, tmp_path / "model")
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text("utf-8").replace("{", '{"quantization_config": {"load_in_4bit": true}, ', 1))
    skip_quantization_libraries(folder)
    assert all(map(find_spec, LIBRARIES))


@pytest.mark.parametrize("kind", QUANTIZATION_LIBRARIES)
def test_the_option_allows_them_again(kind: str) -> None:
    skip_quantization_libraries(DEMO_MODEL)
    assert not any(map(find_spec, LIBRARIES))
    assert read_card(ModelSettings(quantize=kind)).quantize == kind  # type: ignore[arg-type]
    assert all(map(find_spec, LIBRARIES))


@pytest.mark.parametrize("name", sorted(USERS))
def test_they_stay_if_another_library_may_have_found_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    skip_quantization_libraries(DEMO_MODEL)
    assert all(map(find_spec, LIBRARIES))


def test_imported_libraries_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    torchao = ModuleType("torchao")
    monkeypatch.setitem(sys.modules, "torchao", torchao)
    skip_quantization_libraries(DEMO_MODEL)
    allow_quantization_libraries()
    assert sys.modules["torchao"] is torchao


def test_a_killed_process_leaves_no_warning_behind() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=True)
    assert done.stderr == ""
