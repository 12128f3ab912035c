"""Presets: one function per paper, naming a point on the axes with the paper's defaults.

What a paper leaves to a sweep (the weight of its sparsity term) has a default of ours, and says so. Learning rate,
warm-up and batch are the run's (TrainConfig): all SAEs of a run see the same batches.
"""

from __future__ import annotations

from typing import Any

from saes.config import SAEConfig


def relu_l1(*, d_sae: int, l1: float = 5.0, **other: Any) -> SAEConfig:
    """ReLU with an L1 term (Anthropic, April 2024): l1 = 5 on rows of norm sqrt(d_model), warm-up over 5 % of the run.

    Decoder rows are unit here, which makes the L1 norm weighted by ||d_i|| the plain one. Codes grow with
    sqrt(d_model), squared errors with d_model: a narrow model needs less than 5.
    """
    return SAEConfig(d_sae=d_sae, activation="relu", l1=l1, **other)


def gated(*, d_sae: int, l1: float = 5.0, beta1: float | None = 0.0, **other: Any) -> SAEConfig:
    """Gated (Rajamanoharan et al. 2024, arXiv 2404.16014): L1 on the gate, frozen decoder in its auxiliary term.

    The paper sweeps l1; the default is that of relu_l1, whose units it shares.
    """
    return SAEConfig(d_sae=d_sae, activation="gated", l1=l1, beta1=beta1, **other)


def topk(*, d_sae: int, k: int = 32, auxk: float = 1 / 32, **other: Any) -> SAEConfig:
    """TopK (Gao et al. 2024, arXiv 2406.04093): k largest pre-activations, ReLU, AuxK on dead latents."""
    return SAEConfig(d_sae=d_sae, k=k, activation="topk", auxk=auxk, **other)


def batch_topk(*, d_sae: int, k: int = 32, auxk: float = 1 / 32, **other: Any) -> SAEConfig:
    """BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): k a row on average over a batch; a global threshold after."""
    return SAEConfig(d_sae=d_sae, k=k, activation="batch_topk", auxk=auxk, **other)


def jumprelu(
    *, d_sae: int, l0: float = 1e-3, l0_target: float = 0.0, beta1: float | None = 0.0, **other: Any
) -> SAEConfig:
    """JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): trained thresholds under an L0 term.

    The paper sweeps l0 and trains log theta with a bandwidth of 0.001 on rows of unit norm; here theta itself, and
    bandwidth and first threshold are 0.05 standard deviations of u, which is that for a wide SAE. `l0_target` above 0
    asks for an L0 instead, quadratically.
    """
    return SAEConfig(d_sae=d_sae, activation="jumprelu", l0=l0, l0_target=l0_target, beta1=beta1, **other)


def matryoshka(
    *, d_sae: int, k: int = 32, auxk: float = 1 / 32, matryoshka: tuple[int, ...] = (), **other: Any
) -> SAEConfig:
    """Matryoshka BatchTopK (Bussmann et al. 2025, arXiv 2503.17547): nested prefixes reconstruct alone.

    Prefixes default to the paper's shares of d_sae: 1/32, 3/32, 7/32 and 15/32 (2k, 6k, 14k, 30k of 64k).
    """
    prefixes = matryoshka or tuple(sorted({w for s in (1, 3, 7, 15) if (w := d_sae * s // 32)}))
    return SAEConfig(d_sae=d_sae, k=k, activation="batch_topk", auxk=auxk, matryoshka=prefixes, **other)


def abs_topk(*, d_sae: int, k: int = 32, auxk: float = 1 / 32, **other: Any) -> SAEConfig:
    """AbsTopK (arXiv 2510.00404): k largest |pre-activations| with their sign, so a latent has two poles.

    The paper has no dead-latent term; AuxK on |u| is our choice and can be switched off with `auxk=0`.
    """
    return SAEConfig(d_sae=d_sae, k=k, activation="abs_topk", auxk=auxk, **other)


def batch_abs_topk(*, d_sae: int, k: int = 32, auxk: float = 1 / 32, **other: Any) -> SAEConfig:
    """AbsTopK over a batch, the form its authors' research code trains: k a row on average, threshold on |u| after."""
    return SAEConfig(d_sae=d_sae, k=k, activation="batch_abs_topk", auxk=auxk, **other)


PRESETS = {
    "relu_l1": relu_l1, "gated": gated, "topk": topk, "batch_topk": batch_topk, "jumprelu": jumprelu,
    "matryoshka": matryoshka, "abs_topk": abs_topk, "batch_abs_topk": batch_abs_topk,
}  # fmt: skip
