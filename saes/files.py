"""SAE folders on disk, in SAELens's layout: cfg.json + sae_weights.safetensors (W_enc `[d_in, d_sae]`).

    topk -> topk    abs_topk -> abstopk    jumprelu, batch_topk -> jumprelu    relu -> standard    gated -> gated
    batch_abs_topk -> jumprelu of width 2 d_sae over [W; -W], decoder [D; -D]: u > theta is the positive pole of a
                      signed latent, -u > theta its negative one (SAELens has no signed threshold; this is exact)

sae-lens 6 loads what is written here, and its own folders of these architectures load here. What only atomscope knows
(hook, model, sae_id, the kind of training and its k) stands under `metadata`, where SAELens keeps such things: from
it, batch_* come back as themselves and the two poles as one latent. Nothing is ever unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cache.errors import DataError, MissingDataError
from cache.workspace import atomic_file, read_json, write_json
from saes.config import SAEConfig
from saes.sae import SAE

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURE = {
    "topk": "topk", "abs_topk": "abstopk", "batch_topk": "jumprelu", "batch_abs_topk": "jumprelu",
    "jumprelu": "jumprelu", "relu": "standard", "gated": "gated",
}  # fmt: skip
# what an architecture is without our metadata
_ACTIVATION = {
    "topk": "topk",
    "abstopk": "abs_topk",
    "jumprelu": "jumprelu",
    "standard": "relu",
    "gated": "gated",
}
# names of per-latent tensors in the file -> in memory
_LATENT = {
    "topk": {"b_enc": "b_enc"},
    "abstopk": {"b_enc": "b_enc"},
    "standard": {"b_enc": "b_enc"},
    "jumprelu": {"b_enc": "b_enc", "threshold": "threshold"},
    "gated": {"b_gate": "b_enc", "r_mag": "r_mag", "b_mag": "b_mag"},
}
# SAELens's inference fields; a value that would change what the SAE computes is refused, not ignored
_KNOWN = {
    "architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "metadata",
}  # fmt: skip
_KNOWN_TOPK = {"k", "rescale_acts_by_decoder_norm"}
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "apply_b_dec_to_input": (True,),
    "normalize_activations": ("none",),
    "reshape_activations": ("none",),
}
S = TypeVar("S", bound=SAE)


def save_sae(sae: SAE, path: Path) -> Path:
    """Write the folder: weights first, cfg.json last, each atomic; a folder without cfg.json is not an SAE."""
    cfg = sae.cfg
    path.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().float().cpu() for n, p in sae.named_parameters()}
    bad = [n for n, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise DataError(f"the SAE has NaN or infinite values in {', '.join(bad)}: it is not saved to {path}")
    if cfg.activation == "batch_abs_topk":
        tensors = _both_poles(tensors)
    out = {"W_enc": tensors["W_enc"].T, "W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"]}
    out |= {theirs: tensors[ours] for theirs, ours in _LATENT[ARCHITECTURE[cfg.activation]].items()}
    with atomic_file(path / WEIGHTS) as tmp:
        save_file({n: t.contiguous() for n, t in out.items()}, tmp)
    write_json(path / CFG, to_saelens(cfg, sae.sae_id))
    return path


def to_saelens(cfg: SAEConfig, sae_id: str) -> dict[str, Any]:
    """SAELens's config dictionary of a folded SAE."""
    two_poles = cfg.activation == "batch_abs_topk"
    out: dict[str, Any] = {
        "architecture": ARCHITECTURE[cfg.activation],
        "d_in": cfg.d_model,
        "d_sae": cfg.d_sae * 2 if two_poles else cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if cfg.fixed_k:
        out |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    metadata = {
        "hook_name": cfg.hook,
        "model_name": cfg.model,
        "model_sha256": cfg.model_sha,
        "sae_id": sae_id,
        "name": cfg.label,
        "prepend_bos": False,
        "exclude_first_position": True,
        "made_by": "atomscope",
    }
    if cfg.has_k and not cfg.fixed_k:
        metadata |= {"activation": cfg.activation, "k": cfg.k}
    if two_poles:
        metadata["poles"] = f"latents {cfg.d_sae} and up are the negative poles of the first {cfg.d_sae}"
    return out | {"metadata": metadata}


def load_sae(cls: type[S], path: Path, *, device: str | torch.device = "cpu") -> S:
    """Read a folder that `save_sae` or sae-lens wrote. Raises MissingDataError or DataError, each with the reason."""
    if not (path / CFG).is_file():
        raise MissingDataError(f"no SAE at {path}: the folder has no {CFG} (give the folder that holds it)")
    raw = read_json(path / CFG)
    _refuse_unknown(raw, path)
    meta = raw.get("metadata") or {}
    activation, k = _kind(raw, meta, path)
    tensors = _read_tensors(path / WEIGHTS, raw)
    if activation == "batch_abs_topk":
        tensors = _one_latent_a_pair(tensors, path)
    cfg = SAEConfig(
        d_sae=len(tensors["W_enc"]),
        k=k,
        activation=activation,  # type: ignore[arg-type]
        space="raw",
        d_model=raw["d_in"],
        hook=meta.get("hook_name") or "",
        model=meta.get("model_name") or "",
        model_sha=meta.get("model_sha256") or "",
        name=meta.get("name") or "",
    )
    sae = cls(cfg)
    if raw.get("rescale_acts_by_decoder_norm", False):
        _refuse_unless_unit(tensors["W_dec"], path)
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(sae, name).copy_(tensor)
        if cfg.has_threshold:
            # SAELens applies a ReLU too: a threshold below 0 is one of 0
            sae.threshold.clamp_min_(0.0)
    return sae.to(device).requires_grad_(False)


def _refuse_unknown(raw: dict[str, Any], path: Path) -> None:
    architecture = raw.get("architecture")
    if architecture not in _ACTIVATION:
        raise DataError(
            f"{path / CFG} has architecture {architecture!r}: this version reads {', '.join(sorted(_ACTIVATION))}"
        )
    known = _KNOWN | (_KNOWN_TOPK if architecture in ("topk", "abstopk") else set())
    unknown = sorted(set(raw) - known)
    if unknown:
        raise DataError(
            f"{path / CFG} has unknown keys {', '.join(unknown)}: refused, they may change what the SAE computes"
        )
    for key, allowed in _REQUIRED_VALUES.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise DataError(f"{path / CFG} has {key}={raw[key]!r}: this version reads only {allowed[0]!r}")


def _kind(raw: dict[str, Any], meta: dict[str, Any], path: Path) -> tuple[str, int]:
    """Activation and k: of the architecture, or what atomscope's metadata says it was trained as."""
    activation = _ACTIVATION[raw["architecture"]]
    ours = meta.get("activation") if meta.get("made_by") == "atomscope" else None
    if ours is None:
        return activation, raw.get("k", 0)
    if ARCHITECTURE.get(ours) != raw["architecture"] or not isinstance(meta.get("k"), int):
        raise DataError(
            f"{path / CFG}: its metadata names activation {ours!r} with k={meta.get('k')!r}, its architecture is "
            f"{raw['architecture']}: the file was changed by hand, save the SAE again"
        )
    return ours, meta["k"]


def _both_poles(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {n: torch.cat([tensors[n], -tensors[n]]) for n in ("W_enc", "b_enc", "W_dec")}
    threshold = tensors["threshold"]
    return out | {"threshold": torch.cat([threshold, threshold]), "b_dec": tensors["b_dec"]}


def _one_latent_a_pair(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The inverse of `_both_poles`; refuses a file whose halves are not each other's negatives."""
    half = len(tensors["W_enc"]) // 2
    first = {n: t if n == "b_dec" else t[:half] for n, t in tensors.items()}
    again = _both_poles(first)
    wrong = [n for n, t in tensors.items() if not torch.equal(again[n], t)]
    if wrong:
        raise DataError(
            f"{path / WEIGHTS} should hold each latent and its negative, but the halves of {', '.join(wrong)} do not "
            f'match: take "activation" out of the metadata of {CFG} to load it as a plain JumpReLU SAE'
        )
    return first


def _read_tensors(path: Path, raw: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors by their names in memory, W_enc `[d_sae, d_in]`; checked for names, shapes and finite values."""
    d_in, d_sae = raw["d_in"], raw["d_sae"]
    latent = _LATENT[raw["architecture"]]
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= dict.fromkeys(latent, (d_sae,))
    try:
        with safe_open(path, framework="pt") as f:
            names = set(f.keys())
            if names != set(shapes):
                raise DataError(f"{path} holds {sorted(names)}, expected {sorted(shapes)}")
            tensors = {n: f.get_tensor(n).float() for n in shapes}
    except FileNotFoundError as e:
        raise MissingDataError(f"{path} does not exist: the SAE folder is incomplete") from e
    except SafetensorError as e:
        raise DataError(
            f"{path} is not a readable safetensors file ({e}): fetch or train the SAE again"
        ) from e
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise DataError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, {CFG} says {shape}")
        if not torch.isfinite(tensors[name]).all():
            raise DataError(f"{path}: {name} holds NaN or infinite values")
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    return {latent.get(n, n): t for n, t in tensors.items()}


def _refuse_unless_unit(w_dec: Tensor, path: Path) -> None:
    """Selection by u * ||d|| equals selection by u only for unit decoder rows."""
    off = (w_dec.norm(dim=1) - 1).abs().max().item()
    if off > 1e-3:
        raise DataError(
            f"{path} selects latents by decoder norm (rescale_acts_by_decoder_norm) and its rows are not unit "
            f"(off by {off:.2g}): fold the norms with sae-lens's fold_W_dec_norm before loading"
        )
