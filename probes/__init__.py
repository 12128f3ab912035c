"""Probes and attribution: what a direction in the residual stream says about the input, and which parts of a model matter.

Names are loaded when they are first used, so that reading results needs neither torch nor scikit-learn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "LogisticProbe": "probes.linear",
    "MeanDifference": "probes.linear",
    "AtPStar": "probes.attribution.atp",
    "NodeScores": "probes.attribution.atp",
    "PromptPair": "probes.attribution.pairs",
    "read_pairs": "probes.attribution.pairs",
    "write_pairs": "probes.attribution.pairs",
    "pair_set": "probes.attribution.pair_sets",
    "PAIR_SETS": "probes.attribution.pair_sets",
    "LogitDifference": "probes.attribution.metric",
    "LogProb": "probes.attribution.metric",
    "KL": "probes.attribution.metric",
    "ExactPatching": "probes.attribution.patching",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from probes.attribution.atp import AtPStar as AtPStar
    from probes.attribution.atp import NodeScores as NodeScores
    from probes.attribution.metric import KL as KL
    from probes.attribution.metric import LogitDifference as LogitDifference
    from probes.attribution.metric import LogProb as LogProb
    from probes.attribution.pair_sets import PAIR_SETS as PAIR_SETS
    from probes.attribution.pair_sets import pair_set as pair_set
    from probes.attribution.pairs import PromptPair as PromptPair
    from probes.attribution.pairs import read_pairs as read_pairs
    from probes.attribution.pairs import write_pairs as write_pairs
    from probes.attribution.patching import ExactPatching as ExactPatching
    from probes.linear import LogisticProbe as LogisticProbe
    from probes.linear import MeanDifference as MeanDifference


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'probes' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
