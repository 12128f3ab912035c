"""SAE folders on disk, in SAELens's layout: cfg.json + sae_weights.safetensors (W_enc `[d_in, d_sae]`).

sae-lens 6 loads what is written here, and its own TopK and AbsTopK folders load here. What only atomscope knows
(hook, model, sae_id) stands under `metadata`, where SAELens keeps such things. Nothing is ever unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cache.errors import DataError, MissingDataError
from cache.workspace import atomic_file, read_json, write_json
from saes.config import SAEConfig
from saes.sae import SAE

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURE = {"topk": "topk", "abs_topk": "abstopk"}
_ACTIVATION = {v: k for k, v in ARCHITECTURE.items()}
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
# SAELens's inference fields; a value that would change what the SAE computes is refused, not ignored
_KNOWN = {
    "architecture", "d_in", "d_sae", "k", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "rescale_acts_by_decoder_norm", "metadata",
}  # fmt: skip
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
    tensors = {n: getattr(sae, n).detach().float().cpu() for n in _TENSORS}
    bad = [n for n, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise DataError(f"the SAE has NaN or infinite values in {', '.join(bad)}: it is not saved to {path}")
    tensors["W_enc"] = tensors["W_enc"].T
    with atomic_file(path / WEIGHTS) as tmp:
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp)
    write_json(path / CFG, to_saelens(cfg, sae.sae_id))
    return path


def to_saelens(cfg: SAEConfig, sae_id: str) -> dict[str, Any]:
    """SAELens's config dictionary of a folded SAE."""
    return {
        "architecture": ARCHITECTURE[cfg.activation],
        "d_in": cfg.d_model,
        "d_sae": cfg.d_sae,
        "k": cfg.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "hook_name": cfg.hook,
            "model_name": cfg.model,
            "model_sha256": cfg.model_sha,
            "sae_id": sae_id,
            "name": cfg.label,
            "prepend_bos": False,
            "exclude_first_position": True,
            "made_by": "atomscope",
        },
    }


def load_sae(cls: type[S], path: Path, *, device: str | torch.device = "cpu") -> S:
    """Read a folder that `save_sae` or sae-lens wrote. Raises MissingDataError or DataError, each with the reason."""
    if not (path / CFG).is_file():
        raise MissingDataError(f"no SAE at {path}: the folder has no {CFG} (give the folder that holds it)")
    raw = read_json(path / CFG)
    architecture = raw.get("architecture")
    if architecture not in _ACTIVATION:
        raise DataError(
            f"{path / CFG} has architecture {architecture!r}: this version reads {', '.join(sorted(_ACTIVATION))}"
        )
    unknown = sorted(set(raw) - _KNOWN)
    if unknown:
        raise DataError(
            f"{path / CFG} has unknown keys {', '.join(unknown)}: refused, they may change what the SAE computes"
        )
    for key, allowed in _REQUIRED_VALUES.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise DataError(f"{path / CFG} has {key}={raw[key]!r}: this version reads only {allowed[0]!r}")
    meta = raw.get("metadata") or {}
    cfg = SAEConfig(
        d_sae=raw["d_sae"],
        k=raw["k"],
        activation=_ACTIVATION[architecture],  # type: ignore[arg-type]
        space="raw",
        d_model=raw["d_in"],
        hook=meta.get("hook_name") or "",
        model=meta.get("model_name") or "",
        model_sha=meta.get("model_sha256") or "",
        name=meta.get("name") or "",
    )
    sae = cls(cfg)
    tensors = _read_tensors(path / WEIGHTS, cfg)
    if raw.get("rescale_acts_by_decoder_norm", False):
        _refuse_unless_unit(tensors["W_dec"], path)
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(sae, name).copy_(tensor)
    return sae.to(device).requires_grad_(False)


def _read_tensors(path: Path, cfg: SAEConfig) -> dict[str, torch.Tensor]:
    shapes = {
        "W_enc": (cfg.d_model, cfg.d_sae),
        "b_enc": (cfg.d_sae,),
        "W_dec": (cfg.d_sae, cfg.d_model),
        "b_dec": (cfg.d_model,),
    }
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
    return tensors


def _refuse_unless_unit(w_dec: torch.Tensor, path: Path) -> None:
    """Selection by u * ||d|| equals selection by u only for unit decoder rows."""
    off = (w_dec.norm(dim=1) - 1).abs().max().item()
    if off > 1e-3:
        raise DataError(
            f"{path} selects latents by decoder norm (rescale_acts_by_decoder_norm) and its rows are not unit "
            f"(off by {off:.2g}): fold the norms with sae-lens's fold_W_dec_norm before loading"
        )
