"""Where prompts are encoded: on a GPU on a stream of its own, so that its small copies wait for no UNet call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from batch_infer.chain.streams import stream_of

if TYPE_CHECKING:
    from batch_infer.models import Conditioning


class Encoding:
    """A stream beside the one that the UNet is called on; on a CPU there is none."""

    def __init__(self, device: torch.device) -> None:
        self._stream = stream_of(device, "encode")

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Work on this stream; what follows on the UNet's waits for it, and the host does not."""
        if self._stream is None:
            yield
            return
        unet = torch.cuda.current_stream()
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            unet.wait_stream(self._stream)

    def lend(self, conditioning: Conditioning) -> None:
        """Let the UNet's stream use what was made on this one: its memory is not given away before that has run."""
        if self._stream is None:
            return
        for part in conditioning.context:
            for tensor in (part or {}).values():
                tensor.record_stream(torch.cuda.current_stream())
