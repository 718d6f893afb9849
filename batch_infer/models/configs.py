"""Checks of a checkpoint's settings against each other and against its tensors, before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.models.files import read_shapes
from batch_infer.models.untrusted import read_object

MAX_SIDE = 8192
"""Largest side of an image or latent that a network's or processor's settings may name."""
MAX_SIZE = 1 << 24
"""Largest number of anything else, such as positions of a language model."""
MAX_TRAIN_TIMESTEPS = 100_000
SHORTEST_TEXT = 3
"""Tokens: a start, an end, and one between them."""
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")

LAYER_COUNTS = {
    *("layers_per_block", "num_layers", "num_hidden_layers", "num_single_layers", "num_decoder_layers", "n_layers"),
    *("n_refiner_layers", "transformer_layers_per_block", "down_blocks_num_attentions", "down_blocks_num_resnets"),
    *("mid_num_resnets", "mid_num_attentions", "up_blocks_num_attentions", "depth"),
}
"""Every layer has at least one tensor, so that none of these can be more than the file's tensors."""
SIDES = {"sample_size", "image_size", "crop_size", "pos_embed_max_size"}
POSITIVE = {
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "norm_num_groups", "patch_size"),
    *("cross_attention_dim", "attention_head_dim", "num_attention_heads", "hidden_size", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "projection_dim", "num_channels", "d_model", "d_kv", "d_ff"),
    *("num_heads", "joint_attention_dim", "pooled_projection_dim", "caption_projection_dim"),
    *("addition_time_embed_dim", "projection_class_embeddings_input_dim", "time_cond_proj_dim"),
}
"""Whole numbers above zero; null is the class's default."""
LISTS = LAYER_COUNTS | {"block_out_channels", "cross_attention_dim", "attention_head_dim", "num_attention_heads"}
"""Which of them may be a list, with one for each level of the network."""
NUMBERS = {"scaling_factor", "shift_factor", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rescale_factor"}
NUMBERS |= {"beta_start", "beta_end"}
TEXTS = {"act_fn", "hidden_act", "beta_schedule", "timestep_spacing", "prediction_type"}

Fault = str | None


def check_configs(path: Path, components: Iterable[str], name: str, variant: str | None, *, strict: bool) -> None:
    """Check the settings of all components that are read. Raises ModelError, naming the file and the key.

    `strict` is for the families whose networks are known here: every key must then have the type that they take.
    Settings of other pipelines are only kept from asking for more than can be built.
    """
    for component in sorted(components):
        folder = path / component
        if (folder / "config.json").is_file():
            shapes = read_shapes(folder, variant, name)
            _check(folder / "config.json", name, _network_fault(shapes), strict=strict)
        for file in ("preprocessor_config.json", "scheduler_config.json"):
            if (folder / file).is_file():
                _check(folder / file, name, _size_fault, strict=strict)
        if (folder / "tokenizer_config.json").is_file():
            _check(folder / "tokenizer_config.json", name, _tokenizer_fault, strict=False)


def _check(path: Path, name: str, fault_of: Callable[[str, Any], Fault], *, strict: bool) -> None:
    for key, value in _settings(read_object(path, name)):
        if fault := fault_of(key, value) or (_type_fault(key, value) if strict else None):
            raise ModelError(f"{name}: {path.parent.name}/{path.name} has {key}={_shown(value)}, but {fault}")


def _settings(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a configuration, and of those inside of it (text_config, vision_config)."""
    for key, value in document.items():
        yield key, value
        if isinstance(value, dict):
            yield from _settings(value)


def _network_fault(shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str, Any], Fault]:
    layers = len(shapes)
    longest = max((side for shape in shapes.values() for side in shape), default=0)

    def fault(key: str, value: Any) -> Fault:
        if not shapes:
            return _size_fault(key, value)
        if key in LAYER_COUNTS and any(number > layers for number in _integers(value)):
            return f"its weights are {layers} tensors"
        if key == "pos_embed_max_size" and any(number**2 > longest for number in _integers(value)):
            return f"the largest tensor of its weights has a side of {longest}"
        if isinstance(value, list) and key.endswith(("_channels", "_types")) and len(value) > layers:
            return f"its weights are {layers} tensors"
        return _size_fault(key, value)

    return fault


def _size_fault(key: str, value: Any) -> Fault:
    """Say what is wrong with a number that would make a library allocate, or loop, without end."""
    most = MAX_SIDE if key in SIDES or key == "size" else MAX_TRAIN_TIMESTEPS if "train_timesteps" in key else None
    if most is None:
        most = MAX_SIZE if key in POSITIVE or key in LAYER_COUNTS else None
    numbers = _integers([*value.values()] if isinstance(value, dict) else value)
    if most is not None and any(abs(number) > most for number in numbers):
        return f"at most {most} can be used"
    return None


def _type_fault(key: str, value: Any) -> Fault:
    """Say what is wrong with the type of a value; null is left to the class."""
    if value is None:
        return None
    if key in POSITIVE | LAYER_COUNTS:
        least = 0 if key in LAYER_COUNTS else 1
        parts = list(_flat(value))
        if isinstance(value, list) and key not in LISTS:
            return "it should be a whole number"
        if not parts or not all(type(part) is int and part >= least for part in parts):
            return f"it should be a whole number of at least {least}"
    if key in SIDES and not isinstance(value, dict):
        parts = value if isinstance(value, list) else [value]
        if len(parts) not in (1, 2) or not all(type(part) is int and part > 0 for part in parts):
            return "it should be a whole number above 0, or two"
    if key in NUMBERS and (type(value) not in (int, float) or not math.isfinite(value)):
        return "it should be a finite number"
    if key == "scaling_factor" and value == 0:
        return "latents are divided by it"
    if key == "prediction_type" and value not in PREDICTION_TYPES:
        return f"it should be one of {', '.join(PREDICTION_TYPES)}"
    if "train_timesteps" in key and (type(value) is not int or value < 1):
        return "it should be a whole number above 0"
    if key == "steps_offset" and type(value) is not int:
        return "it should be a whole number"
    if key in TEXTS and not isinstance(value, str):
        return "it should be a text"
    return None


def _tokenizer_fault(key: str, value: Any) -> Fault:
    if key != "model_max_length" or value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value != int(value) or value < SHORTEST_TEXT:
        return f"it should be a whole number of at least {SHORTEST_TEXT}"
    return None


def _integers(value: Any) -> list[int]:
    return [part for part in _flat(value) if isinstance(part, int)]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_widths(path: Path, family: str, denoiser: str, name: str) -> None:
    """Compare the settings of a family's components with each other. Raises ModelError, naming both.

    The denoiser's latents must be the VAE's, and its texts as wide as the text encoders make them.
    """

    def config(component: str) -> dict[str, Any]:
        return read_object(path / component / "config.json", name)

    network = config(denoiser)
    network = network.get("configurations", network)
    is_sd3 = family == "stable_diffusion_3"
    channels = _get(network, "in_channels", 16 if is_sd3 else 4)
    made = _get(network, "out_channels", 16 if is_sd3 else 4)
    if channels != made:
        raise ModelError(
            f"{name}: its {denoiser} takes {channels} channels and gives {made}, so it is no text-to-image checkpoint"
        )
    vae = _get(config("vae"), "latent_channels", 4)
    _compare(name, f"{denoiser}/config.json has in_channels", channels, "vae/config.json has latent_channels", vae)
    has_two = family in ("stable_diffusion_xl", "stable_diffusion_3")
    names = ("text_encoder", "text_encoder_2") if has_two else ("text_encoder",)
    encoders = [_text_config(config(component)) for component in names]
    widths = [_get(encoder, "hidden_size", 512) for encoder in encoders]
    if not is_sd3:
        wanted = _get(network, "cross_attention_dim", 1280)
        for width in wanted if isinstance(wanted, list) else [wanted]:
            made_by = f"hidden_size of {' and '.join(names)} makes"
            _compare(name, f"{denoiser}/config.json has cross_attention_dim", width, made_by, sum(widths))
        return
    projections = sum(_get(encoder, "projection_dim", 512) for encoder in encoders)
    pooled = _get(network, "pooled_projection_dim", 2048)
    _compare(name, "transformer/config.json has pooled_projection_dim", pooled, "both projection_dim make", projections)
    joint = _get(network, "joint_attention_dim", 4096)
    if (path / "text_encoder_3").is_dir():
        large = _get(config("text_encoder_3"), "d_model", 512)
        _compare(name, "transformer/config.json has joint_attention_dim", joint, "text_encoder_3 has d_model", large)
    if sum(widths) > joint:
        _compare(name, "transformer/config.json has joint_attention_dim", joint, "two text encoders make", sum(widths))


def _compare(name: str, key: str, value: Any, other: str, expected: Any) -> None:
    if value != expected:
        raise ModelError(
            f"{name}: {key}={_shown(value)}, but {other} {_shown(expected)}; do its parts belong together?"
        )


def _get(config: Mapping[str, Any], key: str, default: int) -> Any:
    value = config.get(key)
    return default if value is None else value


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def text_positions(path: Path, encoder: str, name: str) -> tuple[int, int]:
    """Return how many positions and how many token embeddings a CLIP text encoder has. Raises ModelError."""
    config = _text_config(read_object(path / encoder / "config.json", name))
    return _get(config, "max_position_embeddings", 77), _get(config, "vocab_size", 49408)
