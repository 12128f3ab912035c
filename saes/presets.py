"""Presets: one function per paper, naming a point on the axes with the paper's defaults."""

from __future__ import annotations

from typing import Any

from saes.config import SAEConfig


def topk(*, d_sae: int, k: int = 32, auxk: float = 1 / 32, **other: Any) -> SAEConfig:
    """TopK (Gao et al. 2024, arXiv 2406.04093): k largest pre-activations, ReLU, AuxK on dead latents."""
    return SAEConfig(d_sae=d_sae, k=k, activation="topk", auxk=auxk, **other)


def abs_topk(*, d_sae: int, k: int = 32, auxk: float = 1 / 32, **other: Any) -> SAEConfig:
    """AbsTopK (arXiv 2510.00404): k largest |pre-activations| with their sign, so a latent has two poles.

    The paper has no dead-latent term; AuxK on |u| is our choice and can be switched off with `auxk=0`.
    """
    return SAEConfig(d_sae=d_sae, k=k, activation="abs_topk", auxk=auxk, **other)


PRESETS = {"topk": topk, "abs_topk": abs_topk}
