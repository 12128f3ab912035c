"""What a training job reads: a store that is there, or a model and a corpus from which a ring is filled on the fly.

Nothing is harvested before `open` is called; `--dry-run` needs the width of a row only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.lookup import open_corpus, open_store
from cache.errors import UsageError
from cache.workspace import workspace_path


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data of one job."""

    described: dict[str, Any]
    """What --dry-run prints: the store, or corpus, model and disk bound; and the hook."""
    hook: str
    d_model: int
    disk_bytes: int
    """Bytes that the data takes on disk beyond what is there; 0 for a store."""
    open: Callable[[], Any]
    """The `ActivationStore` or `Ring`."""
    out_hook: str | None = None
    """Hook that transcoders predict; None: SAEs."""
    d_out: int = 0
    rows: int | None = None
    """Rows of the store or corpus: a window has no more."""
    window: int | None = None
    """Row groups that a ring mixes; None: the schedule's."""


def stored(name: str, hook: str | None, workspace: Path | None, out_hook: str | None = None) -> TrainingData:
    """A store by folder, name or `latest`."""
    store = open_store(name, workspace)
    if out_hook is not None and out_hook not in store.hooks:
        raise UsageError(
            f"--out-hook is one of {', '.join(store.hooks)}; harvest another one into the same store"
        )
    chosen = hook or (store.hooks[0] if len(store.hooks) == 1 else "")
    if chosen not in store.hooks:
        raise UsageError(f"--hook is one of {', '.join(store.hooks)}")
    return TrainingData(
        described={"store": store.path.name, "hook": chosen} | ({"out_hook": out_hook} if out_hook else {}),
        hook=chosen,
        d_model=store.d(chosen),
        disk_bytes=0,
        open=lambda: store,
        out_hook=out_hook,
        d_out=store.d(out_hook) if out_hook else 0,
        rows=store.corpus.n_tokens,
    )


def on_the_fly(
    corpus: str,
    model: str,
    hook: str | None,
    workspace: Path | None,
    *,
    disk_gb: float,
    window: int,
    out_hook: str | None = None,
) -> TrainingData:
    """A ring of at most `disk_gb` gigabytes that the model fills while the trainer drains it."""
    from cache import harvest_ring, load_model

    if hook is None:
        raise UsageError("--on-the-fly needs --hook, e.g. --hook blocks.15.hook_resid_post")
    root = workspace_path(workspace)
    table, lm = open_corpus(corpus, root), load_model(model, workspace=root)
    size = int(disk_gb * 1e9)
    hooks = [hook] if out_hook is None else [hook, out_hook]
    return TrainingData(
        described={"corpus": table.path.name, "model": lm.name, "hook": hook, "disk_gb": disk_gb}
        | ({"out_hook": out_hook} if out_hook else {}),
        hook=hook,
        d_model=lm.d_hook(hook),
        disk_bytes=size,
        open=lambda: harvest_ring(lm, table, hooks=hooks, workspace=root, disk_bytes=size, window=window),
        out_hook=out_hook,
        d_out=lm.d_hook(out_hook) if out_hook else 0,
        rows=table.n_tokens,
        window=window,
    )
