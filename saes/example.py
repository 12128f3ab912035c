"""One context of a feature, as the index hands it out and every page, figure and question shows it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """One context of a feature: its row in the token table, document, tokens around it and activations there."""

    row: int
    doc: int
    seq: int
    pos: int
    split: str
    value: float
    tokens: list[str]
    values: list[float]
    centre: int
    """Position of `row` in `tokens`."""
    band: str = ""
    """Quantile band, q0 the strongest tenth."""
    repeats: int = 1
    """Number of identical windows that this one stands for."""
    rows: range = field(default=range(0))
