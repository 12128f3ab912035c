"""`evaluate`: what an SAE keeps of the activations, and of the model's predictions, beside three controls.

Reconstruction (saes/metrics.py) is measured on held-out rows, firing on all rows, weights (saes/weights.py) on the
tensors. For predictions (saes/predictions.py) the hook's output is replaced by the reconstruction, no error term:
delta_ce in nats is the headline, and recovered shares, KL and the relative loss stand beside it.

For a transcoder the rows are those of its out_hook, predicted from its input, and so is what is replaced.

Controls: `pca-k`, the best linear code of as many numbers as the SAE has active latents; `untrained`, a TopK dictionary
of the same shape and L0 with random unit atoms; and `initial`, the SAE's own architecture before its first step. For a
transcoder `linear-k`, the best linear map through k numbers (reduced-rank regression), stands in place of PCA.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cache.errors import DataError, MissingDataError
from cache.filters import row_classes
from cache.workspace import atomic_file
from saes.controls import (
    Dictionary,
    fit_pca,
    fit_reduced_rank,
    matched_k,
    paired_rows,
    untrained_dictionary,
)
from saes.conventions import warn
from saes.initial import initial_sae
from saes.metrics import SINK_RATIO, Firing, Reconstruction
from saes.predictions import prediction_rows
from saes.sae import SAE
from saes.token_classes import token_class_rows
from saes.weights import weight_values

BATCH_ROWS = 4096
OWN = "own"
"""As `skip`: the rows that the SAE's own conventions leave out."""


@dataclass(frozen=True)
class Evaluation:
    """One row per subject (sae, pca-k, untrained, initial) and metric: value, 95 % interval where there is one, and n (tokens)."""

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
        frame = pd.DataFrame([r for r in self.rows if not r["metric"].endswith("_count")])
        return frame.pivot(index="metric", columns="subject", values="value")


def evaluate(
    sae: SAE,
    store: Any,
    model: Any = None,
    *,
    max_tokens: int = 5000,
    max_rows: int = 500_000,
    controls: bool = True,
    token_classes: bool = False,
    skip: str | None = OWN,
) -> Evaluation:
    """Evaluate a folded SAE on `store` and, with `model`, on the model's predictions of at most `max_tokens` tokens.

    `token_classes` adds errors and L0 on template tokens, position 0 and content apart (saes/token_classes.py). `skip`: rows
    left out of all figures, as of a stream (`first`, `special`, ..., None: none); those of predictions are not spliced either.
    By default the SAE's own convention: position 0, unless it was trained on it (`Conventions.skip`).
    Where the store is not as the SAE's conventions say, a line on stderr tells each difference.
    Writes evaluations/<sae_id>@<store>.parquet in the store's workspace. Raises DataError where the SAE does not
    fit the store, and MissingDataError where the store has no held-out rows.
    """
    skip = sae.conventions.skip if skip == OWN else skip
    row_classes(None, skip)  # refuses what is no filter
    hook, out = check_fit(sae, store), target_hook(sae)
    if model is not None:
        store.check_model(model)
    warn(sae, store)
    subjects: list[Any] = [Dictionary(sae, "sae")]
    if controls:
        subjects += _controls(sae, store, hook, out, skip)
    rows = _reconstruction(subjects, store, hook, out or hook, max_rows, skip)
    rows += _firing(sae, store, hook, max_rows, skip)
    rows += [{"subject": "sae", "metric": m, "value": v, "n": n} for m, v, n in weight_values(sae)]
    if model is not None:
        rows += prediction_rows(subjects, store, model, hook, max_tokens, out_hook=out, skip=skip)
    rows = [{"skip": skip or "none"} | r for r in rows]
    if token_classes:  # of every row, whatever the others leave out
        rows += token_class_rows(subjects, store, hook, out, max_rows=max_rows)
    return save_evaluation(sae, store, hook, rows)


def _controls(sae: SAE, store: Any, hook: str, out: str, skip: str | None) -> list[Any]:
    """The three that stand beside every SAE, fitted to train rows of the kind that is measured."""
    k = matched_k(sae, store, hook, skip)
    rank = min(k, sae.cfg.d_model, sae.cfg.width_out)
    return [
        fit_reduced_rank(store, hook, out, rank, skip=skip) if out else fit_pca(store, hook, rank, skip=skip),
        untrained_dictionary(sae, store, hook, k, skip=skip),
        initial_sae(sae, store, hook, skip=skip),
    ]


