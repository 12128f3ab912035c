"""EleutherAI's sparsify: cfg.json + sae.safetensors (encoder.weight, encoder.bias, W_dec `[n, d]`, b_dec).

    u = (x - b_dec) W^T + b;  z = the k largest of relu(u);  x_hat = z W_dec + b_dec

The folder's name is the hook point (layers.5, layers.5.mlp); config.json one folder up names the model, the text and
the context. Contexts are cut from texts joined by the end token and no position is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.errors import DataError
from saes.conventions import Conventions
from saes.foreign.found import (
    Card,
    Found,
    check_kinds,
    check_tensors,
    read_config,
    read_safetensors,
    refuse_unknown,
    refuse_values,
)
from saes.foreign.module_names import hook_of

WEIGHTS = "sae.safetensors"
_KNOWN = {
    "activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk", "skip_connection",
    "transcode", "d_in", "signed",
}  # fmt: skip
_VALUES: dict[str, tuple[Any, ...]] = {
    "activation": ("topk",),
    "transcode": (False,),
    "skip_connection": (False,),
    "signed": (False,),
}


def read(path: Path, card: Card) -> Found:
    """The SAE in the folder `path`."""
    raw = read_config(path / "cfg.json")
    refuse_unknown(raw, _KNOWN, path / "cfg.json")
    refuse_values(raw, _VALUES, path / "cfg.json")
    check_kinds(raw, {"d_in": int, "k": int}, path / "cfg.json")
    held = read_safetensors(path / WEIGHTS, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    tensors = {
        "W_enc": held["encoder.weight"],
        "b_enc": held["encoder.bias"],
        "W_dec": held["W_dec"],
        "b_dec": held["b_dec"],
    }
    check_tensors(tensors, path / WEIGHTS)
    d_sae, d_in = tensors["W_enc"].shape
    stated = raw.get("num_latents") or raw.get("expansion_factor", 0) * raw["d_in"]
    if d_in != raw["d_in"] or d_sae != stated:
        raise DataError(
            f"{path / WEIGHTS} holds {d_sae} latents of width {d_in}, cfg.json says {stated} of {raw['d_in']}"
        )
    run = read_config(path.parent / "config.json") if (path.parent / "config.json").is_file() else {}
    model = card.model or run.get("model") or ""
    conventions = Conventions(
        model=model, skip_first=False, context=run.get("ctx_len"), dataset=run.get("dataset") or ""
    )
    config = {"activation": "topk", "k": raw["k"], "hook": hook_of(path.name, model), "model": model}
    return Found(config, tensors, conventions)
