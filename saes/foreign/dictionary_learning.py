"""dictionary_learning: config.json + ae.pt, a torch pickle, which is read by `atomscope sae convert` only.

    AutoEncoder, AutoEncoderNew -> relu      GatedAutoEncoder -> gated      JumpReluAutoEncoder -> jumprelu
    AutoEncoderTopK -> topk                  BatchTopKSAE, MatryoshkaBatchTopKSAE -> batch_topk with their threshold

AutoEncoder's decoder rows are made unit, as its own `from_pretrained` does. AutoEncoderNew and JumpReluAutoEncoder
do not subtract b_dec. Whether contexts began with BOS is not stated: the tokenizer's own habit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from cache.errors import DataError, MissingDataError
from saes.conventions import Conventions
from saes.foreign.folding import fold_decoder_norms, fold_input_bias
from saes.foreign.found import Card, Found, check_kinds, check_tensors, read_config, refuse_unknown

WEIGHTS = "ae.pt"
_ENCODER = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_GATED = {
    "encoder.weight": "W_enc", "decoder.weight": "W_dec", "decoder_bias": "b_dec", "gate_bias": "b_enc",
    "r_mag": "r_mag", "mag_bias": "b_mag",
}  # fmt: skip
# dict_class -> activation, names in the file -> in memory
_CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "AutoEncoder": ("relu", _ENCODER | {"bias": "b_dec"}),
    "AutoEncoderNew": ("relu", _ENCODER | {"decoder.bias": "b_dec"}),
    "GatedAutoEncoder": ("gated", _GATED),
    "JumpReluAutoEncoder": ("jumprelu", _PLAIN | {"threshold": "threshold"}),
    "AutoEncoderTopK": ("topk", _ENCODER | {"b_dec": "b_dec", "k": "k", "threshold": ""}),
    "BatchTopKSAE": ("batch_topk", _ENCODER | {"b_dec": "b_dec", "k": "k", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": (
        "batch_topk", _PLAIN | {"k": "k", "threshold": "threshold", "group_sizes": ""},
    ),
}  # fmt: skip
_UNSUBTRACTED = ("AutoEncoderNew", "JumpReluAutoEncoder")
# `encode` of the library leaves threshold of AutoEncoderTopK out; older versions did not save it
_OPTIONAL = {"AutoEncoderTopK": {"threshold", "k"}, "BatchTopKSAE": {"k"}, "MatryoshkaBatchTopKSAE": {"k"}}
_SITE = re.compile(r"(resid_post|resid_pre|attn_out|mlp_out)_layer_(\d+)")


def read(path: Path, card: Card) -> Found:
    """Refused: the weights are a pickle. The line names the command that converts them."""
    raise DataError(
        f"{path / WEIGHTS} is a pickle, which is not opened on the way: convert it once, with tensors only, by "
        f"`atomscope sae convert {path} OUT` and load OUT{' (' + card.reference + ')' if card.reference else ''}"
    )


def from_tensors(held: dict[str, Any], path: Path, card: Card) -> Found:
    """The SAE of an opened ae.pt beside its config.json."""
    config_path = path / "config.json"
    if not config_path.is_file():
        raise MissingDataError(f"{config_path} is not there: it names the class of {path / WEIGHTS}")
    raw = read_config(config_path)
    refuse_unknown(raw, ("trainer", "buffer"), config_path)
    check_kinds(
        {"buffer": {}} | {k: v for k, v in raw.items() if v}, {"trainer": dict, "buffer": dict}, config_path
    )
    trainer, buffer = raw["trainer"], raw.get("buffer") or {}
    name = trainer.get("dict_class")
    if name not in _CLASSES:
        raise DataError(f"{config_path} has dict_class {name!r}: this version reads {', '.join(_CLASSES)}")
    activation, names = _CLASSES[name]
    tensors, k = _named(held, names, _OPTIONAL.get(name, set()), path / WEIGHTS)
    if "encoder.weight" in names:
        tensors["W_dec"] = tensors["W_dec"].T.contiguous()
    else:
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    if "threshold" in tensors and tensors["threshold"].ndim == 0:
        tensors["threshold"] = tensors["threshold"].repeat(len(tensors["W_enc"]))
    check_tensors(tensors, path / WEIGHTS)
    shape = (trainer.get("dict_size"), trainer.get("activation_dim"))
    if tuple(tensors["W_enc"].shape) != shape:
        raise DataError(
            f"{path / WEIGHTS} holds an encoder {tuple(tensors['W_enc'].shape)}, config.json says {shape}"
        )
    if name in _UNSUBTRACTED:
        fold_input_bias(tensors)
    if name == "AutoEncoder":
        fold_decoder_norms(tensors)
    if activation == "batch_topk" and float(tensors["threshold"].min()) < 0:
        raise DataError(
            f"{path / WEIGHTS}: its threshold was never estimated (it is below 0), so every positive latent would fire: "
            "train it past threshold_start_step"
        )
    k = _the_k(k, trainer.get("k"), activation, path)
    model = card.model or trainer.get("lm_name") or ""
    conventions = Conventions(
        model=model, context=buffer.get("ctx_len"), l0=_target(trainer, activation, k), skip_first=None
    )
    config: dict[str, Any] = {"activation": activation, "hook": _hook(trainer), "model": model}
    return Found(config | ({"k": k} if k else {}), tensors, conventions)


def _named(
    held: dict[str, Any], names: dict[str, str], optional: set[str], path: Path
) -> tuple[dict[str, Tensor], int | None]:
    wrong = [n for n, t in held.items() if not isinstance(t, Tensor)]
    if wrong or not set(names) - optional <= set(held) or set(held) - set(names):
        raise DataError(f"{path} holds {sorted(held)}, expected {sorted(names)}")
    tensors = {ours: held[n].float() for n, ours in names.items() if ours not in ("", "k") and n in held}
    return tensors, int(held["k"]) if "k" in held and "k" in names else None


def _the_k(saved: int | None, stated: int | None, activation: str, path: Path) -> int:
    if activation not in ("topk", "batch_topk"):
        return 0
    if saved is not None and stated is not None and saved != stated:
        raise DataError(
            f"{path}: ae.pt has k={saved}, config.json says {stated}: they do not belong together"
        )
    k = saved if saved is not None else stated
    if k is None:
        raise DataError(f"{path}: neither ae.pt nor config.json says k")
    return int(k)


def _target(trainer: dict[str, Any], activation: str, k: int) -> float | None:
    if activation == "jumprelu":
        return trainer.get("target_l0")
    return float(k) if k else None


def _hook(trainer: dict[str, Any]) -> str:
    """Of a submodule named as the library's own scripts do; "" for any other."""
    found = _SITE.fullmatch(trainer.get("submodule_name") or "")
    return f"blocks.{found[2]}.hook_{found[1]}" if found else ""
