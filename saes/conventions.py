"""What an SAE assumes about its input: the model, the text before a token, and what its makers measured.

A field that is None or empty was not stated. `SAE.load` reads them from the files of each format, `SAE.save` keeps
them under `metadata` by SAELens's names, training fills them in from the store, and `saes.check` compares them with a
store. What changes the numbers of the SAE itself (normalised input, b_dec, centred weights) is folded on load instead.
"""

from __future__ import annotations

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
    """Fraction of variance unexplained, as stated."""
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


def of_training(source: Any, skip: str | None, l0: float | None) -> Conventions:
    """Of an SAE trained on the store or ring behind `source`; of a tensor nothing is known but L0."""
    store = getattr(source, "store", None)
    if store is None:
        return Conventions(l0=l0)
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
    )


def _skips_first(meta: dict[str, Any]) -> bool | None:
    """Position 0 was left out: as we write it, or by sae-lens's slice of positions, or as an excluded BOS."""
    if isinstance(meta.get("exclude_first_position"), bool):
        return meta["exclude_first_position"]
    if meta.get("exclude_special_tokens") is True and meta.get("prepend_bos"):
        return True
    positions = meta.get("seqpos_slice")
    return None if positions is None else len(positions) > 1 and (positions[0] or 0) > 0
