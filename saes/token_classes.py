"""Reconstruction by the kind of token: what an SAE of a chat model keeps of the template and of position 0.

    mse@c   mean over dialogues of the mean over a dialogue's tokens of class c of ||x - x_hat||^2 / d     (also log2)
    nmse@c  the same of ||x - x_hat||^2 / ||x||^2        l0@c  the same of the number of active latents

MSE and its log2 are those of FAST (arXiv 2506.07691), which weighs short dialogues like long ones; special is its MSE_st.
One token of huge norm decides an MSE: read nmse, special_rest and L0 beside it. Classes, on held-out rows:

    all, all_rest          every row; without position 0
    first                  position 0 of a context, the attention sink
    special, special_rest  markers and role names of the chat template and special ids (white space of the template is
                           not counted, as in the paper), and these without position 0
    content                rows of no template, position 0 left out

The template's tokens are those that the corpus found with the tokenizer (flag 2, cache/dialogue.py). 95 % intervals
resample dialogues.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cache.errors import MissingDataError
from cache.packing import FLAG_SPECIAL
from saes.controls import paired_rows
from saes.metrics import bootstrap

BATCH_ROWS = 4096
CLASSES = ("all", "all_rest", "first", "special", "special_rest", "content")
MEASURES = ("mse", "nmse", "l0")


def class_masks(corpus: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Which of the token-table rows are of each class, bool."""
    first = corpus.column("pos")[rows] == 0
    flagged = (corpus.column("flags")[rows] & FLAG_SPECIAL) > 0
    blank = np.array([not token.strip() for token in corpus.vocab])
    special = flagged & ~blank[corpus.column("tok")[rows]]
    return {
        "all": np.ones(len(rows), dtype=bool),
        "all_rest": ~first,
        "first": first,
        "special": special,
        "special_rest": special & ~first,
        "content": ~flagged & ~first,
    }


class ClassSums:
    """Sums of each measure over the tokens of each (document, class)."""

    def __init__(self, n_docs: int) -> None:
        self.sums = np.zeros((len(CLASSES), n_docs, len(MEASURES) + 1))

    def add(self, values: np.ndarray, doc: np.ndarray, masks: dict[str, np.ndarray]) -> None:
        """values `[rows, measures]` of rows of the documents `doc`."""
        table = np.concatenate([values, np.ones((len(values), 1))], axis=1)
        for i, name in enumerate(CLASSES):
            np.add.at(self.sums[i], doc[masks[name]], table[masks[name]])

    def rows(self, subject: str, *, has_codes: bool) -> list[dict[str, Any]]:
        """Rows subject, metric, value, n (tokens), ci_low, ci_high; nothing of a class without tokens."""
        out = []
        for sums, name in zip(self.sums, CLASSES, strict=True):
            there = sums[sums[:, -1] > 0]
            if not len(there):
                continue
            n = int(there[:, -1].sum())
            for j, measure in enumerate(MEASURES):
                if measure == "l0" and not has_codes:
                    continue
                means = np.stack([there[:, j] / there[:, -1], np.ones(len(there))], axis=1)
                value, (low, high) = float(means[:, 0].mean()), _interval(means)
                found = {measure: (value, low, high)}
                if measure == "mse":
                    found["log2_mse"] = tuple(float(np.log2(max(v, 1e-300))) for v in (value, low, high))  # type: ignore[assignment]
                out += [
                    {"subject": subject, "metric": f"{m}@{name}", "value": v[0], "n": n, "ci_low": v[1], "ci_high": v[2]}
                    for m, v in found.items()
                ]  # fmt: skip
        return out


def _interval(means: np.ndarray) -> tuple[float, float]:
    return bootstrap(means, lambda t: t[..., 0] / t[..., 1])


@torch.inference_mode()
def token_class_rows(
    subjects: list[Any], store: Any, hook: str, target: str = "", *, max_rows: int = 500_000
) -> list[dict[str, Any]]:
    """Rows of an evaluation of each subject (x -> (x_hat, codes), with a name) on held-out rows, position 0 included.

    target: the hook that transcoders predict. Raises MissingDataError where the store has no held-out rows.
    """
    corpus, total = store.corpus, 0
    doc = corpus.column("doc")
    sums = [ClassSums(corpus.n_docs) for _ in subjects]
    coded = [False] * len(subjects)
    for x, y, ids in paired_rows(
        store, hook, target or hook, batch_size=BATCH_ROWS, split="heldout", skip=None
    ):
        at = np.asarray(ids)
        masks, square = class_masks(corpus, at), (y.double() ** 2).sum(1).clamp_min(1e-30)
        for i, (subject, s) in enumerate(zip(subjects, sums, strict=True)):
            y_hat, codes = subject(x)
            error = ((y - y_hat).double() ** 2).sum(1)
            l0 = torch.zeros(len(x)) if codes is None else codes.l0().cpu()
            coded[i] = codes is not None
            s.add(torch.stack([error / y.shape[1], error / square, l0.double()], 1).numpy(), doc[at], masks)
        total += len(x)
        if total >= max_rows:
            break
    if not total:
        raise MissingDataError("the store has no held-out rows: build the corpus from more documents")
    return [r for sub, s, c in zip(subjects, sums, coded, strict=True) for r in s.rows(sub.name, has_codes=c)]
