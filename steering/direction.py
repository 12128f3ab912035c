"""A direction in the residual stream: where it lives, its unit vector, and what it was taken from.

`vector` is unit length, float32, in raw residual coordinates; `scale` is the length that was divided out
(for a feature of an SAE the norm of its decoder row, so that one unit of its code moves the residual by
`scale`). `sign` is the pole: for a two-sided feature −1 points to what the feature means when negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache.errors import DataError, UsageError


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """A unit vector at a hook."""

    hook: str  # TransformerLens name, e.g. blocks.15.hook_resid_post
    vector: Tensor  # [d_model], float32, unit length; already turned to the pole `sign`
    scale: float = 1.0  # length of the vector before it was normalised
    sign: int = 1  # +1 or −1, the pole that `vector` points to
    feature: int | None = None  # id of the SAE feature it was taken from, if any
    sae: Any | None = None  # the SAE itself: clamping and ablating a feature read its code

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise UsageError(f"sign is {self.sign}: use 1 or -1")
        if self.vector.ndim != 1:
            raise UsageError(f"a direction is one vector [d_model], not shape {tuple(self.vector.shape)}")
        if (self.feature is None) != (self.sae is None):
            raise UsageError("feature and sae belong together: give both or neither")

    @classmethod
    def from_vector(cls, hook: str, vector: Tensor) -> Direction:
        """The direction of any vector, e.g. a difference of means or a probe's weights."""
        unit, scale = _normalise(vector, f"the vector for {hook}")
        return cls(hook=hook, vector=unit, scale=scale)

    @classmethod
    def from_sae_feature(cls, sae: Any, feature: int, sign: int = 1) -> Direction:
        """The decoder row of one feature, turned to the pole `sign`; of a transcoder, as a plain vector where it writes."""
        d_sae = sae.W_dec.shape[0]
        if not 0 <= feature < d_sae:
            raise UsageError(f"feature {feature} does not exist: this SAE has features 0 to {d_sae - 1}")
        unit, scale = _normalise(sae.W_dec[feature].detach(), f"the decoder row of feature {feature}")
        if sae.cfg.transcoder:
            # its code is made from another hook, so an edit at this one cannot read it
            return cls(hook=sae.cfg.out_hook, vector=unit * sign, scale=scale, sign=sign)
        return cls(
            hook=sae.cfg.hook, vector=unit * sign, scale=scale, sign=sign, feature=int(feature), sae=sae
        )


def _normalise(vector: Tensor, what: str) -> tuple[Tensor, float]:
    raw = vector.detach().to(dtype=torch.float32)
    scale = float(raw.norm())
    if not scale > 0 or scale == float("inf"):
        raise DataError(f"{what} has norm {scale}: it points nowhere, choose another")
    return raw / scale, scale
