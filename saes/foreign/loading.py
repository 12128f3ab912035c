"""`SAE.load`: a folder in any format that is read here, or "release:id", as a folded SAE with its conventions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from cache.errors import DataError, MissingDataError
from saes.config import SAEConfig
from saes.conventions import Conventions
from saes.foreign import dictionary_learning, gemma_scope, sparsify
from saes.foreign.folding import fold_input_factor
from saes.foreign.found import Card, Found
from saes.foreign.releases import locate, split_reference
from saes.sae import SAE

S = TypeVar("S", bound=SAE)
_READERS = {
    "sparsify": sparsify.read,
    "gemma_scope": gemma_scope.read,
    "dictionary_learning": dictionary_learning.read,
}


def load(
    cls: type[S],
    reference: str | Path,
    *,
    device: str | torch.device = "cpu",
    norm_factor: float | None = None,
    workspace: str | Path | None = None,
) -> S:
    """The SAE at a folder or "release:id"; `workspace` may hold a mirror."""
    folder, card = located(reference, norm_factor=norm_factor, workspace=workspace)
    kind = format_of(folder)
    if kind == "saelens":
        from saes.files import load_sae

        return load_sae(cls, folder, device=device, card=card)
    return built(cls, _READERS[kind](folder, card), kind, card).to(device)


def located(
    reference: str | Path, *, norm_factor: float | None = None, workspace: str | Path | None = None
) -> tuple[Path, Card]:
    """Folder and card of a reference; `norm_factor` wins over the files and the directory."""
    named = split_reference(str(reference))
    folder, card = (Path(reference), Card()) if named is None else locate(*named, workspace)
    if norm_factor is not None:
        if not norm_factor > 0:
            raise DataError(f"norm_factor is a factor on the rows above 0, got {norm_factor}")
        card = replace(card, given_factor=norm_factor)
    return folder, card


def format_of(folder: Path) -> str:
    """The format of a folder by the files in it; MissingDataError where there is none."""
    kind = _kind(folder)
    if kind is not None:
        return kind
    inside = sorted(p.name for p in folder.iterdir() if _kind(p)) if folder.is_dir() else []
    if inside:
        more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
        raise MissingDataError(
            f"no SAE at {folder}: it is a folder of SAEs, give one of them, {', '.join(inside[:5])}{more}"
        )
    raise MissingDataError(
        f"no SAE at {folder}: the folder has no cfg.json (SAELens, sparsify), params.npz or params.safetensors (Gemma "
        "Scope) or ae.pt (dictionary_learning): give the folder that holds it"
    )


def _kind(folder: Path) -> str | None:
    def has(name: str) -> bool:
        return (folder / name).is_file()

    if has(gemma_scope.NPZ) or has(gemma_scope.SAFETENSORS):
        return "gemma_scope"
    if has(dictionary_learning.WEIGHTS):
        return "dictionary_learning"
    if has("cfg.json"):
        return "sparsify" if has(sparsify.WEIGHTS) else "saelens"
    return None


def built(cls: type[S], found: Found, kind: str, card: Card) -> S:
    """The module from what a reader found."""
    if card.given_factor is not None:
        fold_input_factor(found.tensors, card.given_factor)
    d_sae, d_model = found.tensors["W_enc"].shape
    sae = cls(SAEConfig(d_sae=d_sae, d_model=d_model, space="raw", **found.config))
    expected = dict(sae.named_parameters())
    if set(expected) != set(found.tensors):
        raise DataError(
            f"a {kind} SAE holds {sorted(found.tensors)}, {sae.cfg.activation} needs {sorted(expected)}"
        )
    with torch.no_grad():
        for name, p in expected.items():
            p.copy_(found.tensors[name])
        if sae.cfg.has_threshold:
            # a ReLU follows the threshold in all of these formats: one below 0 is one of 0
            sae.threshold.clamp_min_(0.0)
    sae.conventions = Conventions(
        **{
            **vars(found.conventions),
            "l0": found.conventions.l0 if found.conventions.l0 is not None else card.l0,
            "fvu": found.conventions.fvu if found.conventions.fvu is not None else card.fvu,
            "source": f"{kind} {card.reference}".strip(),
        }
    )
    return sae.requires_grad_(False)
