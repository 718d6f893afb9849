"""Find the networks of a pipeline, and copy a pipeline for one row so that rows share only the networks."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from batch_infer.accelerator import copy_to

Kind = Literal["encode", "denoise", "decode"]


@dataclass(frozen=True, eq=False)
class Network:
    """A network of a pipeline and the method that pipelines call. `name` is `prior_pipe.prior` in nested pipelines."""

    name: str
    module: Any
    kind: Kind
    device: torch.device
    """Where the network computes. Its weights may be elsewhere, if they are offloaded."""

    @property
    def method(self) -> str:
        return "decode" if self.kind == "decode" else "forward"

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the method's parameters, from the class, since a replaced method may not have them."""
        method = getattr(type(self.module), self.method)
        if inspect.isfunction(method):  # before 0.42, diffusers wraps `decode` in a function with other parameters
            method = inspect.getclosurevars(method).nonlocals.get("method", method)
        return tuple(inspect.signature(method).parameters)[1:]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs} if args else dict(kwargs)

    def evaluate(self, arguments: Mapping[str, Any]) -> Any:
        """Call the method, which may be replaced."""
        return getattr(self.module, self.method)(**self.to_device(arguments))

    def to_device(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return arguments whose tensors are on the device of the network, where timesteps may not be yet."""
        if self.device.type == "cpu":
            return arguments
        return {
            name: copy_to(self.device, value)
            if isinstance(value, torch.Tensor) and value.device.type == "cpu"
            else value
            for name, value in arguments.items()
        }

    @contextmanager
    def replaced(self, replace: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> Iterator[None]:
        """Temporarily replace the method on the instance. `replace` gets the original method and the arguments.

        A proxy of the network would not do, since pipelines read its config and enter its cache contexts.
        """
        original = getattr(self.module, self.method)

        def method(*args: Any, **kwargs: Any) -> Any:
            return replace(original, self.bind(args, kwargs))

        with replaced_method(self.module, self.method, method):
            yield


@contextmanager
def replaced_method(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Temporarily replace a method of an object by a function.

    The function gets the method's signature, because pipelines inspect it. An object may have its own method instead of
    its class's, such as the `forward` of a compiled network or of one with accelerate's hooks.
    """
    own = vars(owner).get(name)
    object.__setattr__(owner, name, functools.wraps(getattr(owner, name))(method))
    try:
        yield
    finally:
        object.__delattr__(owner, name)
        if own is not None:
            object.__setattr__(owner, name, own)


def find_networks(pipeline: Any) -> tuple[Network, ...]:
    """Return the networks of a pipeline and of the pipelines inside it, each once.

    Text encoders are models of transformers. A network with an encoder and `decode` is an autoencoder, and any other
    network of diffusers is a denoiser.
    """
    networks: dict[int, Network] = {}
    device = pipeline._execution_device  # diffusers searches all modules for hooks
    for name, module in _walk(pipeline, ""):
        if id(module) in networks:
            continue
        is_decoder = hasattr(module, "decode") and hasattr(module, "encode")
        kind: Kind = "decode" if is_decoder else "denoise" if isinstance(module, ModelMixin) else "encode"
        networks[id(module)] = Network(name, module, kind, device)
    return tuple(networks.values())


def _walk(pipeline: Any, prefix: str) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, part in vars(pipeline).items():
        if isinstance(part, torch.nn.Module):
            yield prefix + name, part
    for name, part in vars(pipeline).items():
        if isinstance(part, DiffusionPipeline):
            yield from _walk(part, f"{prefix}{name}.")


def has_nested_pipelines(pipeline: Any) -> bool:
    return any(isinstance(part, DiffusionPipeline) for part in vars(pipeline).values())


def copy_pipeline(
    pipeline: Any, device: torch.device, *, host_timesteps: bool, memo: dict[int, Any] | None = None
) -> Any:
    """Return a copy for one row: calls set attributes of their pipeline, and schedulers and guiders have state.

    `device` is where the networks compute. With `host_timesteps`, timesteps stay on the CPU, where schedulers read them
    at every step. On a GPU, each read would wait for all queued work.
    """
    memo = {} if memo is None else memo
    if id(pipeline) in memo:
        return memo[id(pipeline)]
    memo[id(pipeline)] = row_pipeline = copy.copy(pipeline)
    for name, part in vars(pipeline).items():
        if isinstance(part, DiffusionPipeline):
            copied = copy_pipeline(part, device, host_timesteps=host_timesteps, memo=memo)
        elif isinstance(part, SchedulerMixin) or _is_guider(part):
            if id(part) not in memo:
                memo[id(part)] = copy.deepcopy(part)
                if host_timesteps and isinstance(part, SchedulerMixin):
                    memo[id(part)].__class__ = _with_host_timesteps(cast(Any, type(part)))
            copied = memo[id(part)]
        else:
            continue
        row_pipeline.__dict__[name] = copied
    row_pipeline.__class__ = _as_row(cast(Any, type(pipeline)), device)
    return row_pipeline


@functools.cache
def _as_row(pipeline_type: Any, device: torch.device) -> Any:
    """Return a subclass for the copies of a pipeline.

    Its device is fixed: diffusers searches all modules for hooks whenever a call asks for it, about 10 times, and the
    weights of offloaded networks are elsewhere. `maybe_free_model_hooks` does nothing, because other rows still use the
    hooks of offloaded networks.
    """
    fixed = property(lambda self: device)
    members = {"_execution_device": fixed, "device": fixed, "maybe_free_model_hooks": lambda self: None}
    return type(pipeline_type.__name__, (pipeline_type,), members)


def _is_guider(part: Any) -> bool:
    return type(part).__module__.startswith("diffusers.guiders")


@functools.cache
def _with_host_timesteps(scheduler_type: Any) -> Any:
    """Return a subclass that keeps its timesteps on the CPU. A method set on the instance would make a cycle."""
    signature = inspect.signature(scheduler_type.set_timesteps)

    @functools.wraps(scheduler_type.set_timesteps)  # pipelines inspect the signature
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        positional = arguments.pop("self")
        scheduler_type.set_timesteps(positional, **{**arguments, "device": "cpu"})

    return type(scheduler_type.__name__, (scheduler_type,), {"set_timesteps": set_timesteps})
