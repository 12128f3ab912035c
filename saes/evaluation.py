"""`evaluate`: what an SAE keeps of the activations, and of the model's predictions, beside two controls.

Reconstruction (saes/metrics.py) is measured on held-out rows, firing on all rows, weights (saes/weights.py) on the
tensors. For predictions (saes/predictions.py) the hook's output is replaced by the reconstruction, no error term:
delta_ce in nats is the headline, and recovered shares, KL and the relative loss stand beside it.

Controls: `pca-k`, the best linear code of as many numbers as the SAE has active latents, and `untrained`, a TopK
dictionary of the same shape and L0 with random unit atoms, as it is before training.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cache.errors import DataError, MissingDataError
from cache.workspace import atomic_file
from saes.controls import Dictionary, fit_pca, matched_k, untrained_dictionary
from saes.metrics import SINK_RATIO, Firing, Reconstruction
from saes.predictions import prediction_rows
from saes.sae import SAE
from saes.weights import weight_values

BATCH_ROWS = 4096


@dataclass(frozen=True)
class Evaluation:
    """One row per subject (sae, pca-k, untrained) and metric: value, 95 % interval where there is one, and n (tokens)."""

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
        k = matched_k(sae, store, hook)
        subjects += [fit_pca(store, hook, min(k, sae.cfg.d_model)), untrained_dictionary(sae, store, hook, k)]
    rows = _reconstruction(subjects, store, hook, max_rows) + _firing(sae, store, hook, max_rows)
    rows += [{"subject": "sae", "metric": m, "value": v, "n": n} for m, v, n in weight_values(sae)]
    if model is not None:
        rows += prediction_rows(subjects, store, model, hook, max_tokens)
    sae_id, created = sae.sae_id, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    base = {"sae_id": sae_id, "store": store.path.name, "hook": hook, "created": created}
    columns = {"lo": None, "hi": None, "ci_low": None, "ci_high": None}
    rows = [base | columns | r for r in rows]
    path = evaluation_path(sae_id, store)
    # what this call did not measure (predictions without a model, controls) stays from an earlier one
    old = load_evaluation(sae, store)
    fresh = {(r["subject"], r["metric"]) for r in rows}
    rows += [r for r in (old.rows if old else []) if (r["subject"], r["metric"]) not in fresh]
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
    want, got = store.identity.get("weights_sha256"), sae.cfg.model_sha
    if want and got and want != got:
        raise DataError(
            f"the SAE was trained on other weights ({got[:12]}) than those that filled the store ({want[:12]}, "
            f"{store.identity.get('model')}): evaluate it on a store of its own model"
        )
    store.require_complete(hook)
    return hook


def _reconstruction(subjects: list[Any], store: Any, hook: str, max_rows: int) -> list[dict[str, Any]]:
    stats = store.stats(hook, split="train", skip="first")
    mean, seq = torch.as_tensor(stats.mean), store.corpus.column("seq")
    sums = [Reconstruction(store.d(hook), mean) for _ in subjects]
    usual = [Reconstruction(store.d(hook), mean) for _ in subjects]
    for batch in store.sequential(hook, batch_size=BATCH_ROWS, split="heldout", skip="first"):
        x, context = batch.x[hook], seq[np.asarray(batch.row)]
        keep = x.norm(dim=1) <= SINK_RATIO * stats.mean_norm
        for subject, s, u in zip(subjects, sums, usual, strict=True):
            x_hat, codes = subject(x)
            s.add(x, x_hat, codes, context)
            u.add(x[keep], x_hat[keep], None, context[keep.cpu().numpy()])
        if sums[0].n >= max_rows:
            break
    if sums[0].n == 0:
        raise MissingDataError("the store has no held-out rows: build the corpus from more documents")
    rows = []
    for subject, s, u in zip(subjects, sums, usual, strict=True):
        intervals = s.intervals() | {"fvu_usual": u.intervals().get("fvu", (None, None))}
        found = [(m, v, s.n) for m, v in s.values().items()] + [("fvu_usual", u.values()["fvu"], u.n)]
        for m, v, n in found:
            low, high = intervals.get(m, (None, None))
            rows.append(
                {"subject": subject.name, "metric": m, "value": v, "n": n, "ci_low": low, "ci_high": high}
            )
    return rows


def _firing(sae: SAE, store: Any, hook: str, max_rows: int) -> list[dict[str, Any]]:
    firing, seq = Firing(sae.cfg.d_sae), store.corpus.column("seq")
    for batch in store.sequential(hook, batch_size=BATCH_ROWS, split=None, skip="first"):
        firing.add(sae.encode(batch.x[hook].to(sae.W_enc.device)), seq[np.asarray(batch.row)])
        if firing.rows >= max_rows:
            break
    rows = [{"subject": "sae", "metric": m, "value": v, "n": firing.rows} for m, v in firing.values().items()]
    return rows + [
        {"subject": "sae", "metric": "density_count", "value": float(h["count"]), "lo": h["lo"], "hi": h["hi"],
         "n": firing.rows}
        for h in firing.histogram()
    ]  # fmt: skip
