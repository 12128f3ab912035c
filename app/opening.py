"""Any published SAE over any text: bring it into the workspace, run its model the way it was trained, index it.

The steps are those of the other commands (corpus build, harvest, sae check, index); what is chosen here comes from the
SAE's conventions: model, hook, BOS, context. An SAE from elsewhere is saved under saes/imported-<sae_id>/, in the
layout that all commands read, with what it came from beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache.errors import UsageError
from cache.provenance import provenance
from cache.workspace import write_json

DEFAULT_CONTEXT = 128


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What `open_text` made."""

    sae: Path
    store: str
    index: Path
    checked: Any
    """The `saes.checking.Check` on the store."""
    notes: tuple[str, ...]
    """Conventions that could not be followed."""


def bring_in(
    reference: str, root: Path, *, hook: str | None = None, norm_factor: float | None = None
) -> tuple[Any, Path]:
    """The SAE at a folder or "release:id", and its folder in the workspace. `hook` names the hook where files do not."""
    from saes.foreign.loading import load
    from saes.sae import SAE

    sae = load(SAE, reference, norm_factor=norm_factor, workspace=root)
    if hook and sae.cfg.hook and hook != sae.cfg.hook:
        raise UsageError(f"the SAE reads {sae.cfg.hook}, not {hook}: leave --hook out")
    # what is given here and not in the files makes another SAE than the folder holds
    as_saved = norm_factor is None
    if hook and not sae.cfg.hook:
        sae.cfg, as_saved = replace(sae.cfg, hook=hook), False
    folder = Path(reference)
    if as_saved and (folder / "cfg.json").is_file() and folder.resolve().is_relative_to(root.resolve()):
        return sae, folder
    sae.cfg = replace(sae.cfg, name=sae.cfg.name or _name(reference))
    target = root / "saes" / f"imported-{sae.sae_id}" / f"0-{sae.cfg.label}"
    if not (target.parent / "run.json").is_file() or not (target / "cfg.json").is_file():
        sae.save(target)
        write_json(target.parent / "run.json", _record(sae, target.name, reference))
    return sae, target


def _record(sae: Any, name: str, reference: str) -> dict[str, Any]:
    """What the list of runs shows of an SAE that was not trained here."""
    return {
        "schema_version": 1,
        "saes": [name],
        "configs": [sae.cfg.to_dict()],
        "train": {"steps": 0, "seed": None},
        "data": {"store": "", "reference": reference},
        "tokens": 0,
        "status": "imported",
        "provenance": provenance(reference=reference),
    }


def _name(reference: str) -> str:
    """A short name for folders and plots from release:id or a path."""
    text = reference if ":" in reference and not Path(reference).exists() else Path(reference).resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60] or "imported"


def model_source(name: str) -> str:
    """A name that load_model takes: TransformerLens's short names (gpt2-small) turned into hub ids."""
    from cache.assets import ASSETS

    if not name or name in ASSETS or Path(name).expanduser().is_dir():
        return name
    try:
        from transformer_lens.loading_from_pretrained import get_official_model_name

        return get_official_model_name(name)
    except (ImportError, ValueError):
        return name


def open_text(
    reference: str,
    text: str,
    root: Path,
    *,
    model: str | None = None,
    hook: str | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
    norm_factor: float | None = None,
) -> Opened:
    """Index the SAE at `reference` over the text; every step goes on where an earlier call stopped."""
    from cache import build_corpus, harvest, load_model
    from saes import build_index
    from saes.checking import check
    from saes.conventions import said

    sae, folder = bring_in(reference, root, hook=hook, norm_factor=norm_factor)
    c, cfg = sae.conventions, sae.cfg
    if cfg.transcoder:
        raise UsageError(
            "open is for SAEs: harvest both hooks of a transcoder into one store, then `atomscope index`"
        )
    if not cfg.hook:
        raise UsageError(
            "the files of this SAE do not name its hook: give --hook, e.g. blocks.5.hook_resid_post"
        )
    if model is None and not (c.model or cfg.model):
        raise UsageError("the files of this SAE do not name its model: give --model, a folder or a hub id")
    if model is None and c.revision:
        raise UsageError(
            f"the SAE was trained on checkpoint {c.revision} of {c.model}: give the folder of that checkpoint as --model"
        )
    lm = load_model(model or model_source(c.model or cfg.model), workspace=root)
    bos, notes = _bos(c.prepend_bos, lm.tokenizer)
    wanted = context or c.context or DEFAULT_CONTEXT
    longest = min(wanted, lm.max_context or wanted)
    corpus = build_corpus(
        text, lm.tokenizer, context=longest, max_tokens=max_tokens, workspace=root, prepend_bos=bos
    )
    store = harvest(lm, corpus, hooks=[cfg.hook], workspace=root)
    checked = check(sae, store)
    said(sae, store)
    index = build_index(sae, store, lm, sae_path=folder)
    return Opened(sae=folder, store=store.path.name, index=index, checked=checked, notes=notes)


def _bos(wanted: bool | None, tokenizer: Any) -> tuple[bool | None, tuple[str, ...]]:
    """The SAE's BOS policy, as far as the tokenizer can follow it."""
    if wanted and tokenizer.bos_token_id is None:
        return None, ("its training put BOS before each context, and this tokenizer has none",)
    return wanted, ()
