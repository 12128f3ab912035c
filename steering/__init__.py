"""Steering: directions, edits and generation side by side with the unedited model.

Names are imported when first used, so that naming this package does not import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steering.direction import Direction
    from steering.edits import Edit
    from steering.effects import Effects, measure
    from steering.generate import Generation, Step, generate

_EXPORTS = {
    "Direction": "steering.direction",
    "Edit": "steering.edits",
    "Effects": "steering.effects",
    "Generation": "steering.generate",
    "Step": "steering.generate",
    "generate": "steering.generate",
    "measure": "steering.effects",
}

__all__ = ["Direction", "Edit", "Effects", "Generation", "Step", "generate", "measure"]


class _Package(ModuleType):
    """The import system binds a submodule's name on its package; `generate` is to stay the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _EXPORTS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'steering' has no attribute {name!r}; it exports {', '.join(__all__)}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


sys.modules[__name__].__class__ = _Package
