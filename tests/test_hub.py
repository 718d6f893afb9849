"""Checkpoints from the Hub: which files are requested, what the cache saves, and the messages of failures."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from batch_infer.errors import ModelError
from batch_infer.models import hub as hub_files
from batch_infer.models import read_card
from batch_infer.settings import ModelSettings
from tests.checkpoints import amend
from tests.hub import COMMIT, Hub, hub
from tests.rendering import copy_folder

CARD = """
import json, sys
from batch_infer.errors import ModelError
from batch_infer.models import read_card
from batch_infer.settings import ModelSettings
try:
    card = read_card(ModelSettings(**json.loads(sys.argv[1])))
    facts = {"name": card.name, "revision": card.revision, "fingerprint": card.fingerprint, "family": card.family}
    result = {"path": str(card.path), **facts}
except ModelError as error:
    result = {"error": str(error)}
print(json.dumps({**result, "slow": sorted({"torch", "diffusers", "transformers"} & sys.modules.keys())}))
"""
"""Runs in another process, because the Hub's library reads environment variables on import."""
WEIGHTS = "diffusion_pytorch_model"

Read = Callable[..., dict[str, Any]]


@pytest.fixture
def repository(sd1_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint as a repository, with many other files that must not be loaded."""
    folder = copy_folder(sd1_folder, tmp_path)
    for name in ("README.md", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "unet/model.py", "pipeline.py"):
        (folder / name).write_text("not for loading")
    for name in ("text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack", "unet/model.onnx"):
        (folder / name).write_text("not for loading")
    unet = folder / "unet" / f"{WEIGHTS}.safetensors"
    shutil.copy(unet, unet.with_name(f"{WEIGHTS}.fp16.safetensors"))
    shutil.copy(unet, unet.with_name(f"{WEIGHTS}.non_ema.safetensors"))
    shutil.copytree(folder / "vae", folder / "vae_of_another")
    return folder


@pytest.fixture
def served(repository: Path) -> Iterator[Hub]:
    with hub(tiny=repository) as server:
        yield server


@pytest.fixture
def read(served: Hub, tmp_path: Path) -> Read:
    """Call read_card in a process that uses this Hub."""

    def read_in_process(name: str = "owner/tiny", *, offline: bool = False, **settings: Any) -> dict[str, Any]:
        env = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": served.address, "HF_HUB_OFFLINE": str(int(offline))}
        command = [sys.executable, "-c", CARD, json.dumps({"name": name, **settings})]
        process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=True)
        result = json.loads(process.stdout)
        assert result.pop("slow") == []
        assert process.stderr == ""
        assert "\n" not in result.get("error", "")
        return dict(result)

    return read_in_process


def test_only_files_that_are_loaded_are_fetched(read: Read, served: Hub, sd1_folder: Path) -> None:
    result = read()
    assert (result["name"], result["revision"], result["family"]) == ("owner/tiny", COMMIT, "stable_diffusion")
    parts = sorted(path.relative_to(sd1_folder).as_posix() for path in sd1_folder.rglob("*") if path.is_file())
    assert served.files("owner/tiny") == parts
    assert result["fingerprint"] == read_card(ModelSettings(name=str(sd1_folder))).fingerprint
    assert Path(result["path"]).name == COMMIT


def test_components_without_the_variant_use_default_weights(read: Read, served: Hub) -> None:
    read(variant="fp16")
    weights = [file for file in served.files("owner/tiny") if file.endswith(".safetensors")]
    assert f"unet/{WEIGHTS}.fp16.safetensors" in weights
    assert f"unet/{WEIGHTS}.safetensors" not in weights
    assert {f"vae/{WEIGHTS}.safetensors", "text_encoder/model.safetensors"} < set(weights)


def test_sharded_weights_come_with_their_index(read: Read, served: Hub, repository: Path) -> None:
    unsharded = repository / "unet" / f"{WEIGHTS}.safetensors"
    weights = load_file(unsharded)
    unsharded.unlink()
    shard_of: dict[str, str] = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        shard = f"{WEIGHTS}-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, unsharded.with_name(shard), metadata={"format": "pt"})
        shard_of |= dict.fromkeys(names, shard)
    unsharded.with_name(f"{WEIGHTS}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": shard_of})
    )
    read()
    assert [file for file in served.files("owner/tiny") if file.startswith("unet/")] == [
        "unet/config.json",
        f"unet/{WEIGHTS}-00001-of-00002.safetensors",
        f"unet/{WEIGHTS}-00002-of-00002.safetensors",
        f"unet/{WEIGHTS}.safetensors.index.json",
    ]


def test_unused_files_of_decidiffusion_are_not_fetched(read: Read, served: Hub, repository: Path) -> None:
    amend(repository / "model_index.json", _class_name="DeciDiffusionPipeline")
    assert "flexible_unet/" in read()["error"]
    (repository / "unet").rename(repository / "flexible_unet")
    (repository / "unet").mkdir()
    (repository / "unet" / f"{WEIGHTS}.safetensors").write_text("1.7 GB of another network")
    assert read(revision=COMMIT)["family"] == "decidiffusion"
    folders = {file.partition("/")[0] for file in served.files("owner/tiny")}
    assert "flexible_unet" in folders
    assert "unet" not in folders


def test_a_complete_cache_requests_one_header_and_offline_nothing(read: Read, served: Hub) -> None:
    first = read()
    served.requests.clear()
    served.fetched.clear()
    assert read() == first
    assert [path for path in served.requests if "owner" in path] == ["/owner/tiny/resolve/main/model_index.json"]
    assert not served.fetched
    served.requests.clear()
    assert read(offline=True) == first
    assert read(revision=COMMIT, offline=True) == first
    assert not served.requests


@pytest.mark.parametrize("listed", [True, False], ids=["with its list of files", "without"])
@pytest.mark.parametrize("deleted", [f"unet/{WEIGHTS}.safetensors", "text_encoder/config.json", "vae"])
def test_an_incomplete_cache_is_named_offline_and_completed_online(
    read: Read, served: Hub, deleted: str, listed: bool
) -> None:
    first = read()
    folder = Path(first["path"])
    if not listed:  # earlier versions of the Hub's library cache no list
        shutil.rmtree(folder.parent.parent / "trees")
    path = folder / deleted
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = read(offline=True)["error"]
    assert message.startswith("owner/tiny")
    assert deleted.partition("/")[0] in message
    assert "local cache" in message
    assert "offline" in message
    assert read() == first


def test_a_refused_class_fetches_only_the_index(read: Read, served: Hub, repository: Path) -> None:
    amend(repository / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    assert "MyPipeline" in read()["error"]
    assert served.fetched == ["owner/tiny/model_index.json"]


def remove_the_safetensors(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()


def remove_all_weights(folder: Path) -> None:
    remove_the_safetensors(folder)
    (folder / "text_encoder" / "pytorch_model.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (remove_the_safetensors, {}, "owner/tiny: text_encoder/pytorch_model.bin is pickled"),
        (remove_all_weights, {}, "owner/tiny: text_encoder/ has no safetensors"),
        (lambda folder: shutil.rmtree(folder / "vae"), {}, "owner/tiny: vae/ has no files"),
        (lambda folder: None, {"variant": "bf16"}, "owner/tiny has no weights of variant bf16"),
    ],
    ids=["only pickles", "no weights", "no folder", "no variant"],
)
def test_unloadable_repositories_are_refused_before_fetching(
    read: Read, served: Hub, repository: Path, damage: Callable[[Path], object], settings: Any, message: str
) -> None:
    damage(repository)
    assert read(**settings)["error"].startswith(message)
    assert served.fetched == ["owner/tiny/model_index.json"]


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((403, "GatedRepo"), "owner/tiny is gated: accept its terms at https://\\S+/owner/tiny and set HF_TOKEN"),
        ((404, "RepoNotFound"), "owner/tiny is not on the Hugging Face Hub, or is private .*HF_TOKEN"),
        ((401, "RepoNotFound"), "owner/tiny is not on the Hugging Face Hub, or is private .*HF_TOKEN"),
        ((401, ""), "owner/tiny could not be fetched .*HF_TOKEN.*401"),
        ((404, "EntryNotFound"), "owner/tiny is not a diffusers repository: it has no model_index.json"),
    ],
)
def test_a_refusal_by_the_hub_is_reported_in_one_sentence(
    read: Read, served: Hub, refusal: tuple[int, str], message: str
) -> None:
    served.refusals["owner/tiny"] = refusal
    assert re.match(message, read()["error"])


def test_a_missing_revision_is_named(read: Read) -> None:
    assert read(revision="v2")["error"] == "owner/tiny has no revision v2"


def test_an_empty_cache_without_network_is_reported(read: Read, served: Hub) -> None:
    message = read(offline=True)["error"]
    assert message.startswith("owner/tiny is not in the local cache, and the Hub does not respond: ")
    assert not served.requests


def test_an_invalid_repository_name_is_reported(read: Read) -> None:
    assert "owner/.. could not be fetched" in read("owner/..")["error"]


def test_retries_are_logged_in_one_line(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import _http

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ModelError, match="owner/tiny could not be fetched"), hub_files._hub_errors("owner/tiny", None):
        _http.http_backoff("GET", address, max_retries=3, base_wait_time=0, retry_on_exceptions=(Exception,))
    assert [record.name for record in caplog.records] == ["batch_infer"]
    assert re.match(r"the Hugging Face Hub does not respond \(.+\); retrying$", caplog.messages[0])
    # If an earlier command has set up logging, the warning is also on stderr.
    assert [line for line in capfd.readouterr().err.splitlines() if not line.startswith("batch-infer: ")] == []
