"""Probes: what a direction in the residual stream says about the input."""

from __future__ import annotations

from probes.linear import LogisticProbe, MeanDifference

__all__ = ["LogisticProbe", "MeanDifference"]
