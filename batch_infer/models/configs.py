"""Check a checkpoint's configs against each other and against its tensors, before any network is built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from batch_infer.errors import ModelError
from batch_infer.models.families import Family
from batch_infer.models.untrusted import choose_weights, json_objects, read_object, read_shapes

MAX_IMAGE_SIDE = 8192
"""Maximum side of an image or latents in the config of a network or image processor."""
MAX_SIZE = 1 << 24
"""Maximum for the keys in POSITIVE and LAYER_COUNTS, such as the number of positions of a language model."""
MAX_TRAIN_TIMESTEPS = 100_000
SHORTEST_TEXT = 3
"""Minimum number of tokens of a text: a start token, one token and an end token."""

LAYER_COUNTS = {
    *("layers_per_block", "num_layers", "num_hidden_layers", "num_single_layers", "num_decoder_layers", "n_layers"),
    *("n_refiner_layers", "transformer_layers_per_block", "down_blocks_num_attentions", "down_blocks_num_resnets"),
    *("mid_num_resnets", "mid_num_attentions", "up_blocks_num_attentions", "depth"),
}
"""Keys that count layers. Each layer has at least one tensor, so no count can exceed the number of tensors."""
SIDES = {"sample_size", "image_size", "crop_size", "pos_embed_max_size"}
POSITIVE = {
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "norm_num_groups", "patch_size"),
    *("cross_attention_dim", "attention_head_dim", "num_attention_heads", "hidden_size", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "projection_dim", "num_channels", "d_model", "d_kv", "d_ff"),
    *("num_heads", "joint_attention_dim", "pooled_projection_dim", "caption_projection_dim"),
    *("addition_time_embed_dim", "projection_class_embeddings_input_dim", "time_cond_proj_dim"),
}
"""Keys whose values are positive integers or, for some keys, lists of them."""
Count = Annotated[int, Meta(ge=0)]
Size = Annotated[int, Meta(ge=1)]
Number = Annotated[float, Meta(ge=-1e6, le=1e6)]
TYPES: dict[str, Any] = {
    **dict.fromkeys(POSITIVE, Size),
    **dict.fromkeys(
        ("block_out_channels", "cross_attention_dim", "attention_head_dim", "num_attention_heads"),
        Size | Annotated[list[Size], Meta(min_length=1)],
    ),
    **dict.fromkeys(LAYER_COUNTS, Count | Annotated[list[Count | list[Count]], Meta(min_length=1)]),
    **dict.fromkeys(SIDES, Size | Annotated[list[Size], Meta(min_length=1, max_length=2)] | dict[str, Any]),
    **dict.fromkeys(("shift_factor", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rescale_factor"), Number),
    **dict.fromkeys(("beta_start", "beta_end"), Number),
    **dict.fromkeys(("act_fn", "hidden_act", "beta_schedule", "timestep_spacing"), str),
    "scaling_factor": Annotated[float, Meta(gt=0, le=1e6)],  # latents are divided by it
    "prediction_type": Annotated[str, Meta(pattern="^(epsilon|sample|v_prediction|flow_prediction)$")],
    "num_train_timesteps": Size,
    "steps_offset": int,
}
"""Types of values in the configs of model families. Lists contain image sides, or an entry per network level."""

Fault = str | None


def check_configs(path: Path, components: Iterable[str], name: str, variant: str | None, *, strict: bool) -> None:
    """Check the configs of the components to load. Raises ModelError naming the file and the key.

    `strict` also checks the types of values, which are known only for model families. Without it, only sizes, layer
    counts and the tokenizers' maximum lengths are checked.
    """
    for component in sorted(components):
        folder = path / component
        files = choose_weights(folder.glob("*"), variant)
        shapes = [shape for file in files for shape in read_shapes(file, f"{name}: {component}/{file.name}").values()]
        for file, find_fault in (
            ("config.json", partial(_network_fault, shapes)),
            ("preprocessor_config.json", _size_fault),
            ("scheduler_config.json", _size_fault),
            ("tokenizer_config.json", _tokenizer_fault),
        ):
            document = read_object(folder / file, name) if (folder / file).is_file() else {}
            for key, value in ((key, value) for settings in json_objects(document) for key, value in settings.items()):
                fault = find_fault(key, value)
                if strict and not fault and file != "tokenizer_config.json":
                    fault = _type_fault(key, value)
                if fault:
                    raise ModelError(f"{name}: {component}/{file} has {key}={_shorten(value)}, but {fault}")


def _network_fault(shapes: Sequence[tuple[int, ...]], key: str, value: Any) -> Fault:
    """Return why a network with these tensor shapes cannot have this value, or None."""
    if shapes:
        longest = max((side for shape in shapes for side in shape), default=0)
        too_many = any(number > len(shapes) for number in _integers(value)) if key in LAYER_COUNTS else False
        if isinstance(value, list) and key.endswith(("_channels", "_types")):
            too_many |= len(value) > len(shapes)
        if too_many:
            return f"its weights have only {len(shapes)} tensors"
        if key == "pos_embed_max_size" and any(number**2 > longest for number in _integers(value)):
            return f"the longest side of its tensors is {longest}"
    return _size_fault(key, value)


def _size_fault(key: str, value: Any) -> Fault:
    """Return why a number would make a library allocate or loop excessively, or None."""
    if key in SIDES or key == "size":
        maximum = MAX_IMAGE_SIDE
    elif "train_timesteps" in key:
        maximum = MAX_TRAIN_TIMESTEPS
    elif key in POSITIVE or key in LAYER_COUNTS:
        maximum = MAX_SIZE
    else:
        return None
    numbers = _integers([*value.values()] if isinstance(value, dict) else value)
    return f"the maximum is {maximum}" if any(abs(number) > maximum for number in numbers) else None


def _type_fault(key: str, value: Any) -> Fault:
    """Return why a value is invalid, or None. Null is valid and means the default of the class."""
    try:
        msgspec.convert(value, TYPES.get(key, Any) | None)
    except msgspec.ValidationError as error:
        return f"that is invalid: {error}"
    return None


def _tokenizer_fault(key: str, value: Any) -> Fault:
    if key != "model_max_length" or value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value != int(value) or value < SHORTEST_TEXT:
        return f"it should be a whole number of at least {SHORTEST_TEXT}"
    return None


def _integers(value: Any) -> Iterator[int]:
    """Yield the integers in a value or in nested lists."""
    if isinstance(value, list):
        for part in value:
            yield from _integers(part)
    elif isinstance(value, int):
        yield value


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_widths(path: Path, family: Family, name: str) -> None:
    """Compare the configs of a family's components. Raises ModelError for a mismatch.

    The denoiser's input and output channels must equal the VAE's latent channels. Its text inputs must be as wide as
    the text encoders' outputs. In Stable Diffusion 3, the CLIP encoders' outputs may be narrower: they are padded.
    """
    denoiser = family.denoiser or ""
    network = _read_config(path, denoiser, name)
    network = network.get("configurations", network)
    inputs, outputs = (network.get(key) or family.latent_channels for key in ("in_channels", "out_channels"))
    if inputs != outputs:
        raise ModelError(
            f"{name}: its {denoiser} has {inputs} input and {outputs} output channels, so it is not a text-to-image "
            "checkpoint"
        )
    latents = _read_config(path, "vae", name).get("latent_channels") or 4
    _compare(name, f"{denoiser}/config.json has in_channels", inputs, "vae/config.json has latent_channels", latents)
    encoders = [_read_text_config(path, component, name) for component in family.text_encoders]
    width = sum(encoder.get("hidden_size") or 512 for encoder in encoders)
    if family.joint_attention:
        projection = sum(encoder.get("projection_dim") or 512 for encoder in encoders)
        _check_joint_attention(path, network, width, projection, name)
        return
    expected = network.get("cross_attention_dim") or 1280
    source = f"the total hidden_size of {' and '.join(family.text_encoders)} is"
    for dim in expected if isinstance(expected, list) else [expected]:
        _compare(name, f"{denoiser}/config.json has cross_attention_dim", dim, source, width)


def _check_joint_attention(path: Path, network: Mapping[str, Any], width: int, projection: int, name: str) -> None:
    """Compare the widths of Stable Diffusion 3's transformer and text encoders. Raises ModelError."""
    pooled = network.get("pooled_projection_dim") or 2048
    key = "transformer/config.json has pooled_projection_dim"
    _compare(name, key, pooled, "the total projection_dim of both text encoders is", projection)
    key, joint = "transformer/config.json has joint_attention_dim", network.get("joint_attention_dim") or 4096
    if (path / "text_encoder_3").is_dir():
        t5_width = _read_config(path, "text_encoder_3", name).get("d_model") or 512
        _compare(name, key, joint, "text_encoder_3 has d_model", t5_width)
    if width > joint:
        _compare(name, key, joint, "the total hidden_size of both text encoders is", width)


def _compare(name: str, key: str, value: Any, other: str, expected: Any) -> None:
    if value != expected:
        raise ModelError(
            f"{name}: {key}={_shorten(value)}, but {other} {_shorten(expected)}; do these components belong together?"
        )


def _read_config(path: Path, component: str, name: str) -> dict[str, Any]:
    return read_object(path / component / "config.json", name)


def _read_text_config(path: Path, encoder: str, name: str) -> Mapping[str, Any]:
    config = _read_config(path, encoder, name)
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def text_positions(path: Path, encoder: str, name: str) -> tuple[int, int]:
    """Return the numbers of positions and of token embeddings of a CLIP text encoder. Raises ModelError."""
    config = _read_text_config(path, encoder, name)
    return config.get("max_position_embeddings") or 77, config.get("vocab_size") or 49408
