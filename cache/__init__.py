"""Model loading, token tables, harvest and the activation store: run a model once, keep what it computed.

Names are imported when first used: reading a store needs neither torch's model stack nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache.catalog import connect
    from cache.corpus import Corpus, build_corpus
    from cache.harvesting import harvest
    from cache.models import LanguageModel, load_model
    from cache.store import ActivationStore, Stats
    from cache.stream import Batch
    from cache.workspace import workspace_path

_EXPORTS = {
    "ActivationStore": "cache.store",
    "Batch": "cache.stream",
    "Corpus": "cache.corpus",
    "LanguageModel": "cache.models",
    "Stats": "cache.store",
    "build_corpus": "cache.corpus",
    "connect": "cache.catalog",
    "harvest": "cache.harvesting",
    "load_model": "cache.models",
    "workspace_path": "cache.workspace",
}

__all__ = [
    "ActivationStore",
    "Batch",
    "Corpus",
    "LanguageModel",
    "Stats",
    "build_corpus",
    "connect",
    "harvest",
    "load_model",
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
