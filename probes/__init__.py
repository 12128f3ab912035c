"""Probes: what a direction in the residual stream says about the input."""
