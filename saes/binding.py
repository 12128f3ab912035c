"""What `train` is given, made to fit: the data as a `Source`, and configs with what the data fixes filled in.

A config that was made for other data (width, hook, what it predicts, data path) is refused before anything is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cache.errors import DataError, UsageError
from saes.config import SAEConfig
from saes.sources import RingSource, Source, StoreSource, tensor_source
from saes.train_config import TrainConfig


def open_source(data: Any, hook: str | None, out_hook: str | None) -> Source:
    """Rows of a store or ring at `hook`, or of one tensor or two."""
    tensors = tensor_source(data, hook, out_hook)
    if tensors is not None:
        return tensors
    from cache.ring import Ring

    hook = hook or (data.hooks[0] if len(data.hooks) == 1 else None)
    if hook is None:
        raise UsageError(f"this store has several hooks, say which: hook= one of {', '.join(data.hooks)}")
    if out_hook == hook:
        raise UsageError(f"out_hook is the input's own hook {hook}: leave it out to train SAEs")
    return (RingSource if isinstance(data, Ring) else StoreSource)(data, hook, out_hook)


def bind(cfg: SAEConfig, source: Source) -> SAEConfig:
    """Fill in what the data fixes; refuse a config made for another width, hook or target."""
    p = source.provenance
    if cfg.d_model not in (0, source.d_model):
        raise DataError(
            f"SAE {cfg.label} has d_model={cfg.d_model}, the activations of "
            f"{p['hook'] or 'the tensor'} have {source.d_model}: train it on the hook it was made for"
        )
    if cfg.hook and p["hook"] and cfg.hook != p["hook"]:
        raise DataError(
            f"SAE {cfg.label} is made for hook {cfg.hook}, the data is of {p['hook']}: "
            "give train the hook it was made for, or leave hook out of its config"
        )
    if (cfg.d_out or cfg.out_hook) and (cfg.d_out, cfg.out_hook) != (source.d_out, p.get("out_hook", "")):
        raise DataError(
            f"SAE {cfg.label} predicts {cfg.out_hook or 'rows'} of width {cfg.d_out or 'unknown'}, the data has "
            f"{p.get('out_hook') or 'no out_hook'}: give train the out_hook it was made for"
        )
    made_for = {"hook": p["hook"] or cfg.hook, "out_hook": p.get("out_hook", ""), "d_out": source.d_out}
    return replace(cfg, d_model=source.d_model, model=p["model"], model_sha=p["model_sha"], **made_for)


def check_data_path(configs: Sequence[SAEConfig], config: TrainConfig, source: Source) -> None:
    """FAST is a data path: refuse rows that did not come along it; and a window that is not the ring's own."""
    ring = getattr(source, "ring_window", config.window)
    if config.window not in (ring, TrainConfig.window):
        raise UsageError(
            f"window={config.window} is of stores, this ring mixes {ring} row groups at a time: make it with "
            f"harvest_ring(window={config.window}) (atomscope train --window {config.window}), and leave it out of train"
        )
    fast = [c.label for c in configs if c.data == "fast"]
    if not fast:
        return
    mode = getattr(source, "mode", None)
    if mode != "dialogue":
        raise UsageError(
            f"{fast[0]} trains on dialogues that each ran alone, this data is {mode or 'a tensor'}: "
            "build a corpus with mode='dialogue' and harvest it"
        )
    if config.skip is not None:
        raise UsageError(
            f"{fast[0]} trains on every row of a dialogue: set skip=None (now {config.skip!r}), "
            "or data='any' to leave rows out"
        )
