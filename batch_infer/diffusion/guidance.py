"""Classifier-free guidance with the scale and the rescale factor of each row."""

from __future__ import annotations

import torch


def guide(
    conditional: torch.Tensor, unconditional: torch.Tensor, scale: torch.Tensor, rescale: torch.Tensor | None
) -> torch.Tensor:
    """Combine the two predictions of each row.

    conditional, unconditional (R, C, h, w); scale, rescale (R,); rescale is None if no row uses it. A row without
    guidance passes its one prediction as both: u + s (c - u) is then exactly c.

    Ho & Salimans, arXiv 2207.12598, eq. 6; rescale: Lin et al., arXiv 2305.08891, section 3.4.
    """
    guided = unconditional + _column(scale) * (conditional - unconditional)
    if rescale is None:
        return guided
    dims = (1, 2, 3)
    ratio = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    factor = _column(rescale)
    rescaled = factor * (guided * ratio) + (1 - factor) * guided
    # where, and not 0 * ...: a row without rescale keeps its bytes even where the ratio is not finite.
    return torch.where(factor > 0, rescaled, guided)


def _column(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, 1, 1, 1)
