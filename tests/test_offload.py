"""Offloading: which network is on the device when, that images stay the same, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from batch_infer.chain import RenderedImage
from batch_infer.errors import SettingsError
from batch_infer.jobs import choose_compute
from batch_infer.models import ModelCard, read_card
from batch_infer.models.offloading import OneNetworkDevice, offload_networks
from batch_infer.records import SizeRules
from batch_infer.settings import (
    Compute,
    ComputeSettings,
    Device,
    ModelSettings,
    Offload,
    RunSettings,
    TableSettings,
)
from batch_infer.worker import load_model, make_chain
from tests.pipelines import save_flux
from tests.rendering import CPU, make_request
from tests.runs import run
from tests.tables import write_csv

COMPUTE = Compute("cpu", "float32", 4, 1, 1)
GPU = Device("cuda", "NVIDIA H200")
PROMPTS = ("a red circle", "two blue squares", "a small star", "a green line")
STEPS = (2, 5, 3, 4)
"""Different numbers of steps, so that rows are decoded while others are denoised."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path, sdxl_folder: Path) -> dict[str, Path]:
    flux = save_flux(tmp_path_factory.mktemp("pipelines") / "flux")
    return {"sd1": sd1_folder, "sdxl": sdxl_folder, "flux": flux}


def card_of(folder: Path, **settings: Any) -> ModelCard:
    card = read_card(ModelSettings(name=str(folder), **settings))
    return replace(card, sizes=SizeRules(64, 64, card.sizes.side_multiple, card.sizes.min_side))


def load(folder: Path, offload: Offload | None = None, **settings: Any) -> Any:
    card = card_of(folder, **settings)
    return load_model(card, replace(COMPUTE, offload=offload), with_checker=card.has_checker)


def render(model: Any, offload: Offload | None = None) -> dict[str, np.ndarray]:
    rows = [
        make_request(str(seed), prompt, steps=steps, guidance=3.5, seed=seed)
        for seed, (prompt, steps) in enumerate(zip(PROMPTS, STEPS, strict=True))
    ]
    if model.denoiser.config.get("guidance_embeds"):
        rows = [replace(row, params=replace(row.params, embedded_guidance=True)) for row in rows]
    chain = make_chain(model, replace(COMPUTE, offload=offload))
    images = {}
    for outcome in chain.render(rows):
        assert isinstance(outcome, RenderedImage), outcome.error
        images[outcome.request.id] = outcome.pixels
    return images


class Moves:
    """Records networks that move, and checks that at most one is on the device."""

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        self._names = {id(network): name for name, network in networks.items()}
        self.loaded: list[str] = []
        self.on_device: set[str] = set()

    @contextmanager
    def recorded(self) -> Iterator[Moves]:
        load, evict = OneNetworkDevice.load, OneNetworkDevice._evict

        def record_load(place: OneNetworkDevice, network: nn.Module) -> None:
            name = self._names[id(network)]
            is_new = name not in self.on_device
            load(place, network)
            if is_new:
                self.loaded.append(name)
            self.on_device.add(name)
            assert self.on_device == {name}

        def record_evict(place: OneNetworkDevice, network: nn.Module | None) -> None:
            self.on_device.discard(self._names.get(id(network), ""))
            evict(place, network)

        with (
            mock.patch.object(OneNetworkDevice, "load", record_load),
            mock.patch.object(OneNetworkDevice, "_evict", record_evict),
        ):
            yield self


def networks_of(model: Any) -> dict[str, nn.Module]:
    components = {**model.pipeline.components, "safety_checker": model.safety_checker}
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


@pytest.mark.parametrize("mode", ["model", "sequential"])
@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux"])
def test_images_do_not_change(folders: dict[str, Path], name: str, mode: Offload) -> None:
    expected, images = render(load(folders[name])), render(load(folders[name], mode), mode)
    assert images.keys() == expected.keys()
    assert all(np.array_equal(images[key], expected[key]) for key in expected)


def test_one_network_at_a_time_is_on_the_device_while_rows_are_in_progress(folders: dict[str, Path]) -> None:
    model = load(folders["sd1"], "model")
    with Moves(networks_of(model)).recorded() as moves:
        render(model, "model")
    # Two rows with guidance fill the slots, and each later row is encoded, denoised, decoded and checked among others.
    assert set(moves.loaded) == {"text_encoder", "unet", "vae", "safety_checker"}
    assert moves.loaded[:2] == ["text_encoder", "unet"]
    assert moves.loaded.count("vae") == len(PROMPTS)
    assert moves.loaded.count("unet") > 1


