"""What a model must offer to be harvested and spliced: the protocol that every backend is behind.

`LanguageModel` (TransformerLens bridge or nnsight) takes token ids int64 [B, T]; `ModuleModel` takes whatever its
module takes, [B, …]. Both give activations [B, T, d]: T rows of each context, in the order of the token table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from cache.hooks import Edit


class HookedModel(Protocol):
    """A model with named hooks."""

    name: str
    source: str
    """Where to load it again; "" where nothing but the object itself can."""
    identity: dict[str, Any]
    """Everything about the model that determines its activations."""
    max_context: int | None
    device: torch.device
    edits_open: int
    """Contexts of `hooked` that are open."""

    @property
    def running(self) -> AbstractContextManager[Any]:
        """Lock held during a pass: hooks of a pass in one thread must not see the activations of another's."""
        ...

    def hook_names(self) -> list[str]:
        """Every hook that holds rows of vectors, in the order of execution."""
        ...

    def d_hook(self, name: str, /) -> int:
        """Width of the vectors at a hook."""
        ...

    def check_hook(self, name: str, /) -> None:
        """UsageError with the nearest names if there is no such hook."""
        ...

    def capture(self, inputs: Tensor, hooks: Sequence[str], /) -> dict[str, Tensor]:
        """Activations [B, T, d], without gradients; stops after the deepest hook."""
        ...

    def hooked(self, edits: Mapping[str, Edit], /) -> AbstractContextManager[Any]:
        """Replace activations [B, T, d] while the context is open."""
        ...
