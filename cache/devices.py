"""Devices by name: the one that a model runs on by default, and a clear refusal of one that is not there."""

from __future__ import annotations

from typing import Any

import torch

from cache.errors import UsageError


def known_device(device: Any) -> torch.device:
    """A device that torch knows and this machine has. Raises UsageError."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise UsageError(f"device {device!r} is not one of torch's: cpu, cuda, cuda:1, mps") from e
    if not _is_there(found):
        raise UsageError(f"torch finds no device {found} on this machine: leave device out, or take cpu")
    return found


def default_device() -> torch.device:
    """CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps":
        return torch.backends.mps.is_available()
    try:
        # of `meta` nothing can be read; other kinds have a back end, or say that they have none
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, NotImplementedError):
        return False
    return True
