"""`attach`: put SAEs into a model's forward pass, with codes that can be read, edited and differentiated.

At a hook with activation x and codes z = encode(x) the model goes on with

    error on        x + D(edit(z)) - D(z)        unedited: bit for bit x; gradients of exactly this: x has the plain model's
    error detached  the same value, but gradients reach x only through z
    error off       D(edit(z))

A transcoder is attached at the hook that it predicts: y there goes on as y + D(edit(z)) - D(z), or as D(edit(z)), with
z = encode(x) of the hook that it reads, earlier in the same pass. Its codes stand under the hook where it is attached.

One line on stderr tells where an SAE is attached at another hook than it was trained at.

An edit gets a copy of the codes, which it may also change in place: `codes` keeps what the SAE said.

Position 0 of the context (the attention sink, norm a hundred times the rest) is passed on untouched where an SAE was
not trained on it, which is so unless its conventions say otherwise. Tokens that continue a key-value cache are spliced.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from cache.errors import DataError, UsageError
from saes.codes import Codes
from saes.sae import SAE

Edit = Callable[[Codes], Codes | None]
"""Returns the new codes, or None where it has changed those that it was given."""
ErrorTerm = Literal[True, False, "detached"]


class Attached:
    """What a splice saw and does: `codes[hook]` of the last forward pass, and an edit for each hook.

    Codes have a row for each spliced position in (batch, position) order, position 0 left out where `skips[hook]`.
    """

    def __init__(self, saes: Mapping[str, SAE], error: ErrorTerm, skip_first: bool | None) -> None:
        self.saes, self.error = dict(saes), error
        self.skips = {h: _skips(s) if skip_first is None else skip_first for h, s in saes.items()}
        self.continues = False
        """Whether the pass goes on from a key-value cache: its first token is not position 0."""
        self.codes: dict[str, Codes] = {}
        self._edits: dict[str, Edit] = {}
        self._inputs: dict[str, Tensor] = {}

    def edit(self, hook: str, fn: Edit | None) -> None:
        """Change the codes at `hook` by `fn(codes) -> codes` in the passes that follow; None takes the edit away.

        fn may change the codes in place, and may then return nothing.
        """
        if hook not in self.saes:
            raise DataError(f"no SAE is attached at {hook!r}: attached are {', '.join(self.saes)}")
        if fn is None:
            self._edits.pop(hook, None)
        else:
            self._edits[hook] = fn

    def _at(self, hook: str, x: Tensor) -> Tensor | None:
        """What goes on at a hook, None for x itself; what is read there has gone through a splice at the same hook."""
        new = self._splice(hook, x) if hook in self.saes else None
        for place, sae in self.saes.items():
            if sae.cfg.transcoder and sae.cfg.hook == hook:
                self._inputs[place] = x if new is None else new
        return new

    def _skip(self, hook: str) -> bool:
        return self.skips[hook] and not self.continues

    def _splice(self, hook: str, x: Tensor) -> Tensor | None:
        rows = x[:, 1:] if self._skip(hook) else x
        if rows.shape[1] == 0:
            return None
        new = self._replace(hook, rows, self._read(hook, x))
        if new is None:
            return None
        new = new.to(x.dtype)
        return torch.cat([x[:, :1], new], dim=1) if self._skip(hook) else new

    def _read(self, hook: str, x: Tensor) -> Tensor:
        """The rows that the SAE at `hook` encodes: those of the hook, or of the hook that a transcoder reads."""
        cfg = self.saes[hook].cfg
        if cfg.transcoder:
            # taken once: an input that is left from an earlier pass would be of other tokens
            read = self._inputs.pop(hook, None)
            if read is None:
                raise DataError(
                    f"the transcoder at {hook} reads {cfg.hook}, which had not run when {hook} did: "
                    "its input must come earlier in the forward pass"
                )
            x = read
        return x[:, 1:] if self._skip(hook) else x

    def _replace(self, hook: str, y: Tensor, x: Tensor) -> Tensor | None:
        """y: rows of the hook; x: the rows that are encoded, the same for an SAE."""
        sae, edit = self.saes[hook], self._edits.get(hook)
        kept = y.detach() if self.error == "detached" else y
        taken = codes = sae.encode(x)
        if self.error is True and torch.is_grad_enabled() and codes.values.requires_grad:
            # D(z) that is taken away has a path of its own to x: else x would count once more through D(z) that is added
            codes = taken._replace(values=taken.values.clone())
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
        before = sae.decode(taken).view(y.shape)
        same = edit is None and taken is codes
        after = before if same else sae.decode(codes if edit is None else _edited(codes, edit)).view(y.shape)
        if self.error is False:
            return after
        # what is 0 here is exactly 0: unedited, the value stays y bit for bit while the gradient reaches the codes
        new = kept + (after - (after if edit is None else before).detach())
        return new if taken is codes else new - (before - before.detach())


def _edited(codes: Codes, edit: Edit) -> Codes:
    """Codes after the edit. It gets a copy: codes are kept for reading, and a leaf of the graph cannot be written to."""
    offsets = None if codes.offsets is None else codes.offsets.clone()
    given = Codes(codes.values.clone(), codes.indices.clone(), offsets)
    new = edit(given)
    return given if new is None else new


def _skips(sae: SAE) -> bool:
    """Position 0 is left out unless the SAE's makers say that it was trained on it."""
    return sae.conventions.skip_first is not False


