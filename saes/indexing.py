"""`build_index`: everything the explorer asks about a feature, computed once, in one read-only DuckDB file.

1. Codes, token-major: every row of the store through the encoder (saes/encoding.py); resumable by shard.
2. Feature-major: firings sorted by feature and falling value, statistics, examples, logit lens, neighbours, map
   (saes/feature_file.py).

    features/<sae_id>@<store>/codes/  features-<n>.duckdb  current.json (names the file that readers open)

The database is built beside the old one and `current.json` is switched last, so a reader never sees half an index.
For a store that has grown it is made again from all codes, in one pass: what an index says does not depend on how often
it was extended. Codes are a hundredth of the vectors and need no encoder.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from cache.provenance import provenance
from cache.workspace import atomic_file, only_one, read_json, write_json
from saes.conventions import warn
from saes.encoding import rows_left_out, write_all_codes
from saes.evaluation import check_fit, target_hook
from saes.feature_file import write_feature_file
from saes.sae import SAE
from saes.token_table import FREQUENT

SCHEMA_VERSION = 1


def index_path(sae: SAE, store: Any) -> Path:
    """Folder of the index of `sae` on `store`."""
    return store.workspace / "features" / f"{sae.sae_id}@{store.path.name}"


def build_index(
    sae: SAE, store: Any, model: Any = None, *, sae_path: str | Path | None = None, skip: str | None = "first",
    partial: bool = False,
) -> Path:  # fmt: skip
    """Index every latent of a folded SAE over a store. Returns the index folder; a finished one is reused.

    With `model` the logit lens (direct effect on the next token) is included. `partial` takes the shards that are
    there, and later calls add those that have come since: only they are encoded, and the result is that of a build
    from nothing. skip: rows left out (`first`, `special`, ... as of a stream). Where the store is not as
    the SAE's conventions say, a line on stderr tells each difference. Raises DataError where SAE and store do
    not fit, MissingDataError where the store is incomplete, AtomscopeError where another process builds the same index. An
    interrupted build goes on at its next shard.
    """
    hook = check_fit(sae, store, complete=not partial)
    if model is not None:
        store.check_model(model)
    warn(sae, store)
    folder, shards = index_path(sae, store), sorted(store.committed(hook))

    def done() -> bool:
        return _covers(folder, store, shards, skip, lens=model is not None)

    if done():
        return folder
    with only_one(folder, "this index is being built"):
        if done():  # another process finished it just before this one got hold of it
            return folder
        started = time.time()
        write_all_codes(sae, store, hook, folder / "codes", shards=shards, skip=skip)
        meta = _describe(sae, store, hook, model, sae_path)
        meta |= {"shards": [[s, store.shards[s][2]] for s in shards], "skip": skip}
        publish(
            folder, meta, shards=shards, rows=_rows_of(store, shards), tok=store.corpus.column("tok"),
            w_dec=sae.W_dec, model=model, started=started,
        )  # fmt: skip
    return folder


def _covers(folder: Path, store: Any, shards: list[int], skip: str | None, *, lens: bool) -> bool:
    """Whether a finished index is of these shards and rows, with the logit lens where it is wanted."""
    if not (folder / "current.json").is_file() or rows_left_out(folder / "codes") != skip:
        return False
    current = read_json(folder / "current.json")
    # an index of the first version covers the whole store
    known = [s for s, _ in current.get("shards", [[s, 0] for s in range(len(store.shards))])]
    return known == shards and (current["logit_lens"] or not lens)


def publish(
    folder: Path, meta: dict[str, Any], *, shards: list[int], rows: np.ndarray, tok: np.ndarray, w_dec: Any,
    model: Any, started: float,
) -> None:  # fmt: skip
    """Make the next database file from the codes in `folder`, and switch `current.json` to it."""
    version = 1 + max((int(p.stem.split("-")[1]) for p in folder.glob("features-*.duckdb")), default=0)
    file = folder / f"features-{version}.duckdb"
    with atomic_file(file) as tmp:
        n_tokens = write_feature_file(
            tmp, codes=folder / "codes", shards=shards, rows=rows, tok=tok, w_dec=w_dec, model=model
        )
    meta = meta | {"n_tokens": n_tokens, "file": file.name, "frequent": FREQUENT}
    write_json(folder / "current.json", meta | {"provenance": provenance(started=started)})


def _describe(sae: SAE, store: Any, hook: str, model: Any, sae_path: str | Path | None) -> dict[str, Any]:
    cfg, identity = sae.cfg, store.identity
    # features write where a transcoder's target is: edits are sized by the rows there
    out = target_hook(sae)
    stats = store.stats(out or hook, split="train", skip="first")
    return {
        "schema_version": SCHEMA_VERSION,
        "sae_id": sae.sae_id,
        "sae_path": _inside(sae_path, store.workspace),
        "name": cfg.label,
        "store": store.path.name,
        "corpus": store.corpus.path.name,
        "corpus_name": store.corpus.meta.get("name", ""),
        "hook": hook,
        "out_hook": out,
        "model": identity.get("model", cfg.model),
        "model_source": store.model_source,
        "model_sha": identity.get("weights_sha256") or cfg.model_sha,
        "activation": cfg.activation,
        "signed": cfg.signed,
        "k": cfg.k,
        "d_sae": cfg.d_sae,
        "d_model": cfg.d_model,
        "n_rows": int(store.n_rows(hook)),
        "mean_resid_norm": float(stats.mean_norm),
        "logit_lens": model is not None,
    }


def _rows_of(store: Any, shards: list[int]) -> np.ndarray:
    return np.concatenate([np.arange(*store.shards[s][2:]) for s in shards])


def _inside(path: str | Path | None, workspace: Path) -> str | None:
    """Where the SAE is, relative to the workspace; None for one outside it."""
    folder = Path(path).resolve() if path else None
    return str(folder.relative_to(workspace)) if folder and folder.is_relative_to(workspace) else None


__all__ = ["build_index", "index_path", "publish"]
