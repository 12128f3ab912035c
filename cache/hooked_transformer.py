"""A TransformerLens HookedTransformer with named hooks: its own hook points edit it, and nothing else of it is touched.

Any model with `hook_dict` and a `cfg` like HookedTransformer's will do (sae-lens's HookedSAETransformer is one). Widths are
read from `cfg`, so nothing is run: hooks that the caller has on the model see no pass but his own. The hooks here outlive
`reset_hooks`, which run_with_hooks and run_with_cache call, and are gone when the context closes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from cache.assets import nearest
from cache.backend_tl import on_point
from cache.errors import UsageError
from cache.hooks import Edit, edited

# One vector a token, by the name after blocks.N
# (not hook_embed: `generate` embeds the whole text at each token, so position 0 cannot be told there)
_STREAM = {"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out",
           "hook_mlp_out", "hook_mlp_in", "ln1.hook_normalized", "ln2.hook_normalized", "ln_final.hook_normalized"}  # fmt: skip
_MLP = {"mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"}
_HEADS = {"attn.hook_z", "attn.hook_q"}
_KEY_HEADS = {"attn.hook_k", "attn.hook_v"}
_CENTRED = 1e-4
"""Largest mean of an embedding, over the mean size of its entries, that only centring makes."""


def is_hooked_transformer(model: Any) -> bool:
    """Whether the hook points of `model` are what to edit; a TransformerBridge is a wrapped Hugging Face model."""
    return hasattr(model, "hook_dict") and hasattr(model, "add_hook") and not hasattr(model, "original_model")


def is_centred(model: Any) -> bool:
    """Whether writing weights are centred (center_writing_weights): the stream then has mean 0 over d_model.

    So it is in a HookedTransformer from `from_pretrained` and in a TransformerBridge in compatibility mode.
    """
    embedding = getattr(model, "W_E", None)
    if embedding is None:
        return False
    some = embedding[:64].detach().float()
    size = float(some.abs().mean())
    return size > 0 and float(some.mean(-1).abs().max()) < _CENTRED * size


class HookedModel:
    """Named hooks of a HookedTransformer, as far as a splice needs them."""

    def __init__(self, model: nn.Module) -> None:
        self.hf = model
        self.cfg: Any = getattr(model, "cfg", None)
        if not hasattr(self.cfg, "d_model"):
            raise UsageError(
                f"{type(model).__name__} has hook points but no cfg.d_model: attach to the Hugging Face model in it"
            )
        self.name = str(getattr(self.cfg, "model_name", "") or type(model).__name__)
        self.identity: dict[str, Any] = {"model": self.name}
        points: Any = model.hook_dict
        self._points: dict[str, Any] = {n: p for n, p in points.items() if self._width(n)}

    @property
    def first_block(self) -> nn.Module | None:
        """Where a pass begins; it is told the attention mask that the model itself makes of padded text."""
        blocks: Any = getattr(self.hf, "blocks", None)
        return blocks[0] if blocks else None

    def hook_names(self) -> list[str]:
        """The hooks that hold one vector a token."""
        return list(self._points)

    def check_hook(self, name: str) -> None:
        """UsageError with the nearest names if the model has no such hook, or does not run it."""
        if name not in self._points:
            options = ", ".join(nearest(name, self.hook_names()))
            more = f"did you mean {options}?" if options else "see its hook_dict"
            raise UsageError(f"{self.name} has no hook {name!r} that an SAE can be put at: {more}")
        if name.endswith("hook_mlp_out") and getattr(self.cfg, "attn_only", False):
            raise UsageError(f"{self.name} does not run {name}: it has attention only")
        split = any(getattr(self.cfg, flag, False) for flag in ("use_attn_in", "use_split_qkv_input"))
        if name.endswith("ln1.hook_normalized") and split:
            raise UsageError(
                f"{name} of {self.name} holds a vector for each head: call set_use_attn_in(False) and "
                "set_use_split_qkv_input(False) first"
            )
        if name.endswith("hook_mlp_in") and not getattr(self.cfg, "use_hook_mlp_in", False):
            raise UsageError(f"{self.name} does not run {name}: call its set_use_hook_mlp_in(True) first")

    def d_hook(self, name: str) -> int:
        """Width of the vectors at a hook; heads stand side by side."""
        self.check_hook(name)
        return self._width(name)

    def _width(self, name: str) -> int:
        """0 for a hook that does not hold one vector a token."""
        cfg, rest = self.cfg, re.sub(r"^blocks\.\d+\.", "", name)
        if rest in _STREAM:
            return int(cfg.d_model)
        if rest in _MLP:
            return int(cfg.d_mlp or 0)
        if rest in _HEADS:
            return int(cfg.n_heads * cfg.d_head)
        if rest in _KEY_HEADS:
            return int((getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) * cfg.d_head)
        return 0

    @contextmanager
    def hooked(self, edits: Mapping[str, Edit]) -> Iterator[HookedModel]:
        """Replace activations while the context is open: `fn(x [B, T, d])` returns the new x, or None."""
        for name in edits:
            self.check_hook(name)
        with ExitStack() as stack:
            for name, fn in edits.items():
                stack.enter_context(
                    on_point(self._points[name], partial(edited, fn=fn, name=name), is_permanent=True)
                )
            yield self
