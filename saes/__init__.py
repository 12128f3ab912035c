"""Sparse autoencoders: module, sparse kernels, training, splicing, evaluation, feature index.

Exports are lazy: browsing an index does not import torch, and nothing here imports transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "AIP": "saes.aip",
    "SAE": "saes.sae",
    "Codes": "saes.codes",
    "SAEConfig": "saes.config",
    "TrainConfig": "saes.train_config",
    "train": "saes.training",
    "TrainResult": "saes.training",
    "attach": "saes.splice",
    "evaluate": "saes.evaluation",
    "evaluate_atoms": "saes.atoms",
    "matched_topk": "saes.topk_control",
    "build_index": "saes.indexing",
    "FeatureIndex": "saes.queries",
    "build_proxies": "saes.proxies",
    "compare_saes": "saes.compare",
    "check": "saes.checking",
    "Conventions": "saes.conventions",
    "presets": "saes.presets",
    "Suite": "saes.synthetic",
    "make_suite": "saes.synthetic",
    "recovery_scores": "saes.recovery",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from saes import presets as presets
    from saes.aip import AIP as AIP
    from saes.atoms import evaluate_atoms as evaluate_atoms
    from saes.checking import check as check
    from saes.codes import Codes as Codes
    from saes.compare import compare_saes as compare_saes
    from saes.config import SAEConfig as SAEConfig
    from saes.conventions import Conventions as Conventions
    from saes.evaluation import evaluate as evaluate
    from saes.indexing import build_index as build_index
    from saes.proxies import build_proxies as build_proxies
    from saes.queries import FeatureIndex as FeatureIndex
    from saes.recovery import recovery_scores as recovery_scores
    from saes.sae import SAE as SAE
    from saes.splice import attach as attach
    from saes.synthetic import Suite as Suite
    from saes.synthetic import make_suite as make_suite
    from saes.topk_control import matched_topk as matched_topk
    from saes.train_config import TrainConfig as TrainConfig
    from saes.training import TrainResult as TrainResult
    from saes.training import train as train


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'saes' has no attribute {name!r}")
    module = importlib.import_module(_EXPORTS[name])
    value = module if name == "presets" else getattr(module, name)
    globals()[name] = value
    return value
