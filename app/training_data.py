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


def stored(name: str, hook: str | None, workspace: Path | None) -> TrainingData:
    """A store by folder, name or `latest`."""
    store = open_store(name, workspace)
    chosen = hook or (store.hooks[0] if len(store.hooks) == 1 else "")
    if chosen not in store.hooks:
        raise UsageError(f"--hook is one of {', '.join(store.hooks)}")
    return TrainingData(
        described={"store": store.path.name, "hook": chosen},
        hook=chosen,
        d_model=store.d(chosen),
        disk_bytes=0,
        open=lambda: store,
    )


def on_the_fly(
    corpus: str, model: str, hook: str | None, workspace: Path | None, *, disk_gb: float, window: int
) -> TrainingData:
    """A ring of at most `disk_gb` gigabytes that the model fills while the trainer drains it."""
    from cache import harvest_ring, load_model

    if hook is None:
        raise UsageError("--on-the-fly needs --hook, e.g. --hook blocks.15.hook_resid_post")
    root = workspace_path(workspace)
    table, lm = open_corpus(corpus, root), load_model(model, workspace=root)
    size = int(disk_gb * 1e9)
    return TrainingData(
        described={"corpus": table.path.name, "model": lm.name, "hook": hook, "disk_gb": disk_gb},
        hook=hook,
        d_model=lm.d_hook(hook),
        disk_bytes=size,
        open=lambda: harvest_ring(lm, table, hooks=hook, workspace=root, disk_bytes=size, window=window),
    )