@contextmanager
def attach(
    model: Any, saes: Mapping[str, SAE] | SAE, *, error: ErrorTerm = True, skip_first: bool | None = None
) -> Iterator[Attached]:
    """Splice SAEs into `model` at their hooks while the block runs; transcoders at their out_hook.

    `saes` is `{hook: sae}`, or one SAE, which goes to the hook it was trained at. `model` is a `cache.LanguageModel`, a
    `ModuleModel`, a HookedTransformer or TransformerBridge of TransformerLens, or a plain Hugging Face model; the last three
    are called as ever (`model(input_ids)`, `model.generate(...)`, `model.run_with_cache(...)`). `skip_first` None: position 0 as the conventions of each SAE say.
    Raises UsageError for an unknown hook and DataError where an SAE's width is not the hook's; a pass over rows that
    are padded on the left raises DataError where position 0 is left out.
    """
    saes = _by_hook(saes)
    if error not in (True, False, "detached"):
        raise UsageError(f"error is True, False or 'detached', got {error!r}")
    from cache.hooked_transformer import is_centred

    centred = is_centred(model)
    model = model if hasattr(model, "hooked") else _named(model)
    for hook, sae in saes.items():
        _check_place(model, hook, sae)
        if sae.cfg.hook and not sae.cfg.transcoder and _place(sae.cfg.hook) != _place(hook):
            misplaced(sae.cfg.hook, hook)
        if centred and not sae.conventions.centred:
            processed(model.name)
    attached = Attached(saes, error, skip_first)

    def at(hook: str) -> Callable[[Tensor], Tensor | None]:
        return lambda x: attached._at(hook, x)

    read = [sae.cfg.hook for sae in saes.values() if sae.cfg.transcoder]
    edits = {hook: at(hook) for hook in dict.fromkeys([*saes, *read])}
    with _watching_cache(model, attached), model.hooked(edits):
        yield attached


def _named(model: Any) -> Any:
    """A model that is not of this library, with the hooks that a splice needs."""
    from cache.hooked_transformer import HookedModel, is_hooked_transformer
    from cache.plain_model import PlainModel

    return HookedModel(model) if is_hooked_transformer(model) else PlainModel(model)


