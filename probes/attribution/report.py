"""An attribution on disk: the tidy node table, recall and bounds as Parquet beside a record, and how to read them.

attributions/<run>/  run.json (model, metric, pairs, method, provenance)   nodes.parquet    recall.parquet  bounds.parquet

A run is named after its pairs, its method and what was asked, so the same question replaces its own answer. Nodes whose
score is 0 and that were not measured are left out. The DuckDB views are in `probes.views`; nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import MissingDataError
from cache.provenance import provenance
from cache.workspace import atomic_dir, canonical_json, read_json, workspace_path, write_json

RECORD, NODES, RECALL, BOUNDS = "run.json", "nodes.parquet", "recall.parquet", "bounds.parquet"


def write_attribution(
    attribution: Any, scores: Any, pairs: Any, workspace: Any = None, *, name: str = "",
    recall: pd.DataFrame | None = None, diagnoses: Mapping[int, Sequence[Any]] | None = None,
    truth: Sequence[np.ndarray] | None = None, started: float | None = None,
) -> Path:  # fmt: skip
    """Write a run and return its folder. `diagnoses` maps K, the nodes verified, to a Diagnosis of each pair; with
    `truth`, the effects of all nodes of each pair, the largest missed one stands beside its bound."""
    from probes.attribution.pairs import as_pairs

    targets = attribution.targets(pairs)
    tokens = as_pairs(pairs, None, attribution.model.tokenizer)
    record = {
        "model": attribution.model.source, "identity": attribution.model.identity, "metric": attribution.metric.name,
        "method": scores.method, "pairs": [_described(p) for p in tokens], "n_pairs": scores.n_pairs,
        "passes": scores.passes, "tokens": scores.space.length, "summed": scores.space.summed,
        "kinds": sorted({b.kind for b in scores.space.blocks}), "error": attribution.error,
        "saes": {hook: sae.sae_id for hook, sae in attribution.saes.items()},
    }  # fmt: skip
    key = hashlib.sha256(canonical_json(record).encode()).hexdigest()[:8]
    label = name or next((p.text.name for p in tokens if p.text and p.text.name), "pairs")
    record |= {"name": label, "provenance": provenance(started=started, device=str(attribution.model.device))}
    # a name is anything that a pair file says: never a path
    safe = re.sub(r"[^\w.-]+", "-", label)[:60].strip(".-") or "pairs"
    folder = workspace_path(workspace) / "attributions" / f"{safe}-{scores.method.replace('+', '-')}-{key}"
    with atomic_dir(folder) as tmp:
        pq.write_table(_table(_nodes(scores, targets, attribution.model.tokenizer)), tmp / NODES)
        if recall is not None:
            pq.write_table(_table(recall), tmp / RECALL)
        if diagnoses:
            pq.write_table(_table(_bounds(diagnoses, scores, truth)), tmp / BOUNDS)
        write_json(tmp / RECORD, record)
    return folder


def _table(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False)


def _described(pair: Any) -> dict[str, Any]:
    text = pair.text
    return {
        "clean": text.clean if text else list(pair.clean), "noise": text.noise if text else list(pair.noise),
        "answers": list(text.answers) if text else [list(a) for a in pair.answers],
        "wrong": list(text.wrong) if text else [list(a) for a in pair.wrong],
    }  # fmt: skip


def _nodes(scores: Any, targets: Sequence[Any], tokenizer: Any) -> pd.DataFrame:
    """The table of what has a score, with the token at each position where all pairs have the same one."""
    kept = scores.score != 0
    for values in scores.columns.values():
        kept = kept | ~np.isnan(values)
    frame = scores.frame(np.flatnonzero(kept))
    for column in ("exact", "exact_abs"):
        if column not in frame:
            frame[column] = np.nan
    words = []
    for pos in range(scores.space.length):
        here = {(t.pair.clean[pos], t.pair.noise[pos]) for t in targets if pos < t.length}
        clean, noise = ({ids[i] for ids in here} for i in (0, 1))
        one = len(clean) == len(noise) == 1
        texts = [tokenizer.decode([next(iter(side))]) for side in (clean, noise)] if one else ["*", "*"]
        words.append(texts[0] if texts[0] == texts[1] else f"{texts[0]} |{texts[1]}")
    frame["token"] = ["" if p < 0 else words[p] for p in frame["pos"]]
    return frame.sort_values("score", ascending=False, kind="stable")


def _bounds(diagnoses: Mapping[int, Sequence[Any]], scores: Any, truth: Sequence[np.ndarray] | None) -> pd.DataFrame:  # fmt: skip
    rows = []
    for k, found in diagnoses.items():
        rest = scores.order()[k:]
        for i, d in enumerate(found):
            missed = np.nan if truth is None or not len(rest) else float(np.abs(truth[i][rest]).max())
            for alpha, bound in d.bounds.items():
                row = {"k": k, "pair": i, "alpha": alpha, "bound": bound, "missed": missed}
                rows.append(row | {"n_samples": d.n_samples, "p": d.p})
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------- reading


def find_attributions(workspace: Any = None) -> list[dict[str, Any]]:
    """Records of all runs, newest first, each with its folder."""
    root = workspace_path(workspace, create=False)
    found = [
        read_json(path) | {"folder": path.parent, "run": path.parent.name}
        for path in root.glob(f"attributions/*/{RECORD}")
    ]
    return sorted(found, key=lambda r: r["provenance"]["created"], reverse=True)


def read_table(record: Mapping[str, Any], name: str = NODES) -> pd.DataFrame:
    """One table of a run; empty where it was not made (recall and bounds are optional)."""
    file = Path(record["folder"]) / name
    if not file.is_file():
        if name == NODES:
            raise MissingDataError(f"{file} does not exist: run `atomscope attribute` again")
        return pd.DataFrame()
    return pq.read_table(file).to_pandas()
