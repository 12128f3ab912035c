"""Gemma Scope (params.npz) and Gemma Scope 2 (params.safetensors + config.json): JumpReLU SAEs of Gemma models.

    u = x W_enc + b_enc;  z = u 1[u > threshold];  x_hat = z W_dec + b_dec        (b_dec is not subtracted)

params.npz says nothing about itself: model, layer and site are in the names of the repository and the folder. Both
were trained on contexts of 1,024 tokens after BOS, whose activations were left out, and on rows scaled to a mean square
norm of 1, a scale that the published weights have folded in.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from cache.errors import DataError
from saes.conventions import Conventions
from saes.foreign.folding import fold_input_bias
from saes.foreign.found import (
    Card,
    Found,
    check_tensors,
    read_config,
    read_safetensors,
    refuse_unknown,
    refuse_values,
)
from saes.foreign.npz import read_npz

NPZ, SAFETENSORS = "params.npz", "params.safetensors"
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_SHAPES = {
    "W_enc": ("d_model", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_model"), "b_dec": ("d_model",),
    "threshold": ("d_sae",),
}  # fmt: skip
_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
_SITES_2 = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "attn.hook_z"}
_KNOWN_2 = {"architecture", "model_name", "hf_hook_point_in", "hf_hook_point_out", "width", "l0", "affine_connection",
            "type"}  # fmt: skip
_TEXT: dict[str, Any] = {
    "prepend_bos": True,
    "skip_first": True,
    "context": 1024,
    "dataset": "monology/pile-uncopyrighted",
}


def read(path: Path, card: Card) -> Found:
    """The SAE in the folder `path`."""
    where = card.where or str(path.resolve())
    _refuse_kind(where, path)
    if (path / NPZ).is_file():
        model, hook, l0 = _first(where)
        file = path / NPZ
        held_npz = read_npz(file, _SHAPES, {n.lower(): n for n in _NAMES})
        tensors = {n: torch.from_numpy(held_npz[n]) for n in _NAMES}
    else:
        model, hook, l0 = _second(path, where)
        held = read_safetensors(path / SAFETENSORS, [n.lower() for n in _NAMES])
        tensors, file = {n: held[n.lower()] for n in _NAMES}, path / SAFETENSORS
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    check_tensors(tensors, file)
    fold_input_bias(tensors)
    model = model or card.model
    conventions = Conventions(model=model, l0=l0, **_TEXT)
    return Found({"activation": "jumprelu", "hook": hook, "model": model}, tensors, conventions)


def _refuse_kind(where: str, path: Path) -> None:
    """By the names of the repository and the folders in it: nothing in the files tells these from SAEs."""
    names = "/".join(where.split("/")[-4:])
    if "transcoder" in names or re.search(r"(^|/)clt", names):
        raise DataError(f"{path} is a transcoder by its name: this version reads SAEs of Gemma Scope only")
    if "embedding" in names:
        raise DataError(f"{path}: SAEs of the embedding take scaled rows, which this version does not read")


def _first(where: str) -> tuple[str, str, float | None]:
    """Model, hook and L0 from .../gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71."""
    repo = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)", where)
    layer = re.search(r"layer_(\d+)", where)
    l0 = re.search(r"average_l0_(\d+)", where)
    model = f"google/gemma-2-{repo[1]}{'-it' if repo[2] == 'it' else ''}" if repo else ""
    hook = f"blocks.{layer[1]}.{_SITES[repo[3]]}" if repo and layer else ""
    return model, hook, float(l0[1]) if l0 else None


def _second(path: Path, where: str) -> tuple[str, str, float | None]:
    """Model, hook and L0 of Gemma Scope 2, from config.json and the folder's name."""
    config = path / "config.json"
    raw: dict[str, Any] = read_config(config) if config.is_file() else {}
    refuse_unknown(raw, _KNOWN_2, config)
    refuse_values(raw, {"architecture": ("jump_relu",), "affine_connection": (False, None)}, config)
    inside, outside = raw.get("hf_hook_point_in"), raw.get("hf_hook_point_out")
    if outside not in (None, inside):
        raise DataError(f"{config} is a transcoder from {inside} to {outside}: this version reads SAEs only")
    layer = re.search(r"layer_(\d+)", where) or re.search(r"layers\.(\d+)", inside or "")
    site = next((s for s in _SITES_2 if s in where), None)
    if site is None and inside is not None and re.fullmatch(r"model\.layers\.\d+\.output", inside):
        site = "resid_post"
    model = (raw.get("model_name") or "").replace("-v3", "-3")
    if model and "/" not in model:
        model = f"google/{model}"
    # the smallest base model is published without the suffix
    model = model.removesuffix("-pt") if "270m" in model else model
    l0 = raw.get("l0")
    return (
        model,
        f"blocks.{layer[1]}.{_SITES_2[site]}" if layer and site else "",
        float(l0) if isinstance(l0, int | float) else None,
    )
