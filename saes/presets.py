"""Presets: one function per paper, naming a point on the axes with the paper's defaults.

What a paper leaves to a sweep (the weight of its sparsity term) has a default of ours, and says so. Learning rate,
warm-up and batch are the run's (TrainConfig): all SAEs of a run see the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cache.errors import UsageError
from saes.config import Activation, SAEConfig, Space
from saes.train_config import TrainConfig

CONTROL = "control-"
"""Names of SAEs that are trained as a control begin with it (saes/topk_control.py); `latest` means none of them."""


def relu_l1(*, d_sae: int, l1: float | None = None, **other: Any) -> SAEConfig:
    """ReLU with an L1 term (Anthropic, April 2024), warm-up over 5 % of the run.

    Decoder rows are unit here, which makes the L1 norm weighted by ||d_i|| the plain one. The update's l1 = 5 on rows of
    norm sqrt(d_model) does not transfer to another width: codes grow with sqrt(d_model), squared errors with d_model, and
    at d_model 576 it kills every latent. The default is l1 = sqrt(d_model) / 10 (`config.L1_OF_NORM`).
    """
    return SAEConfig(d_sae=d_sae, activation="relu", l1=l1, **other)


def gated(*, d_sae: int, l1: float | None = None, beta1: float | None = 0.0, **other: Any) -> SAEConfig:
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


def threshold_atoms(
    *,
    d_sae: int = 0,
    d_model: int = 0,
    l0: float = 1e-3,
    beta1: float | None = 0.0,
    space: Space = "aip",
    name: str = "",
    **other: Any,
) -> SAEConfig:
    """Threshold atoms (arXiv 2509.20784): JumpReLU in the space whitened by the AIP, a threshold for each atom.

    d_sae defaults to the paper's 4 d_model. The encoder starts as the decoder, which is the paper's W_enc = D^T S. The
    paper leaves optimiser, l0, bandwidth and steps open: they are ours, as is training in whitened space. `space="scalar"`
    trains in plain space and leaves the AIP to the evaluation; it is named "plain".
    """
    d_sae = d_sae or 4 * d_model
    if not d_sae:
        raise UsageError("threshold_atoms needs d_sae, or d_model for the paper's 4 d_model atoms")
    return SAEConfig(
        d_sae=d_sae, d_model=d_model, activation="jumprelu", l0=l0, beta1=beta1, space=space,
        encoder_init=other.pop("encoder_init", "tied"),
        name=name or f"threshold-atoms-{'' if space == 'aip' else 'plain-'}{d_sae}", **other,
    )  # fmt: skip


def gba(*, d_sae: int, activation: Activation = "jumprelu", **other: Any) -> SAEConfig:
    """Group bias adaptation (arXiv 2506.14002), un-shifted form: no sparsity term, biases follow firing rates.

    Target frequencies fall from gba_htf (0.1; the paper's 0.5 is for dictionaries of 66,000) to gba_ltf in 10 groups; the
    rule's speed is scaled to the run (saes/gba.py). `activation="relu"` is the shifted form, `space="unit"` the theory's
    rows of unit norm. The run tells its bound on L0; `gba_l0_budget` asks for one.
    """
    return SAEConfig(d_sae=d_sae, activation=activation, bias_rule="gba", **other)


def fast(preset: Callable[..., SAEConfig]) -> Callable[..., SAEConfig]:
    """FAST (arXiv 2506.07691), a data path for any architecture: `fast(topk)(d_sae=4096, k=32)`.

    Training then insists on a store of a corpus of mode "dialogue" (each chat ran alone) and on skip=None (special tokens
    and position 0 stay in); `fast_schedule` is the paper's. Its block-training baselines are corpora of mode "packed"
    (BT(P), plain text) and "dialogue_packed" (BT(F)), trained with skip=None as well. docs/fast.md.
    """

    def make(**config: Any) -> SAEConfig:
        return preset(**({"data": "fast"} | config))

    return make


def fast_schedule(**other: Any) -> TrainConfig:
    """The paper's training: 41M tokens in batches of 128, Adam, lr 7e-5, warm-up 16,000, then by a cosine to a tenth, and
    from there to 0 over the last fifth. Dead after 1,000 steps; seed 42.
    """
    paper: dict[str, Any] = {
        "steps": 320_000, "batch_size": 128, "lr": 7e-5, "warmup_steps": 16_000, "decay_fraction": 0.2,
        "lr_schedule": "cosine", "lr_end": 0.1, "eps": 1e-8,
        "dead_window_tokens": 128_000, "skip": None, "seed": 42,
    }  # fmt: skip
    return TrainConfig(**(paper | other))


PRESETS = {
    "relu_l1": relu_l1, "gated": gated, "topk": topk, "batch_topk": batch_topk, "jumprelu": jumprelu,
    "matryoshka": matryoshka, "abs_topk": abs_topk, "batch_abs_topk": batch_abs_topk,
    "threshold_atoms": threshold_atoms, "gba": gba,
}  # fmt: skip
