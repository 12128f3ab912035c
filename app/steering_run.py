"""One request of the steering page, run and kept as plain numbers and text.

The result grows while tokens arrive, so that what was generated before Stop stays. The measures are taken in a
`finally`, because Stop ends the script at the next thing it shows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steering.effects import Effects

REPAINT_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for."""

    feature: int
    sign: int
    op: str
    strength: float
    where: str
    prompt: str
    tokens: int
    temperature: float
    seed: int
    chat: bool


@dataclass
class Result:
    """What came out so far."""

    sae_id: str
    request: Request
    baseline: str = ""
    steered: str = ""
    baseline_ids: list[int] = field(default_factory=list)
    steered_ids: list[int] = field(default_factory=list)
    effects: Effects | None = None
    # Set when nothing more will come: after Stop the page may be drawn again before the measures are there.
    finished: threading.Event = field(default_factory=threading.Event)

    def differs_at(self) -> int | None:
        """First generated token at which the two texts part; None where they are the same."""
        pairs = zip(self.baseline_ids, self.steered_ids)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is None and len(self.baseline_ids) != len(self.steered_ids):
            at = min(len(self.baseline_ids), len(self.steered_ids))
        return at

    def describe(self) -> str:
        """The request in one line, for under the texts."""
        r = self.request
        size = "" if r.op == "ablate" else f" {r.strength:+.2f} × residual norm"
        pole = {1: "", -1: ", pole −"}[r.sign]
        draw = "most likely token" if r.temperature == 0 else f"temperature {r.temperature:g}, seed {r.seed}"
        return f"{r.op} feature {r.feature}{pole}{size}, positions: {r.where}; {draw}"


def run(result: Result, model: Any, sae: Any, unit_norm: float, repaint: Callable[[], None]) -> None:
    """Generate both texts into `result`, calling `repaint` as they grow; then measure."""
    try:
        _run(result, model, sae, unit_norm, repaint)
    finally:
        result.finished.set()


def _run(result: Result, model: Any, sae: Any, unit_norm: float, repaint: Callable[[], None]) -> None:
    from steering import Direction, Edit, generate, measure

    r = result.request
    direction = Direction.from_sae_feature(sae, r.feature, r.sign)
    edit = Edit(direction=direction, op=r.op, strength=r.strength, unit_norm=unit_norm, where=r.where)  # type: ignore[arg-type]
    generation = generate(
        model,
        r.prompt,
        edits=[edit],
        max_new_tokens=r.tokens,
        temperature=r.temperature,
        seed=r.seed,
        chat=r.chat,
    )
    result.baseline_ids, result.steered_ids = generation.baseline_ids, generation.steered_ids
    painted = 0.0
    try:
        for step in generation:
            result.baseline += step.baseline_text
            result.steered += step.steered_text
            if time.monotonic() - painted >= REPAINT_SECONDS:
                painted = time.monotonic()
                repaint()
    finally:
        if generation.baseline_ids:
            result.effects = measure(model, generation)
    repaint()
