"""What an SAE says about one text: codes, residual norm and unexplained share of every token.

    fvu_t = |x_t − x̂_t|² / |x_t − μ|²      μ: mean residual of the store's training rows

so 0 is a perfect reconstruction of that token and 1 is what predicting the mean gives. Position 0 (the attention
sink) is outside the SAE's data: it is not encoded. Results are plain numpy, so that a session may keep them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cache.errors import UsageError

TOKEN_LIMIT = 512
Pool = Literal["max", "mean", "last"]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Codes of one text, T tokens."""

    tokens: list[str]  # as shown
    indices: np.ndarray  # int64 [T, k] feature ids; −1 where nothing fires
    values: np.ndarray  # float32 [T, k]
    fvu: np.ndarray  # float64 [T]; NaN at position 0
    norm: np.ndarray  # float64 [T], residual norm

    def column(self, feature: int) -> np.ndarray:
        """The code of one feature on every token."""
        return np.where(self.indices == feature, self.values, 0.0).sum(1)

    def at(self, t: int) -> list[tuple[int, float]]:
        """(feature, value) of one token, strongest first."""
        order = np.argsort(-np.abs(self.values[t]), kind="stable")
        return [(int(self.indices[t, j]), float(self.values[t, j])) for j in order if self.indices[t, j] >= 0]

    def pooled(self, how: Pool) -> list[tuple[int, float, int]]:
        """(feature, value, token) over the text, strongest first: largest |value| with its token, mean, or last."""
        if how == "last":
            return [(f, v, len(self.tokens) - 1) for f, v in self.at(len(self.tokens) - 1)]
        token, slot = np.nonzero(self.indices >= 0)
        feature, value = self.indices[token, slot], self.values[token, slot]
        order = np.lexsort((token, -np.abs(value), feature))
        feature, value, token = feature[order], value[order], token[order]
        first = np.r_[True, feature[1:] != feature[:-1]] if len(feature) else np.zeros(0, bool)
        found = [(int(f), float(v), int(t)) for f, v, t in zip(feature[first], value[first], token[first])]
        if how == "mean":
            n = max(len(self.tokens) - 1, 1)
            found = [(f, float(self.column(f).sum()) / n, t) for f, _, t in found]
        return sorted(found, key=lambda row: -abs(row[1]))


def inspect_text(model: Any, sae: Any, text: str, *, mean: np.ndarray, chat: bool = False) -> Inspection:
    """Run `text` through the model up to the SAE's hook and encode every token but the first."""
    import torch

    from steering.generate import encode_prompt

    ids = encode_prompt(model.tokenizer, text, chat=chat)
    if len(ids) > TOKEN_LIMIT:
        raise UsageError(f"the text has {len(ids)} tokens, the inspector takes {TOKEN_LIMIT}: shorten it")
    if len(ids) < 2:
        raise UsageError("the text is one token; the first position is not encoded: type a few words")
    target = sae.cfg.out_hook if sae.cfg.transcoder else sae.cfg.hook
    seen = model.capture(torch.tensor([ids]), list(dict.fromkeys([sae.cfg.hook, target])))
    x, y = (seen[hook][0].float().cpu() for hook in (sae.cfg.hook, target))
    with torch.no_grad():
        codes = sae.encode(x[1:].clone())
        error = (y[1:] - sae.decode(codes)).double().square().sum(-1).numpy()
    spread = ((y[1:].double().numpy() - mean) ** 2).sum(-1)
    indices, values = _padded(codes, len(ids))
    return Inspection(
        tokens=[model.tokenizer.decode([i]) for i in ids],
        indices=indices,
        values=values,
        fvu=np.r_[np.nan, error / np.maximum(spread, 1e-30)],
        norm=x.double().norm(dim=-1).numpy(),
    )


def _padded(codes: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of positions 1 … n−1 as arrays [n, k]; position 0 and silent slots hold −1 and 0."""
    rows, ids = codes.rows().numpy(), codes.indices.reshape(-1).numpy().astype(np.int64)
    values = codes.values.detach().reshape(-1).float().numpy()
    counts = np.bincount(rows, minlength=n - 1)
    slot = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    out_i = np.full((n, int(counts.max(initial=1))), -1, dtype=np.int64)
    out_v = np.zeros(out_i.shape, dtype=np.float32)
    fires = values != 0
    out_i[rows[fires] + 1, slot[fires]] = ids[fires]
    out_v[rows[fires] + 1, slot[fires]] = values[fires]
    return out_i, out_v
