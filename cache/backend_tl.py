"""Hooks through TransformerLens 3's bridge, which wraps the Hugging Face model in place and keeps its numbers.

The wrapped model is called directly, with hooks on the bridge's hook points, and left by an exception after the
deepest hook: as fast as the bare model with a plain forward hook.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cache.hooks import Edit, edited, flat, mid_edit, resid_mid_block, storable


class _Stop(BaseException):
    """Leaves the forward pass after the deepest hook. Not an Exception, so that no handler inside catches it."""


@contextmanager
def on_point(point: Any, fn: Callable[[Tensor], Tensor | None], **options: bool) -> Iterator[None]:
    """One function on one hook point; only this one is removed afterwards. options: of the point's `add_hook`."""
    before = list(point.fwd_hooks)

    def call(x: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001  (called as hook=…)
        return fn(x)

    point.add_hook(call, **options)
    handle = next(h for h in point.fwd_hooks if all(h is not b for b in before))
    try:
        yield
    finally:
        handle.hook.remove()
        # by identity: equality of handles looks into their hooks
        point.fwd_hooks = [h for h in point.fwd_hooks if h is not handle]


class TransformerLensBackend:
    """Capture and edit on `bridge.hook_dict`."""

    name = "transformer_lens"

    def __init__(self, hf: nn.Module, path: str, tokenizer: Any, probe: Tensor) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        # The bridge sets padding and BOS options on the tokenizer it is given.
        self.bridge = TransformerBridge.boot_transformers(
            path, hf_model=hf, tokenizer=copy.deepcopy(tokenizer)
        )
        self.hf = hf
        self._points: dict[str, Any] = dict(self.bridge.hook_dict)
        self.dims = self._fired(probe)
        self._order = {name: i for i, name in enumerate(self.dims)}

    def _hook(
        self, name: str, fn: Callable[[Tensor], Tensor | None], *, prepend: bool = False
    ) -> AbstractContextManager[None]:
        return on_point(self._points[name], fn, prepend=prepend)

    def _fired(self, probe: Tensor) -> dict[str, int]:
        """Width of every hook that holds one vector per token, in the order of execution."""
        dims: dict[str, int] = {}

        def note(name: str) -> Callable[[Tensor], None]:
            def see(x: Any) -> None:
                if storable(x):
                    dims[name] = flat(x).shape[-1]

            return see

        with ExitStack() as stack, torch.inference_mode():
            for name in self._points:
                stack.enter_context(self._hook(name, note(name)))
            self.hf(probe, use_cache=False)
        return dims

    def capture(self, tokens: Tensor, hooks: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        got: dict[str, Tensor] = {}
        deepest = max(hooks, key=self._order.__getitem__)

        def keep(name: str) -> Callable[[Tensor], None]:
            def see(x: Tensor) -> None:
                got[name] = flat(x)
                if name == deepest:
                    raise _Stop

            return see

        with ExitStack() as stack, torch.inference_mode():
            for name in hooks:
                stack.enter_context(self._hook(name, keep(name)))
            with suppress(_Stop):
                self.hf(tokens, use_cache=False, **inputs)
        return got

    @contextmanager
    def hooked(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, fn in edits.items():
                block = resid_mid_block(name)
                if block is not None:
                    stack.enter_context(self._mid(name, block, fn))
                else:
                    stack.enter_context(self._hook(name, partial(edited, fn=fn, name=name)))
            yield

    @contextmanager
    def _mid(self, name: str, block: str, fn: Edit) -> Iterator[None]:
        """Edit the stream between attention and MLP."""
        replace, complete = mid_edit(fn, name)
        # Prepended: whoever reads or edits hook_resid_post sees the finished stream.
        with self._hook(name, replace), self._hook(f"{block}.hook_out", complete, prepend=True):
            yield

    def forward(self, tokens: Tensor, inputs: Mapping[str, Any]) -> Any:
        return self.hf(tokens, **inputs)