def _by_hook(saes: Any) -> dict[str, SAE]:
    """What `attach` was given, as SAEs by their hooks."""
    if isinstance(saes, SAE):
        hook = saes.cfg.out_hook if saes.cfg.transcoder else saes.cfg.hook
        if not hook:
            raise UsageError("the SAE does not say where it belongs: attach(model, {hook: sae})")
        return {hook: saes}
    if isinstance(saes, str) or not isinstance(saes, Mapping):
        raise UsageError(
            f"attach takes {{hook: sae}} or one SAE, got {type(saes).__name__}: load it first, with SAE.load(folder)"
        )
    for hook, sae in saes.items():
        if not isinstance(sae, SAE):
            raise UsageError(
                f"at {hook} stands {sae!r:.60}, not an SAE: load it first, with SAE.load(folder)"
            )
    return dict(saes)


def _check_place(model: Any, hook: str, sae: SAE) -> None:
    """Refuse a hook, weights or a width that are not those of the SAE."""
    cfg = sae.cfg
    if cfg.transcoder and (not cfg.hook or hook == cfg.hook or (cfg.out_hook and hook != cfg.out_hook)):
        raise DataError(
            f"a transcoder from {cfg.hook or 'an unnamed hook'} to {cfg.out_hook or 'an unnamed hook'} cannot be "
            f"attached at {hook}: attach it at the hook that it predicts"
        )
    model.check_hook(hook)
    want, got = cfg.model_sha, model.identity.get("weights_sha256")
    if want and got and want != got:
        raise DataError(
            f"the SAE was trained on other weights ({want[:12]}) than {model.name} has ({got[:12]}): load that model"
        )
    if cfg.transcoder:
        model.check_hook(cfg.hook)
    for place, width in ((hook, cfg.width_out), (cfg.hook if cfg.transcoder else hook, cfg.d_model)):
        if model.d_hook(place) != width:
            raise DataError(
                f"the SAE has d_model={cfg.d_model}{f', d_out={cfg.d_out}' if cfg.transcoder else ''}, {place} of "
                f"{model.name} has {model.d_hook(place)}: attach it to the hook it was trained on"
            )


def _place(hook: str) -> str:
    """One name for the residual stream between two blocks, which has two."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook)
    return f"blocks.{int(found[1]) + 1}.hook_resid_pre" if found else hook


@cache
def misplaced(trained: str, hook: str) -> None:
    """Say it once a process: people do this on purpose, in loops."""
    print(
        f"attach: an SAE trained at {trained} is spliced at {hook}; its own place is attach(model, sae)",
        file=sys.stderr,
        flush=True,
    )


@cache
def processed(model: str) -> None:
    """Say it once a process."""
    print(
        f"attach: the writing weights of {model} are centred, and the SAE was trained on rows of the plain model: load it "
        "without processing (HookedTransformer.from_pretrained_no_processing; a TransformerBridge without "
        "enable_compatibility_mode)",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def _watching_cache(model: Any, attached: Attached) -> Iterator[None]:
    """Tell from the arguments of each pass of a language model whether it continues a cache.

    Padding on the left is refused where position 0 is passed on: the first column would be padding, and the sink of each
    row, past it, would be rebuilt.
    """

    def see(_: torch.nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        attached.continues = _cached(kwargs) > 0
        mask = kwargs.get("attention_mask")
        if attached.continues or not any(attached.skips.values()) or not isinstance(mask, Tensor):
            return
        if mask.ndim == 2 and bool((mask[:, 0] == 0).any()):
            raise DataError(
                "rows padded on the left do not begin at position 0, which the SAE passes on: pad on the right, run rows "
                "one by one, or give attach skip_first=False"
            )

    watched = [getattr(model, "hf", None), getattr(model, "first_block", None)]
    handles = [m.register_forward_pre_hook(see, with_kwargs=True) for m in watched if m is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cached(kwargs: dict[str, Any]) -> int:
    """Tokens in the key-value cache of a pass of a Hugging Face model, of a HookedTransformer, or of a block of it."""
    if (past := kwargs.get("past_key_values")) is not None:
        return int(past.get_seq_length())
    entry = kwargs.get("past_kv_cache_entry")
    if (past := kwargs.get("past_kv_cache")) is not None:
        entry = past[0]
    return 0 if entry is None else int(entry.past_keys.shape[1])
