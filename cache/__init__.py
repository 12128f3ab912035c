"""Model loading, token tables, harvest and the activation store: run a model once, keep what it computed.

Names are imported when first used: reading a store needs neither torch's model stack nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache.catalog import connect
    from cache.contexts import build_contexts, grid_columns
    from cache.corpus import Corpus, build_corpus
    from cache.harvesting import harvest
    from cache.models import LanguageModel, load_model
    from cache.module_model import ModuleModel, load_module
    from cache.ring import Ring, harvest_ring
    from cache.store import ActivationStore, Stats
    from cache.stream import Batch
    from cache.workspace import workspace_path

_EXPORTS = {
    "ActivationStore": "cache.store",
    "Batch": "cache.stream",
    "Corpus": "cache.corpus",
    "LanguageModel": "cache.models",
    "ModuleModel": "cache.module_model",
    "Ring": "cache.ring",
    "Stats": "cache.store",
    "build_contexts": "cache.contexts",
    "build_corpus": "cache.corpus",
    "connect": "cache.catalog",
    "grid_columns": "cache.contexts",
    "harvest": "cache.harvesting",
    "harvest_ring": "cache.ring",
    "load_model": "cache.models",
    "load_module": "cache.module_model",
    "workspace_path": "cache.workspace",
}

__all__ = [
    "ActivationStore",
    "Batch",
    "Corpus",
    "LanguageModel",
    "ModuleModel",
    "Ring",
    "Stats",
    "build_contexts",
    "build_corpus",
    "connect",
    "grid_columns",
    "harvest",
    "harvest_ring",
    "load_model",
    "load_module",
    "workspace_path",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'cache' has no attribute {name!r}; it exports {', '.join(__all__)}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
