"""Hooks through nnsight: a trace over the plain Hugging Face model, stopped after the deepest hook.

Decoder layers of transformers 5 return a bare tensor, so `output[0]` would be batch element 0; `_tensor` tells
a tuple from a tensor. Within a trace, modules must be touched in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cache.hooks import Edit, edited, flat, module_sites, resid_mid_block, storable


def _tensor(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def _replaced(value: Any, new: Tensor) -> Any:
    return (new, *value[1:]) if isinstance(value, tuple) else new


class NNsightBackend:
    """Capture and edit in nnsight traces."""

    name = "nnsight"

    def __init__(self, hf: nn.Module, probe: Tensor) -> None:
        from nnsight import NNsight

        self.hf = hf
        self._model = NNsight(hf)
        self._sites = module_sites(hf)
        self._envoys = {name: self._envoy(site.path) for name, site in self._sites.items()}
        self._order = {name: i for i, name in enumerate(self._sites)}
        self._edits: list[tuple[str, Edit]] = []
        found = self.capture(probe, list(self._sites), {})
        self.dims = {name: x.shape[-1] for name, x in found.items() if storable(x)}

    def _envoy(self, path: str) -> Any:
        at: Any = self._model
        for part in path.split("."):
            at = at[int(part)] if part.isdigit() else getattr(at, part)
        return at

    def _read(self, name: str) -> Any:
        envoy = self._envoys[name]
        return envoy.input if self._sites[name].side == "input" else envoy.output

    def _write(self, name: str, old: Any, new: Tensor) -> None:
        envoy = self._envoys[name]
        if self._sites[name].side == "input":
            envoy.input = new
        else:
            envoy.output = _replaced(old, new)

    def _visit(self, hooks: Sequence[str]) -> dict[str, Tensor]:
        """Inside a trace: apply the active edits and read `hooks`, in the order of execution."""
        got: dict[str, Tensor] = {}
        pending: dict[str, Tensor] = {}  # changes of hook_resid_mid that the block's output still lacks
        last = max((self._order[h] for h in hooks), default=len(self._order))
        touched = {*hooks, *(n for n, _ in self._edits)}
        touched |= {f"{b}.hook_resid_post" for n in touched if (b := resid_mid_block(n)) is not None}
        for name in sorted(touched, key=self._order.__getitem__):
            if self._order[name] > last:
                break
            block, _, rest = name.rpartition(".")
            value = self._read(name)
            x = before = _tensor(value)
            if rest == "hook_resid_post" and block in pending:
                x = x + pending.pop(block)
            for edit_name, fn in self._edits:
                if edit_name == name and (y := edited(x, fn, name)) is not None:
                    x = y
            if x is not before:
                self._write(name, value, x)
                if rest == "hook_resid_mid":
                    pending[block] = x - before
            if name in hooks:
                got[name] = flat(x)
        return got

    def capture(self, tokens: Tensor, hooks: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        got: dict[str, Tensor] = {}
        with torch.inference_mode(), self._model.trace(input_ids=tokens, use_cache=False, **inputs) as tracer:
            got.update(self._visit(hooks))
            tracer.stop()
        return got

    @contextmanager
    def hooked(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        added = list(edits.items())
        self._edits.extend(added)
        try:
            yield
        finally:
            for item in added:
                index = next(i for i in reversed(range(len(self._edits))) if self._edits[i] is item)
                del self._edits[index]

    def forward(self, tokens: Tensor, inputs: Mapping[str, Any]) -> Any:
        if not self._edits:
            return self.hf(tokens, **inputs)
        out: list[Any] = []
        with self._model.trace(input_ids=tokens, **inputs):
            self._visit([])
            out.append(self._model.output)
        return out[0]
