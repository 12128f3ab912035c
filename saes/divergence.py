"""The SAEs of a run, which share its batches, and what happens where the loss of one is no longer finite.

The bad one is taken out and the others go on as if it had never been there: they share rows and nothing else. Named are
the SAE, the first step that went wrong (each counts its finite steps on the device; the count is read where metrics are) and
the last good checkpoint. One of a state that has gone wrong is never written. Where none is left the run ends.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from saes.checkpoint import latest_step
from saes.runs import Diverged, folder_of, update
from saes.train_config import TrainConfig
from saes.trainer import Trainer

NAMED = 3
"""SAEs whose reasons stand in one line."""


class Together:
    """Trainers in the order of the run; `lost` holds the record of each one that was taken out."""

    def __init__(self, trainers: list[Trainer], config: TrainConfig, run: Path | None) -> None:
        self.trainers, self.config, self.run = trainers, config, run
        self.lost: dict[int, dict[str, Any]] = {}

    @property
    def live(self) -> list[tuple[int, Trainer]]:
        return [(i, t) for i, t in enumerate(self.trainers) if i not in self.lost]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """For run.json: sae, step, why."""
        return [self.lost[i] for i in sorted(self.lost)]

    def drop(self, i: int, what: str, step: int, noticed: int) -> None:
        """Go on without SAE i, which went wrong at `step`, 1-based, as was seen after step `noticed`.

        Raises Diverged where it was the last one.
        """
        t = self.trainers[i]
        lr = self.config.peak_lr(t.cfg.d_sae, t.cfg.lr)
        later = f" (noticed at step {noticed})" if noticed > step else ""
        good = latest_step(self.run) if self.run is not None else 0
        why = (
            f"{what} is not finite at step {step} of SAE {t.cfg.label}{later}: lower lr (now {lr:.2g}); "
            f"{f'last good checkpoint: step {good}' if good else 'no checkpoint was written before'}"
        )
        self.lost[i] = {"sae": folder_of(i, t.cfg), "step": step, "last_good": good or None, "why": why}
        if self.run is not None:
            update(self.run, failed=self.failed)
        where = f" in {self.run}" if self.run is not None and good else ""
        if not self.live:
            reasons = "; ".join(f["why"] for f in self.failed[:NAMED])
            more = f"; and {len(self.lost) - NAMED} more SAEs" if len(self.lost) > NAMED else ""
            raise Diverged(f"{reasons}{where}{more}", [f["why"] for f in self.failed])
        print(f"{why}{where}; the run goes on without it", file=sys.stderr, flush=True)

    def states(self) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
        """What a checkpoint holds of each SAE; of one that was taken out, why."""
        return [
            ({}, {"lost": self.lost[i]}) if i in self.lost else (t.tensors(), t.state())
            for i, t in enumerate(self.trainers)
        ]

    def load(self, states: list[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        """Go on from `states()`."""
        for i, (t, (tensors, state)) in enumerate(zip(self.trainers, states, strict=True)):
            if "lost" in state:
                self.lost[i] = state["lost"]
            else:
                t.load(tensors, state)
