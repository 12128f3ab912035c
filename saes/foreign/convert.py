"""`atomscope sae convert`: any format that is read here, once, into a folder of safetensors and cfg.json.

The only place that opens a torch pickle, on the user's explicit order: tensors only, by an unpickler that makes
tensors and plain containers and runs nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cache.errors import DataError, MissingDataError, UsageError
from saes.foreign import dictionary_learning, loading
from saes.sae import SAE


def convert(
    reference: str | Path,
    out: str | Path,
    *,
    norm_factor: float | None = None,
    workspace: str | Path | None = None,
) -> SAE:
    """Write the SAE at a folder or "release:id" to the folder `out` in SAELens's layout, and return it.

    `workspace` may hold a mirror.
    Raises UsageError where `out` holds something, DataError for a pickle that is more than tensors.
    """
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"{target} is not empty: give a new folder")
    folder, card = loading.located(reference, norm_factor=norm_factor, workspace=workspace)
    if loading.format_of(folder) == "dictionary_learning":
        found = dictionary_learning.from_tensors(open_pickle(folder / "ae.pt"), folder, card)
        sae = loading.built(SAE, found, "dictionary_learning", card)
    else:
        sae = loading.load(SAE, reference, norm_factor=norm_factor, workspace=workspace)
    sae.save(target)
    return sae


def open_pickle(path: Path) -> dict[str, Any]:
    """The tensors of a torch pickle by name."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise MissingDataError(f"{path} does not exist: the SAE folder is incomplete") from e
    except Exception as e:  # the unpickler raises as it likes on what it refuses
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DataError(f"{path} is not a pickle of plain tensors ({reason}): it was not opened") from e
    if not isinstance(held, dict) or not all(isinstance(n, str) for n in held):
        raise DataError(f"{path} holds a {type(held).__name__}, not tensors by name")
    return held
