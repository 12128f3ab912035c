"""`attach`: put SAEs into a model's forward pass, with codes that can be read, edited and differentiated.

At a hook with activation x and codes z = encode(x) the model goes on with

    error on        x + D(edit(z)) - D(z)        unedited: bit for bit x; gradients reach both x and z
    error detached  the same value, but gradients reach x only through z
    error off       D(edit(z))

Position 0 of the context (the attention sink, norm a hundred times the rest) is passed on untouched by default:
SAEs are not trained on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from cache.errors import DataError
from saes.codes import Codes
from saes.sae import SAE

Edit = Callable[[Codes], Codes]
ErrorTerm = Literal[True, False, "detached"]


class Attached:
    """What a splice saw and does: `codes[hook]` of the last forward pass, and an edit for each hook.

    Codes have a row for each spliced position in (batch, position) order, position 0 left out if `skip_first`.
    """

    def __init__(self, saes: Mapping[str, SAE], error: ErrorTerm, skip_first: bool) -> None:
        self.saes, self.error, self.skip_first = dict(saes), error, skip_first
        self.codes: dict[str, Codes] = {}
        self._edits: dict[str, Edit] = {}

    def edit(self, hook: str, fn: Edit | None) -> None:
        """Change the codes at `hook` by `fn(codes) -> codes` in the passes that follow; None takes the edit away."""
        if hook not in self.saes:
            raise DataError(f"no SAE is attached at {hook!r}: attached are {', '.join(self.saes)}")
        if fn is None:
            self._edits.pop(hook, None)
        else:
            self._edits[hook] = fn

    def _splice(self, hook: str, x: Tensor) -> Tensor | None:
        rows = x[:, 1:] if self.skip_first else x
        if rows.shape[1] == 0:
            return None
        new = self._replace(hook, rows)
        if new is None:
            return None
        new = new.to(x.dtype)
        return torch.cat([x[:, :1], new], dim=1) if self.skip_first else new

    def _replace(self, hook: str, x: Tensor) -> Tensor | None:
        sae, edit = self.saes[hook], self._edits.get(hook)
        source = x.detach() if self.error == "detached" else x
        codes = sae.encode(source)
        if torch.is_grad_enabled():
            # SAEs from `train` and `load` are frozen, and so is the model: the codes are then leaves
            if codes.values.requires_grad:
                codes.values.retain_grad()
            else:
                codes.values.requires_grad_()
        self.codes[hook] = codes
        grads = torch.is_grad_enabled() and codes.values.requires_grad
        if self.error is not False and edit is None and not grads:
            return None
        before = sae.decode(codes).view(x.shape)
        after = before if edit is None else sae.decode(edit(codes)).view(x.shape)
        if self.error is False:
            return after
        # before - before.detach() is exactly 0: the value stays x bit for bit, the gradient reaches the codes
        return source + (after - before.detach())


@contextmanager
def attach(
    model: Any, saes: Mapping[str, SAE], *, error: ErrorTerm = True, skip_first: bool = True
) -> Iterator[Attached]:
    """Splice SAEs into `model` (a `cache.LanguageModel`) at their hooks while the block runs.

    Raises UsageError for an unknown hook and DataError where an SAE's d_model is not the hook's width.
    """
    for hook, sae in saes.items():
        model.check_hook(hook)
        want, got = sae.cfg.model_sha, model.identity.get("weights_sha256")
        if want and got and want != got:
            raise DataError(
                f"the SAE was trained on other weights ({want[:12]}) than {model.name} has ({got[:12]}): load that model"
            )
        if model.d_hook(hook) != sae.cfg.d_model:
            raise DataError(
                f"the SAE has d_model={sae.cfg.d_model}, {hook} of {model.name} has {model.d_hook(hook)}: "
                "attach it to the hook it was trained on"
            )
    attached = Attached(saes, error, skip_first)

    def at(hook: str) -> Callable[[Tensor], Tensor | None]:
        return lambda x: attached._splice(hook, x)

    with model.hooked({hook: at(hook) for hook in saes}):
        yield attached
