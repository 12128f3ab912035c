"""`evaluate`: what an SAE keeps of the activations, and of the model's predictions, beside two controls.

Reconstruction is measured on held-out rows. For predictions the hook's output is replaced by the reconstruction
(no error term) on held-out documents: delta_ce = CE(spliced) - CE(clean) in nats is the headline, and

    ce_recovered_zero = (CE_zero - CE_spliced) / (CE_zero - CE_clean)      and the same with the train mean for zero

stand beside it. Position 0 is neither spliced nor ablated, and only targets whose source row was spliced count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F

from cache.errors import DataError, MissingDataError
from cache.progress import progress
from cache.workspace import atomic_file
from saes.controls import Dictionary, fit_pca, random_dictionary
from saes.metrics import SINK_RATIO, Firing, Reconstruction
from saes.sae import SAE

BATCH_ROWS = 4096
CE_BATCH_TOKENS = 2048
BOOTSTRAP = 1000
Reconstruct = Callable[[Tensor], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Evaluation:
    """One row per subject (sae, pca-k, random) and metric: value, 95 % interval where there is one, and n (tokens)."""

    rows: list[dict[str, Any]]
    path: Path | None

    def value(self, metric: str, subject: str = "sae") -> float:
        for row in self.rows:
            if row["metric"] == metric and row["subject"] == subject:
                return row["value"]
        raise MissingDataError(
            f"no {metric} of {subject} in this evaluation: it was made without a model or control"
        )

    def table(self) -> pd.DataFrame:
        """Metrics down, subjects across."""
        frame = pd.DataFrame([r for r in self.rows if r["metric"] != "density_count"])
        return frame.pivot(index="metric", columns="subject", values="value")


def evaluate(
    sae: SAE,
    store: Any,
    model: Any = None,
    *,
    max_tokens: int = 5000,
    max_rows: int = 500_000,
    controls: bool = True,
) -> Evaluation:
    """Evaluate a folded SAE on `store` and, with `model`, on the model's predictions of at most `max_tokens` tokens.

    Writes evaluations/<sae_id>@<store>.parquet in the store's workspace. Raises DataError where the SAE does not
    fit the store, and MissingDataError where the store has no held-out rows.
    """
    hook = check_fit(sae, store)
    if model is not None:
        store.check_model(model)
    subjects: list[Any] = [Dictionary(sae, "sae")]
    if controls:
        subjects += [
            fit_pca(store, hook, min(sae.cfg.k, sae.cfg.d_model)),
            random_dictionary(sae, store, hook),
        ]
    rows = _reconstruction(subjects, store, hook, max_rows) + _firing(sae, store, hook, max_rows)
    if model is not None:
        rows += _predictions(subjects, store, model, hook, max_tokens)
    sae_id, created = sae.sae_id, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    base = {"sae_id": sae_id, "store": store.path.name, "hook": hook, "created": created}
    columns = {"lo": None, "hi": None, "ci_low": None, "ci_high": None}
    rows = [base | columns | r for r in rows]
    path = evaluation_path(sae_id, store)
    with atomic_file(path) as tmp:
        pq.write_table(pa.Table.from_pylist(rows), tmp)
    return Evaluation(rows, path)


def evaluation_path(sae_id: str, store: Any) -> Path:
    return store.workspace / "evaluations" / f"{sae_id}@{store.path.name}.parquet"


def load_evaluation(sae: SAE, store: Any) -> Evaluation | None:
    """The evaluation of this SAE on this store that an earlier call wrote, or None."""
    path = evaluation_path(sae.sae_id, store)
    return Evaluation(pq.read_table(path).to_pylist(), path) if path.is_file() else None


def check_fit(sae: SAE, store: Any) -> str:
    """The hook of `store` that this SAE reads. Raises DataError where widths or hooks differ."""
    hook = sae.cfg.hook or (store.hooks[0] if len(store.hooks) == 1 else "")
    if hook not in store.hooks:
        raise DataError(
            f"the SAE reads {hook or 'an unnamed hook'}, the store holds {', '.join(store.hooks)}: harvest it"
        )
    if store.d(hook) != sae.cfg.d_model:
        raise DataError(
            f"the SAE has d_model={sae.cfg.d_model}, the store's {hook} has d_model={store.d(hook)}: "
            "they come from different models"
        )
    store.require_complete(hook)
    return hook


def _reconstruction(subjects: list[Any], store: Any, hook: str, max_rows: int) -> list[dict[str, Any]]:
    sums = [Reconstruction(store.d(hook)) for _ in subjects]
    usual = [Reconstruction(store.d(hook)) for _ in subjects]
    limit = SINK_RATIO * store.stats(hook, split="train", skip="first").mean_norm
    for batch in store.sequential(hook, batch_size=BATCH_ROWS, split="heldout", skip="first"):
        x = batch.x[hook]
        keep = x.norm(dim=1) <= limit
        for subject, s, u in zip(subjects, sums, usual, strict=True):
            x_hat, codes = subject(x)
            s.add(x, x_hat, codes)
            u.add(x[keep], x_hat[keep])
        if sums[0].n >= max_rows:
            break
    if sums[0].n == 0:
        raise MissingDataError("the store has no held-out rows: build the corpus from more documents")
    return [
        {"subject": subject.name, "metric": m, "value": v, "n": n}
        for subject, s, u in zip(subjects, sums, usual, strict=True)
        for m, v, n in (*((m, v, s.n) for m, v in s.values().items()), ("fvu_usual", u.values()["fvu"], u.n))
    ]


def _firing(sae: SAE, store: Any, hook: str, max_rows: int) -> list[dict[str, Any]]:
    firing = Firing(sae.cfg.d_sae)
    for batch in store.sequential(hook, batch_size=BATCH_ROWS, split=None, skip="first"):
        firing.add(sae.encode(batch.x[hook]))
        if firing.rows >= max_rows:
            break
    rows = [{"subject": "sae", "metric": m, "value": v, "n": firing.rows} for m, v in firing.values().items()]
    return rows + [
        {"subject": "sae", "metric": "density_count", "value": float(h["count"]), "lo": h["lo"], "hi": h["hi"],
         "n": firing.rows}
        for h in firing.histogram()
    ]  # fmt: skip


def heldout_batches(corpus: Any, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out contexts, longest first, as padded (tokens int64 `[B, T]`, mask bool `[B, T]`); <= max_tokens tokens."""
    offsets, tokens, split = corpus.seq_offsets, corpus.column("tok"), corpus.column("split")
    chosen, total = [], 0
    for seq in np.flatnonzero(split[offsets[:-1]] == 1).tolist():
        length = int(offsets[seq + 1] - offsets[seq])
        # two tokens give no target with a spliced source
        if length < 3 or total + length > max_tokens:
            continue
        chosen.append(seq)
        total += length
    if not chosen:
        raise MissingDataError(
            f"no held-out context fits in max_tokens={max_tokens}: raise it, or build a larger corpus"
        )
    chosen.sort(key=lambda s: int(offsets[s] - offsets[s + 1]))
    while chosen:
        width = int(offsets[chosen[0] + 1] - offsets[chosen[0]])
        take = chosen[: max(1, CE_BATCH_TOKENS // width)]
        chosen = chosen[len(take) :]
        ids = torch.zeros(len(take), width, dtype=torch.int64)
        mask = torch.zeros(len(take), width, dtype=torch.bool)
        for row, seq in enumerate(take):
            part = torch.from_numpy(tokens[offsets[seq] : offsets[seq + 1]].astype(np.int64))
            ids[row, : len(part)] = part
            mask[row, : len(part)] = True
        yield ids, mask


@torch.inference_mode()
def _predictions(
    subjects: list[Any], store: Any, model: Any, hook: str, max_tokens: int
) -> list[dict[str, Any]]:
    mean = torch.as_tensor(store.stats(hook, split="train", skip="first").mean).float()
    variants: dict[str, Reconstruct | None] = {"clean": None}
    variants |= {s.name: s for s in subjects}
    variants |= {"zero": lambda x: (torch.zeros_like(x), None), "mean": lambda x: (mean.expand_as(x), None)}
    batches = list(heldout_batches(store.corpus, max_tokens))
    losses: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    total = sum(int(mask.sum()) for _, mask in batches) * len(variants)
    with progress("evaluate", total, unit="tok") as bar:
        for ids, mask in batches:
            for name, fn in variants.items():
                losses[name] += _context_losses(model, ids, mask, hook, fn)
                bar.advance(int(mask.sum()))
    return _ce_rows(losses, [s.name for s in subjects])


def _context_losses(
    model: Any, ids: Tensor, mask: Tensor, hook: str, fn: Reconstruct | None
) -> list[np.ndarray]:
    """Losses in nats of the scored targets of each context, with `fn` in place of the rows after position 0."""

    def splice(x: Tensor) -> Tensor:
        new, _ = fn(x[:, 1:].reshape(-1, x.shape[-1]).float())  # type: ignore[misc]
        return torch.cat([x[:, :1], new.view_as(x[:, 1:]).to(x.dtype)], dim=1)

    ids, mask = ids.to(model.device), mask.to(model.device)
    with model.hooked({} if fn is None else {hook: splice}):
        logits, _ = model.forward(ids, attention_mask=mask.long())
    # sources 1..T-2 predict targets 2..T-1: the sink's own prediction is not spliced and not scored
    loss = F.cross_entropy(logits[:, 1:-1].float().flatten(0, 1), ids[:, 2:].flatten(), reduction="none")
    rows = loss.view(len(ids), -1).double().cpu().numpy()
    scored = mask[:, 2:].cpu().numpy()
    return [row[keep] for row, keep in zip(rows, scored, strict=True)]


def _ce_rows(losses: dict[str, list[np.ndarray]], subjects: list[str]) -> list[dict[str, Any]]:
    ce = {name: float(np.concatenate(parts).mean()) for name, parts in losses.items()}
    n = sum(map(len, losses["clean"]))
    rows = [
        {"subject": "model", "metric": f"ce_{v}", "value": ce[v], "n": n} for v in ("clean", "zero", "mean")
    ]
    for name in subjects:
        low, high = _interval(losses[name], losses["clean"])
        rows += [
            {"subject": name, "metric": "ce", "value": ce[name], "n": n},
            {
                "subject": name,
                "metric": "delta_ce",
                "value": ce[name] - ce["clean"],
                "n": n,
                "ci_low": low,
                "ci_high": high,
            },
        ]
        for base in ("zero", "mean"):
            share = (ce[base] - ce[name]) / (ce[base] - ce["clean"])
            rows.append({"subject": name, "metric": f"ce_recovered_{base}", "value": share, "n": n})
    return rows


def _interval(spliced: list[np.ndarray], clean: list[np.ndarray]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean loss difference, resampling contexts (tokens of one are not independent)."""
    sums = np.array([(a - b).sum() for a, b in zip(spliced, clean, strict=True)])
    counts = np.array([len(a) for a in clean], dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(sums), size=(BOOTSTRAP, len(sums)))
    means = sums[picks].sum(1) / np.maximum(counts[picks].sum(1), 1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
