"""What a reader hands over, and the checks that all readers share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cache.errors import DataError, MissingDataError
from cache.workspace import read_json
from saes.conventions import Conventions


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known about an SAE beside its files: from sae-lens's directory of releases, or from the caller."""

    reference: str = ""
    """release:id."""
    where: str = ""
    """Repository and folder, from which some formats read layer and model."""
    model: str = ""
    l0: float | None = None
    fvu: float | None = None
    norm_factor: float | None = None
    """Factor on the rows in training, by the directory: for files that say there was one and leave it out."""
    given_factor: float | None = None
    """The same from the caller: applied whatever the files say."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys that replace those of a SAELens cfg.json."""


class Found(NamedTuple):
    """One SAE of a foreign format, folded."""

    config: dict[str, Any]
    """Fields of `SAEConfig`, less d_sae and d_model."""
    tensors: dict[str, Tensor]
    """float32, by their names in memory."""
    conventions: Conventions


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file that describes an SAE: an object."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise DataError(f"{path} holds a {type(raw).__name__}, not the keys of an SAE: fetch the SAE again")
    return raw


def check_kinds(raw: dict[str, Any], kinds: dict[str, type], path: Path) -> None:
    """Keys that must be there, each of its kind; a number is a whole one above 0."""
    for key, kind in kinds.items():
        value = raw.get(key)
        if type(value) is not kind or (isinstance(value, int) and kind is int and value < 1):
            what = "a whole number above 0" if kind is int else f"of kind {kind.__name__}"
            raise DataError(f"{path} has {key}={value!r}, which must be {what}: fetch the SAE again")


def refuse_unknown(keys: Iterable[str], known: Iterable[str], path: Path) -> None:
    """A key that this version does not know may change what the SAE computes."""
    unknown = sorted(set(keys) - set(known))
    if unknown:
        raise DataError(
            f"{path} has unknown keys {', '.join(unknown)}: refused, they may change what the SAE computes"
        )


def refuse_values(raw: dict[str, Any], allowed: dict[str, tuple[Any, ...]], path: Path) -> None:
    """Keys whose other values mean another computation."""
    for key, values in allowed.items():
        if key in raw and raw[key] not in values:
            raise DataError(f"{path} has {key}={raw[key]!r}: this version reads only {values[0]!r}")


def read_safetensors(path: Path, names: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Tensor]:
    """Exactly the tensors `names`, and those of `optional` that are there, as float32."""
    wanted, may = set(names), set(optional)
    try:
        with safe_open(path, framework="pt") as f:
            held = set(f.keys())
            if not wanted <= held or held - wanted - may:
                raise DataError(f"{path} holds {sorted(held)}, expected {sorted(wanted)}")
            return {n: f.get_tensor(n).float() for n in held}
    except FileNotFoundError as e:
        raise MissingDataError(f"{path} does not exist: the SAE folder is incomplete") from e
    except SafetensorError as e:
        raise DataError(f"{path} is not a readable safetensors file ({e}): fetch the SAE again") from e


def check_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Shapes that belong together, and finite values."""
    d_sae, d_model = tensors["W_enc"].shape if tensors["W_enc"].ndim == 2 else (0, 0)
    want = {"W_enc": (d_sae, d_model), "W_dec": (d_sae, d_model), "b_dec": (d_model,)}
    for name, t in tensors.items():
        if tuple(t.shape) != want.get(name, (d_sae,)) or not t.numel():
            raise DataError(
                f"{path}: {name} has shape {tuple(t.shape)}, expected {want.get(name, (d_sae,))} beside the others"
            )
        if not torch.isfinite(t).all():
            raise DataError(f"{path}: {name} holds NaN or infinite values")