def save_evaluation(sae: SAE, store: Any, hook: str, rows: list[dict[str, Any]]) -> Evaluation:
    """Add rows (subject, metric, value, n and, where there are any, ci_low, ci_high, lo, hi, skip) to those of earlier calls.

    What an earlier call measured on other rows (skip) goes: figures of two kinds of rows do not stand in one table. Those of
    kinds of token go together, as they are measured together, and of controls also where skip is another: it is what these
    were fitted without.
    """
    sae_id, created = sae.sae_id, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    base = {"sae_id": sae_id, "store": store.path.name, "hook": hook, "created": created}
    columns = {"lo": None, "hi": None, "ci_low": None, "ci_high": None, "skip": None}
    rows = [base | columns | r for r in rows]
    path = evaluation_path(sae_id, store)
    # what this call did not measure (predictions without a model, controls) stays from an earlier one
    old = load_evaluation(sae, store)
    fresh, skips = {(r["subject"], r["metric"]) for r in rows}, {r["skip"] for r in rows} - {None}
    kept = [r for r in (old.rows if old else []) if (r["subject"], r["metric"]) not in fresh]
    changed = bool(skips) and not {_skipped(r) for r in (old.rows if old else [])} <= {None, *skips}
    if any("@" in r["metric"] for r in rows):
        kept = [r for r in kept if "@" not in r["metric"]]
    elif changed:
        kept = [r for r in kept if "@" not in r["metric"] or r["subject"] == "sae"]
    rows += [r for r in kept if not skips or _skipped(r) in (None, *skips)]
    with atomic_file(path) as tmp:
        pq.write_table(pa.Table.from_pylist(rows), tmp)
    return Evaluation(rows, path)


def _skipped(row: Mapping[str, Any]) -> str | None:
    """What a row of an evaluation leaves out, `none` for nothing; None: it is of rows of its own (atoms, kinds of token)."""
    if row["subject"].startswith("atoms:") or "@" in row["metric"]:
        return None
    return row.get("skip") or "first"  # files of before it could be chosen


def evaluation_path(sae_id: str, store: Any) -> Path:
    return store.workspace / "evaluations" / f"{sae_id}@{store.path.name}.parquet"


def load_evaluation(sae: SAE, store: Any) -> Evaluation | None:
    """The evaluation of this SAE on this store that an earlier call wrote, or None."""
    path = evaluation_path(sae.sae_id, store)
    if not path.is_file():
        return None
    rows = pq.read_table(path).to_pylist()
    # `random` is what `untrained` was called before; a file that was written twice may hold both
    new = {r["metric"] for r in rows if r["subject"] == "untrained"}
    rows = [r for r in rows if r["subject"] != "random" or r["metric"] not in new]
    return Evaluation([r | {"subject": "untrained"} if r["subject"] == "random" else r for r in rows], path)


def check_fit(sae: SAE, store: Any, *, complete: bool = True) -> str:
    """The hook of `store` that this SAE reads. Raises DataError where widths or hooks differ.

    complete: whether all its shards must be there (MissingDataError).
    """
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
    out = target_hook(sae)
    if out and (out not in store.hooks or store.d(out) != sae.cfg.d_out):
        raise DataError(
            f"the transcoder predicts {out} of width {sae.cfg.d_out}, the store holds {', '.join(store.hooks)}: "
            "harvest that hook into the same store"
        )
    if sae.cfg.transcoder and not out:
        raise DataError(
            "the transcoder does not say which hook it predicts: name it as hook_name_out in the metadata of cfg.json"
        )
    want, got = store.identity.get("weights_sha256"), sae.cfg.model_sha
    if want and got and want != got:
        raise DataError(
            f"the SAE was trained on other weights ({got[:12]}) than those that filled the store ({want[:12]}, "
            f"{store.identity.get('model')}): evaluate it on a store of its own model"
        )
    for place in [p for p in (hook, out) if p and complete]:
        store.require_complete(place)
    return hook


def target_hook(sae: SAE) -> str:
    """The hook that a transcoder predicts, "" for an SAE."""
    return sae.cfg.out_hook if sae.cfg.transcoder else ""


def _reconstruction(
    subjects: list[Any], store: Any, hook: str, target: str, max_rows: int, skip: str | None
) -> list[dict[str, Any]]:
    stats = store.stats(target, split="train", skip=skip)
    # how long a usual row is does not depend on how many sinks are counted in
    usual_norm = store.stats(target, split="train", skip="first").mean_norm
    mean, seq = torch.as_tensor(stats.mean), store.corpus.column("seq")
    sums = [Reconstruction(store.d(target), mean) for _ in subjects]
    usual = [Reconstruction(store.d(target), mean) for _ in subjects]
    for x, y, row in paired_rows(store, hook, target, batch_size=BATCH_ROWS, split="heldout", skip=skip):
        context = seq[np.asarray(row)]
        keep = y.norm(dim=1) <= SINK_RATIO * usual_norm
        for subject, s, u in zip(subjects, sums, usual, strict=True):
            y_hat, codes = subject(x)
            s.add(y, y_hat, codes, context)
            u.add(y[keep], y_hat[keep], None, context[keep.cpu().numpy()])
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


def _firing(sae: SAE, store: Any, hook: str, max_rows: int, skip: str | None) -> list[dict[str, Any]]:
    firing, seq = Firing(sae.cfg.d_sae), store.corpus.column("seq")
    for batch in store.sequential(hook, batch_size=BATCH_ROWS, split=None, skip=skip):
        firing.add(sae.encode(batch.x[hook].to(sae.W_enc.device)), seq[np.asarray(batch.row)])
        if firing.rows >= max_rows:
            break
    rows = [{"subject": "sae", "metric": m, "value": v, "n": firing.rows} for m, v in firing.values().items()]
    return rows + [
        {"subject": "sae", "metric": "density_count", "value": float(h["count"]), "lo": h["lo"], "hi": h["hi"],
         "n": firing.rows}
        for h in firing.histogram()
    ]  # fmt: skip