def test_hooks_survive_calls_of_a_pipeline(folders: dict[str, Path]) -> None:
    """diffusers removes and adds only its own hooks at the end of a call, and trial calls keep all hooks."""
    model = load(folders["flux"], "model")
    with Moves(networks_of(model)).recorded() as moves:
        render(model, "model")
        model.pipeline.maybe_free_model_hooks()
        assert {"text_encoder", "text_encoder_2", "transformer", "vae"} == set(moves.loaded)
        del moves.loaded[:]
        render(model, "model")
        assert {"transformer", "vae"} == set(moves.loaded), "the encoded text is cached"


def test_quantized_networks_move(folders: dict[str, Path]) -> None:
    for kind in ("int8", "nf4"):
        expected = render(load(folders["sd1"], quantize=kind))
        images = render(load(folders["sd1"], "model", quantize=kind), "model")
        assert all(np.array_equal(images[key], expected[key]) for key in expected)


def test_layers_leave_the_device_after_they_ran() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    inputs = torch.ones(1, 4)
    expected = network(inputs)
    offload_networks([network, network, None, "no network"], CPU, "sequential")
    assert all(weight.is_meta for weight in network.parameters())
    with torch.inference_mode():
        assert torch.equal(network(inputs), expected)
    assert all(weight.is_meta for weight in network.parameters())


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def test_moves_are_hidden_from_modes_and_do_not_make_inference_tensors() -> None:
    """Otherwise the trial calls of a pipeline would seem to depend on which network was on the device."""

    class Movable(nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            self.weight.data = self.weight.data.clone()  # as a move to another device
            return self

    network, place = Movable(4, 4), OneNetworkDevice(CPU)
    with _Recorder() as recorder, torch.inference_mode():
        place.load(network)
    assert not recorder.operations
    assert not network.weight.is_inference()


def test_a_network_that_does_not_fit_leaves_nothing_on_the_device() -> None:
    moves: list[tuple[str, str]] = []

    class Network(nn.Linear):
        def __init__(self, name: str, fits: bool = True) -> None:
            super().__init__(4, 4)
            self.name, self.fits = name, fits

        def to(self, *args: Any, **kwargs: Any) -> Any:
            moves.append((self.name, str(*args)))
            if moves[-1][1] == "meta" and not self.fits:
                raise torch.OutOfMemoryError("out of memory")
            return self

    small, large, place = Network("small"), Network("large", fits=False), OneNetworkDevice(torch.device("meta"))
    place.load(small)
    with pytest.raises(torch.OutOfMemoryError):
        place.load(large)
    place.load(small)
    place.load(small)
    assert moves == [("small", "meta"), ("small", "cpu"), ("large", "meta"), ("large", "cpu"), ("small", "meta")]


def compute_of(device: Device, earlier: dict[str, Any] | None = None, **options: Any) -> Compute:
    names = {"quantize", "long_prompts", "lora_folder"} & options.keys()
    model = ModelSettings(**{name: options.pop(name) for name in names})
    settings = RunSettings(TableSettings(()), "out", model=model, compute=ComputeSettings(**options))
    return choose_compute(settings, device, {"compute": earlier or {}})


def test_nothing_is_compiled_and_the_choice_of_an_earlier_run_does_not_count() -> None:
    compute = compute_of(GPU, {"offload": "sequential"}, offload="model")
    assert (compute.offload, compute.compiled) == ("model", False)
    assert compute_of(GPU, {"offload": "sequential", "compiled": False}).offload is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"compiled": True},
            "--offload model does not work with torch.compile, which --compile requests: leave",
        ),
        (
            {"earlier": {"compiled": True}},
            "--offload model does not work with torch.compile, which the run in OUT",
        ),
        ({"long_prompts": True}, "--offload model and --long-prompts do not work together: leave one out"),
        ({"lora_folder": "loras"}, "--offload model and --lora-folder do not work together: leave one out"),
        (
            {"offload": "sequential", "quantize": "nf4"},
            "--offload sequential cannot move quantized layers: use --offload model, or leave out --quantize nf4",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_work_together_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        compute_of(GPU, **{"offload": "model", **options})
    assert str(caught.value).startswith(sentence)


def test_a_cpu_is_refused(tmp_path: Path, out: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]])
    refused = run(table, out, "--offload", "model")
    assert refused.code == 2
    assert "--offload model saves GPU memory, but this run renders on a CPU: use `run` without it" in refused.stderr
    assert not out.exists() or not any(Path(out).rglob("*.png"))


def _is_background(chains: Iterable[Any]) -> list[bool]:
    return [chain._in_background for chain in chains]


def test_nothing_runs_in_background(sd1_folder: Path) -> None:
    """A VAE in another thread would take the denoiser's place while it runs."""
    model = load(sd1_folder)
    model.device = torch.device("cuda")
    chains = [make_chain(model, replace(COMPUTE, offload=mode)) for mode in (None, "model", "sequential")]
    assert _is_background(chains) == [True, False, False]
