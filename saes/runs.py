"""The folder of a run: its name, its record run.json, who may write to it, and what of it can be loaded.

    <label>-<hash>   the hash covers the configs, the data and the SAEs started from: equal runs share a folder
    status           running (or interrupted: the same call goes on), finished, failed (`problem` says why)
    failed           SAEs that diverged: name, step and why; the others of the run were trained without them

One process at a time trains a run: it holds a lock (flock) on the folder, which goes with the process.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cache.errors import AtomscopeError, DataError
from cache.provenance import provenance
from cache.workspace import canonical_json, only_one, read_json, write_json
from saes.config import SAEConfig
from saes.sae import SAE
from saes.sources import Source
from saes.train_config import TrainConfig

RECORD = "run.json"
LATER: dict[str, Any] = {
    "autocast": "auto",
    "lr_schedule": "constant",
    "lr_end": 0.1,
    "gba_b_dec": "fixed",
    "multi_topk": 0.0,
    "window": 32,
}
"""Fields that runs of before them had not, with their defaults: these keep their names."""


class Diverged(DataError):
    """Every SAE of a run has diverged, for these reasons; another run may still be fine."""

    def __init__(self, text: str, reasons: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.reasons = list(reasons)


@dataclass(frozen=True)
class TrainResult:
    """One SAE of a run: its folder (None without a workspace or where it failed) and its logged metrics, a row a step."""

    trained: SAE | None
    path: Path | None
    metrics: list[dict[str, Any]]
    failed: str | None = None
    """Why it diverged and was taken out of the run; None: it was trained."""

    @property
    def sae(self) -> SAE:
        """The trained, folded SAE. Raises DataError where it diverged."""
        if self.trained is None:
            raise DataError(self.failed or "this SAE was not trained")
        return self.trained


def run_name(
    configs: Sequence[SAEConfig], config: TrainConfig, source: Source, warm: Sequence[SAE | None] = ()
) -> str:
    """`<label>-<hash>`, of configs that are bound to their data."""
    key: dict[str, Any] = {
        "saes": [named(c.to_dict()) for c in configs],
        "train": named({k: v for k, v in config.to_dict().items() if k != "checkpoint_seconds"}),
        "data": source.provenance,
    }
    if any(warm):
        key["warm_start"] = [None if s is None else s.sae_id for s in warm]
    digest = hashlib.sha256(canonical_json(key).encode()).hexdigest()[:8]
    more = f"-and-{len(configs) - 1}-more" if len(configs) > 1 else ""
    return f"{configs[0].label}{more}-{digest}"


def named(fields: dict[str, Any]) -> dict[str, Any]:
    """What of a config stands in the name of a run: equal for one from before a field of LATER and one at its default."""
    return {k: v for k, v in fields.items() if LATER.get(k, ...) != v}


def folder_of(i: int, cfg: SAEConfig) -> str:
    return f"{i}-{cfg.label}"


def new_record(source: Source, configs: Sequence[SAEConfig], config: TrainConfig) -> dict[str, Any]:
    """What run.json holds whatever becomes of the run."""
    return {
        "schema_version": 1,
        "saes": [folder_of(i, c) for i, c in enumerate(configs)],
        "configs": [c.to_dict() for c in configs],
        "train": config.to_dict(),
        "data": source.provenance,
        "tokens": config.steps * config.batch_size,
        "provenance": provenance(),
    }


def update(run: Path, **fields: Any) -> None:
    """Change fields of a record that is there."""
    write_json(run / RECORD, read_json(run / RECORD) | fields)


@contextlib.contextmanager
def claimed(run: Path | None) -> Iterator[None]:
    """Be the only one to train this run; one that ends in an error says so in its record.

    An interrupt is none: the run stays as it is, and the same call goes on. Raises AtomscopeError where another
    process trains it.
    """
    if run is None:
        yield
        return
    with only_one(run, "this run is being trained"):
        try:
            yield
        except Exception as e:
            why = str(e) if isinstance(e, AtomscopeError) else f"{type(e).__name__}: {e}"
            # a disk that is full must not hide what has happened
            with contextlib.suppress(AtomscopeError, OSError):
                update(run, status="failed", problem=" ".join(why.split()))
            raise


def load_run(run: Path) -> list[TrainResult] | None:
    """Results of a finished run, or None where it has not finished."""
    if not (run / RECORD).is_file():
        return None
    record = read_json(run / RECORD)
    if record["status"] != "finished":
        return None
    rows = [
        r
        for part in sorted((run / "metrics").glob("part-*.parquet"))
        for r in pq.read_table(part).to_pylist()
    ]
    lost = {f["sae"]: f["why"] for f in record.get("failed", [])}
    results = []
    for i, name in enumerate(record["saes"]):
        own = [r for r in rows if r["sae"] == i]
        if name in lost:
            results.append(TrainResult(None, None, own, lost[name]))
        else:
            results.append(TrainResult(SAE.load(run / name), run / name, own))
    return results
