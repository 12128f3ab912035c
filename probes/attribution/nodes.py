"""Nodes: what can be patched, as blocks of (kind, layer) with a flat id for every (position, index).

q, z     a query head (z = its output before W_O)        mlp          a neuron after the activation
k, v     a key-value head (a group of query heads)       sae          a feature of an SAE at its hook
resid, attn_out, mlp_out   a whole vector                sae_error    what an SAE leaves out at its hook

id = offset of the block + position · n + index, blocks in the order of execution. With positions="sum" a node is the
same place at every position together, and position is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cache.errors import UsageError

HOOKS = {
    "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "z": "attn.hook_z", "attn_out": "hook_attn_out",
    "mlp": "mlp.hook_post", "mlp_out": "hook_mlp_out", "resid": "hook_resid_post",
}  # fmt: skip
STREAM = ("hook_resid_pre", "hook_resid_mid")
"""Sites of the residual stream before a write of their own layer."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """All nodes of one kind in one layer."""

    kind: str
    layer: int
    hook: str
    n: int
    """Nodes at a position: heads, neurons, features, or 1."""

    @property
    def site(self) -> str:
        return self.hook.split(".", 2)[2]


class NodeSpace:
    """The nodes of one attribution: blocks and the number of positions."""

    def __init__(self, blocks: Sequence[Block], length: int, *, summed: bool = False) -> None:
        self.blocks, self.length, self.summed = list(blocks), length, summed
        self.positions = 1 if summed else length
        sizes = [b.n * self.positions for b in self.blocks]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._layers = np.array([b.layer for b in self.blocks])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Block number, position and index of each id."""
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            raise UsageError(f"node ids go from 0 to {len(self) - 1}, got {ids.min()} to {ids.max()}")
        block = np.searchsorted(self.offsets, ids, side="right") - 1
        n = np.array([b.n for b in self.blocks])[block]
        rest = ids - self.offsets[block]
        return block, rest // n, rest % n

    def layers(self, block: np.ndarray) -> np.ndarray:
        return self._layers[block]

    def frame(self, ids: np.ndarray | None = None) -> pd.DataFrame:
        """Columns node, layer, kind, index, pos, hook; pos is -1 where positions are summed, index of a vector 0."""
        ids = np.arange(len(self)) if ids is None else np.asarray(ids, dtype=np.int64)
        block, pos, index = self.locate(ids)
        kinds = np.array([b.kind for b in self.blocks], dtype=object)[block]
        hooks = np.array([b.hook for b in self.blocks], dtype=object)[block]
        return pd.DataFrame({
            "node": ids, "layer": self.layers(block).astype(np.int32), "kind": kinds, "index": index.astype(np.int32),
            "pos": (np.full(len(ids), -1) if self.summed else pos).astype(np.int32), "hook": hooks,
        })  # fmt: skip

    def signature(self) -> dict[str, Any]:
        """What must be the same for ids to mean the same."""
        return {
            "length": self.length,
            "summed": self.summed,
            "blocks": [[b.kind, b.layer, b.hook, b.n] for b in self.blocks],
        }


def node_blocks(model: Any, kinds: Sequence[str], saes: Mapping[str, Any], *, error: bool) -> list[Block]:
    """Blocks of a model in the order of execution; UsageError for a kind or hook that it does not have."""
    unknown = [k for k in kinds if k not in HOOKS]
    if unknown or not (kinds or saes):
        raise UsageError(
            f"no node kind {unknown}: choose from {', '.join(HOOKS)}, and give SAEs as saes={{hook: sae}}"
        )
    for hook, sae in saes.items():
        model.check_hook(hook)
        if sae.cfg.transcoder:
            raise UsageError(
                f"the SAE at {hook} is a transcoder: attribution takes SAEs that read and write one hook"
            )
    text = model.hf.config.get_text_config()
    d_head = model.d_hook("blocks.0.attn.hook_z") // int(text.num_attention_heads)
    blocks = []
    for layer in range(model.n_layers):
        for kind in HOOKS:
            if kind in kinds:
                hook = f"blocks.{layer}.{HOOKS[kind]}"
                width = model.d_hook(hook)
                n = width // d_head if kind in "qkvz" else width if kind == "mlp" else 1
                blocks.append(Block(kind=kind, layer=layer, hook=hook, n=n))
        for hook, sae in saes.items():
            if not hook.startswith(f"blocks.{layer}."):
                continue
            blocks.append(Block(kind="sae", layer=layer, hook=hook, n=sae.cfg.d_sae))
            if error:
                blocks.append(Block(kind="sae_error", layer=layer, hook=hook, n=1))
    return blocks
