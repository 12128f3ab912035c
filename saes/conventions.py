"""What an SAE assumes about its input: the model, the text before a token, and what its makers measured.

A field that is None or empty was not stated. `SAE.load` reads them from the files of each format, `SAE.save` keeps
them under `metadata` by SAELens's names, training fills them in from the store, and `check`, `evaluate` and `build_index`
compare them with theirs. What changes the numbers of the SAE itself (normalised input, b_dec, centred weights) is folded on load instead.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """Conventions of one SAE; not part of its id."""

    model: str = ""
    """Name of the model as its makers wrote it."""
    revision: str = ""
    """Checkpoint of the model, where it is not the released one."""
    prepend_bos: bool | None = None
    """Whether each context began with BOS."""
    skip_first: bool | None = None
    """Whether position 0 was left out of training: it is then not spliced either."""
    context: int | None = None
    """Tokens of a context."""
    centred: bool = False
    """Trained on a model whose writing weights were centred, so its rows have mean 0 over d_model. The encoder has it
    folded in and takes plain rows; reconstructions lack that mean, which a LayerNorm takes away."""
    dataset: str = ""
    """Text it was trained on."""
    l0: float | None = None
    """Active latents a token, as stated or as fixed by k."""
    fvu: float | None = None
    """Fraction of variance unexplained, as stated, or as training logged it last."""
    source: str = ""
    """Format and reference it was read from; empty: trained here."""

    @property
    def skip(self) -> str | None:
        """Rows left out of what is measured, as a stream's `skip`: position 0, unless it was part of training."""
        return None if self.skip_first is False else "first"

    def to_metadata(self) -> dict[str, Any]:
        """Under SAELens's names where it has them; what was not stated is left out."""
        stated = {
            "prepend_bos": self.prepend_bos,
            "exclude_first_position": self.skip_first,
            "context_size": self.context,
            "model_from_pretrained_kwargs": {"center_writing_weights": True} if self.centred else None,
            "dataset_path": self.dataset or None,
            "model_revision": self.revision or None,
            "stated_l0": self.l0,
            "stated_fvu": self.fvu,
            "source": self.source or None,
        }
        return {k: v for k, v in stated.items() if v is not None}

    @classmethod
    def from_metadata(cls, meta: dict[str, Any]) -> Conventions:
        """The inverse of `to_metadata`; also reads what sae-lens itself writes there."""
        kwargs = meta.get("model_from_pretrained_kwargs") or {}
        revision = kwargs.get("revision") or kwargs.get("checkpoint_value") or kwargs.get("checkpoint_index")
        return cls(
            model=meta.get("model_name") or "",
            revision=str(meta.get("model_revision") or revision or ""),
            prepend_bos=meta.get("prepend_bos"),
            skip_first=_skips_first(meta),
            context=meta.get("context_size"),
            centred=bool(kwargs.get("center_writing_weights")),
            dataset=str(meta.get("dataset_path") or ""),
            l0=meta.get("stated_l0"),
            fvu=meta.get("stated_fvu"),
            source=meta.get("source") or "",
        )


def of_training(source: Any, skip: str | None, l0: float | None, fvu: float | None = None) -> Conventions:
    """Of an SAE trained on the store or ring behind `source`; of a tensor nothing is known but L0 and FVU.

    fvu: of the rows as they are, up to scale; None where training measured it in another space.
    """
    store = getattr(source, "store", None)
    if store is None:
        return Conventions(l0=l0, fvu=fvu)
    identity, left_out = store.identity, set((skip or "").split("+"))
    # where every row begins with BOS or with a chat template, `special` leaves position 0 out too
    opens = identity.get("prepend_bos") or store.corpus.meta.get("mode") in ("dialogue", "dialogue_aligned")
    return Conventions(
        model=identity.get("model") or "",
        prepend_bos=identity.get("prepend_bos"),
        skip_first=bool({"first", "not_assistant"} & left_out) or ("special" in left_out and bool(opens)),
        context=store.corpus.context,
        dataset=str(store.corpus.meta.get("name") or ""),
        l0=l0,
        fvu=fvu,
    )


def differences(sae: Any, store: Any) -> list[str]:
    """Lines on what the store does otherwise than the SAE's makers."""
    c, identity, out = sae.conventions, store.identity, []
    model = c.model or sae.cfg.model
    ours, theirs = _short(identity.get("model") or ""), _short(model)
    if ours and theirs and ours != theirs and not sae.cfg.model_sha:
        out.append(f"the SAE was made for {model}, the store is of {identity['model']}")
    bos = identity.get("prepend_bos")
    if c.prepend_bos is not None and bos is not None and c.prepend_bos != bos:
        word = (
            "began with BOS, those of the store do not"
            if c.prepend_bos
            else "had no BOS, those of the store have"
        )
        out.append(f"contexts of its training {word}: build the corpus with prepend_bos={c.prepend_bos}")
    if c.context and store.corpus.context > c.context:
        out.append(f"it was trained on contexts of {c.context} tokens, the store has {store.corpus.context}")
    return out


def warn(sae: Any, store: Any) -> None:
    """Differences on stderr, each once a process: evaluations and indexes are made in a row."""
    for line in _unsaid(sae, store):
        print(f"{sae.cfg.label} on {store.path.name}: {line}", file=sys.stderr, flush=True)


def said(sae: Any, store: Any) -> None:
    """Differences were told in another way: `warn` is silent about them."""
    _unsaid(sae, store)


_SAID: set[tuple[str, str, str]] = set()


def _unsaid(sae: Any, store: Any) -> list[str]:
    found = differences(sae, store)
    keys = {line: (sae.sae_id, store.path.name, line) for line in found}
    new = [line for line in found if keys[line] not in _SAID]
    _SAID.update(keys.values())
    return new


def _short(model: str) -> str:
    return model.rpartition("/")[2].lower().replace("_", "-")


def _skips_first(meta: dict[str, Any]) -> bool | None:
    """Position 0 was left out: as we write it, or by sae-lens's slice of positions, or as an excluded BOS."""
    if isinstance(meta.get("exclude_first_position"), bool):
        return meta["exclude_first_position"]
    if meta.get("exclude_special_tokens") is True and meta.get("prepend_bos"):
        return True
    positions = meta.get("seqpos_slice")
    return None if positions is None else len(positions) > 1 and (positions[0] or 0) > 0
