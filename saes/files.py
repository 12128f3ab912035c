"""SAE folders on disk, in SAELens's layout: cfg.json + sae_weights.safetensors (W_enc `[d_in, d_sae]`).

    topk -> topk    abs_topk -> abstopk    jumprelu, batch_topk -> jumprelu    relu -> standard    gated -> gated
    batch_abs_topk -> jumprelu of width 2 d_sae over [W; -W], decoder [D; -D]: u > theta is the positive pole of a
                      signed latent, -u > theta its negative one (SAELens has no signed threshold; this is exact)

A transcoder's architecture is `transcoder` (relu), `jumprelu_transcoder` (jumprelu, batch_*), which sae-lens has, or
`topk_`, `abstopk_`, `gated_transcoder` in the same layout, which it has not; W_dec `[d_sae, d_out]`, b_dec `[d_out]`.

sae-lens 6 loads what is written here, and its own folders of these architectures load here. What only atomscope knows
(hook, model, sae_id, the kind of training and its k) stands under `metadata`, where SAELens keeps such things: from
it, batch_* come back as themselves and the two poles as one latent. Space `unit` normalises each row at run time, a
rule that sae-lens does not have (its own leave b_dec in the row): normalize_activations names it, and sae-lens refuses
the folder. Nothing is ever unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cache.errors import DataError, MissingDataError
from cache.workspace import atomic_file, write_json
from saes.config import SAEConfig
from saes.foreign.found import Card, check_kinds, read_config
from saes.foreign.saelens import UNIT, apply_conventions, conventions_of, upgraded
from saes.sae import SAE

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURE = {
    "topk": "topk", "abs_topk": "abstopk", "batch_topk": "jumprelu", "batch_abs_topk": "jumprelu",
    "jumprelu": "jumprelu", "relu": "standard", "gated": "gated",
}  # fmt: skip
# architecture of an SAE -> of a transcoder
_TRANSCODER = {a: f"{a}_transcoder" for a in ("topk", "abstopk", "jumprelu", "gated")} | {
    "standard": "transcoder"
}
_SAE_OF = {transcoder: a for a, transcoder in _TRANSCODER.items()}
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
    written = to_saelens(cfg, sae.sae_id)
    written["metadata"] |= sae.conventions.to_metadata()
    write_json(path / CFG, written)
    return path


def to_saelens(cfg: SAEConfig, sae_id: str) -> dict[str, Any]:
    """SAELens's config dictionary of a folded SAE."""
    two_poles = cfg.activation == "batch_abs_topk"
    architecture = ARCHITECTURE[cfg.activation]
    out: dict[str, Any] = {
        "architecture": _TRANSCODER[architecture] if cfg.transcoder else architecture,
        "d_in": cfg.d_model,
        "d_sae": cfg.d_sae * 2 if two_poles else cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not cfg.transcoder,
        "normalize_activations": UNIT if cfg.space == "unit" else "none",
        "reshape_activations": "none",
    }
    if cfg.transcoder:
        out["d_out"] = cfg.d_out
    if cfg.fixed_k:
        out |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    metadata: dict[str, Any] = {
        "hook_name": cfg.hook,
        "model_name": cfg.model,
        "model_sha256": cfg.model_sha,
        "sae_id": sae_id,
        "name": cfg.label,
        "made_by": "atomscope",
    }
    if cfg.transcoder:
        metadata["hook_name_out"] = cfg.out_hook
    if cfg.has_k and not cfg.fixed_k:
        metadata |= {"activation": cfg.activation, "k": cfg.k}
    if two_poles:
        metadata["poles"] = f"latents {cfg.d_sae} and up are the negative poles of the first {cfg.d_sae}"
    return out | {"metadata": metadata}


def load_sae(cls: type[S], path: Path, *, device: str | torch.device = "cpu", card: Card | None = None) -> S:
    """Read a folder that `save_sae` or sae-lens wrote. Raises MissingDataError or DataError, each with the reason."""
    card = card or Card()
    if not (path / CFG).is_file():
        raise MissingDataError(f"no SAE at {path}: the folder has no {CFG} (give the folder that holds it)")
    raw = upgraded(read_config(path / CFG), card, path / CFG)
    _refuse_unknown(raw, path)
    needed = ("d_in", "d_sae", "k") if _plain(raw) in ("topk", "abstopk") else ("d_in", "d_sae")
    check_kinds(raw, dict.fromkeys(needed, int), path / CFG)
    meta = raw["metadata"]
    activation, k = _kind(raw, meta, path)
    tensors = _read_tensors(path / WEIGHTS, raw)
    apply_conventions(tensors, raw, card, path / CFG)
    if activation == "batch_abs_topk":
        tensors = _one_latent_a_pair(tensors, path)
    cfg = SAEConfig(
        d_sae=len(tensors["W_enc"]),
        k=k,
        activation=activation,  # type: ignore[arg-type]
        space="unit" if raw.get("normalize_activations") == UNIT else "raw",
        d_model=raw["d_in"],
        hook=meta.get("hook_name") or "",
        out_hook=(meta.get("hook_name_out") or "") if "d_out" in raw else "",
        d_out=raw.get("d_out", 0),
        model=meta.get("model_name") or "",
        model_sha=meta.get("model_sha256") or "",
        name=meta.get("name") or "",
    )
    sae = cls(cfg)
    sae.conventions = conventions_of(meta, card)
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(sae, name).copy_(tensor)
        if cfg.has_threshold:
            # SAELens applies a ReLU too: a threshold below 0 is one of 0
            sae.threshold.clamp_min_(0.0)
    return sae.to(device).requires_grad_(False)


def _refuse_unknown(raw: dict[str, Any], path: Path) -> None:
    architecture = raw.get("architecture")
    readable = (*_ACTIVATION, *_SAE_OF)
    if architecture not in readable:
        raise DataError(
            f"{path / CFG} has architecture {architecture!r}: this version reads {', '.join(sorted(readable))}"
        )
    transcoder = architecture in _SAE_OF
    if transcoder and not (isinstance(raw.get("d_out"), int) and raw["d_out"] > 0):
        raise DataError(f"{path / CFG} is a {architecture} without d_out, the width of its output")
    known = _KNOWN | (_KNOWN_TOPK if _plain(raw) in ("topk", "abstopk") else set())
    known |= {"d_out"} if transcoder else set()
    unknown = sorted(set(raw) - known)
    if unknown:
        raise DataError(
            f"{path / CFG} has unknown keys {', '.join(unknown)}: refused, they may change what the SAE computes"
        )


def _plain(raw: dict[str, Any]) -> str:
    """The architecture, as it is called where the target is the input."""
    return _SAE_OF.get(raw["architecture"], raw["architecture"])


def _kind(raw: dict[str, Any], meta: dict[str, Any], path: Path) -> tuple[str, int]:
    """Activation and k: of the architecture, or what atomscope's metadata says it was trained as."""
    activation = _ACTIVATION[_plain(raw)]
    ours = meta.get("activation") if meta.get("made_by") == "atomscope" else None
    if ours is None:
        return activation, raw.get("k", 0)
    if ARCHITECTURE.get(ours) != _plain(raw) or not isinstance(meta.get("k"), int):
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
    d_out = raw.get("d_out", d_in)
    latent = _LATENT[_plain(raw)]
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(latent, (d_sae,))
    try:
        with safe_open(path, framework="pt") as f:
            names = set(f.keys())
            # sae-lens before version 6 wrote factors of 1
            if "scaling_factor" in names and bool((f.get_tensor("scaling_factor") == 1).all()):
                names.discard("scaling_factor")
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
