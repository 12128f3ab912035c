"""Weights & Biases as a listener of a run's metrics: the rows that metrics/ holds, under `<sae>/<metric>`.

Optional (`pip install 'atomscope[wandb]'`) and off unless a project is named: it sends metrics and configs to the
W&B server, or keeps them in ./wandb with WANDB_MODE=offline. A run that goes on after a stop goes on there too; steps that
are computed again are told from new ones by W&B, which ignores them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cache.errors import UsageError
from saes.run_log import Listener


@contextmanager
def wandb_log(project: str | None, name: str, record: dict[str, Any]) -> Iterator[Listener | None]:
    """A listener that logs to one W&B run for one run folder, ended as failed where the block raises; None without one.

    record: what run.json holds; its `saes` are the names of the SAEs.
    """
    if project is None:
        yield None
        return
    try:
        import wandb
    except ImportError as e:
        raise UsageError("wandb is not installed: pip install 'atomscope[wandb]', or leave it out") from e
    try:
        run = wandb.init(project=project, name=name, id=name, resume="allow", config=record)
    except wandb.Error as e:
        reason = " ".join(str(e).split())
        raise UsageError(
            f"W&B does not start ({reason}): `wandb login` first, WANDB_MODE=offline to keep it in ./wandb, or leave it out"
        ) from e
    names = record["saes"]

    def listen(row: dict[str, Any]) -> None:
        values = {k: v for k, v in row.items() if k not in ("sae", "step")}
        run.log({f"{names[row['sae']]}/{k}": v for k, v in values.items()}, step=row["step"])

    failed = True
    try:
        yield listen
        failed = False
    finally:
        run.finish(exit_code=int(failed))
