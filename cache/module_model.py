"""Any `torch.nn.Module` with named hooks: the protocol of cache/protocol.py over inputs that need not be tokens.

A hook is the output of a submodule, or with "path:input" its input. Its activation becomes T rows of width d for each
context by an einops pattern: "b d -> b 1 d" (one row), "b t d -> b t d", "b c h w -> b (h w) c" (a feature map: one row
a place, y-major), chosen by the number of dimensions unless `layouts` says otherwise. The module runs in eval mode.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import EinopsError, parse_shape, rearrange
from torch import Tensor, nn

from cache.assets import nearest
from cache.errors import DataError, UsageError
from cache.hooks import Edit, edited
from cache.vocab import template_sha256, tokenizer_sha256

LAYOUTS = {2: "b d -> b 1 d", 3: "b t d -> b t d", 4: "b c h w -> b (h w) c", 5: "b c z h w -> b (z h w) c"}
_MIXED = 1e-4
"""Largest relative change of a row by the other contexts of its batch."""


class _Stop(BaseException):
    """Leaves the forward pass after the deepest hook."""


class _Site(NamedTuple):
    path: str
    side: str
    layout: str


def load_module(
    module: nn.Module,
    modules: Sequence[str] | Mapping[str, str],
    example: Tensor,
    *,
    name: str | None = None,
    layouts: Mapping[str, str] | None = None,
    tokenizer: Any = None,
) -> ModuleModel:
    """Name places in a module: a list of submodule paths, or {hook name: path}; "path:input" is the input.

    `example` is a batch [B, …] of at least two contexts: with it the shapes are found, and it is checked that values
    are finite and that no context changes another one's rows. A module that takes token ids may name its `tokenizer`;
    then it can be harvested on a text corpus too.
    """
    return ModuleModel(module, modules, example, name=name, layouts=layouts or {}, tokenizer=tokenizer)


class ModuleModel:
    """A module with hooks; made by `load_module`."""

    def __init__(
        self,
        module: nn.Module,
        modules: Sequence[str] | Mapping[str, str],
        example: Tensor,
        *,
        name: str | None,
        layouts: Mapping[str, str],
        tokenizer: Any,
    ) -> None:
        self.module, self.name, self.source = module, name or type(module).__name__, ""
        self.tokenizer, self.max_context = tokenizer, None
        self.running, self.edits_open = threading.RLock(), 0
        first = next(iter([*module.parameters(), *module.buffers()]), torch.empty(0))
        self.device, self.dtype = first.device, first.dtype
        named = modules if isinstance(modules, Mapping) else {_hook_name(p): p for p in modules}
        self._sites = {hook: self._site(hook, path, layouts.get(hook)) for hook, path in named.items()}
        if not self._sites:
            raise UsageError(
                "no modules to hook: name at least one, see [n for n, _ in module.named_modules()]"
            )
        self._dims: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        self._probe(example)
        own = {h: s for h, s in named.items() if _hook_name(s) != h}
        self.identity: dict[str, Any] = {
            "model": self.name,
            "weights_sha256": module_sha256(module),
            "architecture_sha256": hashlib.sha256(repr(module).encode()).hexdigest(),
            "tokenizer_sha256": tokenizer and tokenizer_sha256(tokenizer),
            "template_sha256": tokenizer and template_sha256(tokenizer),
            "backend": "module",
            "forward_dtype": str(self.dtype).removeprefix("torch."),
            # Hooks named by their paths can be added later; own names and layouts are part of what a store holds.
            "own_names": own,
            "layouts": dict(sorted(layouts.items())),
        }

    def _site(self, hook: str, path: str, layout: str | None) -> _Site:
        at, _, side = path.partition(":")
        known = dict(self.module.named_modules())
        if at not in known or side not in ("", "input"):
            options = nearest(at, [n for n in known if n])
            raise UsageError(f"{self.name} has no module {path!r}: did you mean {', '.join(options)}?")
        if not re.fullmatch(r"\w+(\.\w+)*", hook):
            raise UsageError(f"{hook!r} is not a hook name: letters, digits, _ and dots")
        return _Site(at, side or "output", layout or "")

    def __repr__(self) -> str:
        hooks = ", ".join(f"{h} [{self._rows[h]} x {d}]" for h, d in self._dims.items())
        return f"ModuleModel({self.name!r}, {hooks}, {self.dtype}, {self.device})"

    # ------------------------------------------------------------------ hooks

    def hook_names(self) -> list[str]:
        """The hooks, in the order of execution."""
        return list(self._dims)

    def d_hook(self, name: str) -> int:
        """Width of the vectors at a hook."""
        self.check_hook(name)
        return self._dims[name]

    def rows(self, name: str) -> int:
        """Rows of one context at a hook, as for the example."""
        self.check_hook(name)
        return self._rows[name]

    def check_hook(self, name: str) -> None:
        """UsageError with the nearest names if there is no such hook."""
        if name not in self._dims:
            options = ", ".join(nearest(name, self.hook_names()))
            raise UsageError(f"{self.name} has no hook {name!r}: did you mean {options}?")

    def capture(self, inputs: Tensor, hooks: Sequence[str] | str) -> dict[str, Tensor]:
        """Activations [B, T, d] at `hooks`, without gradients; the forward pass stops after the deepest one."""
        wanted = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
        if not wanted:
            raise UsageError(f"no hooks to capture: {self.name} has {', '.join(self.hook_names())}")
        for name in wanted:
            self.check_hook(name)
        deepest = max(wanted, key=self.hook_names().index)
        return self._run(inputs, wanted, stop=deepest)

    def _run(self, inputs: Tensor, hooks: Sequence[str], stop: str | None) -> dict[str, Tensor]:
        got: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Tensor], None]:
            def see(x: Tensor) -> None:
                if name in got:
                    raise UsageError(f"{name} runs more than once in a pass: hook a module that runs once")
                got[name] = x.detach().clone() if stop is None else x
                if name == stop:
                    raise _Stop

            return see

        with ExitStack() as stack, self.running, torch.inference_mode(), self._evaluating():
            for name in hooks:
                stack.enter_context(self._hook(name, keep(name)))
            with suppress(_Stop):
                self.module(inputs.to(self.device))
        return got

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [m for m in self.module.modules() if m.training]
        self.module.eval()
        try:
            yield
        finally:
            for m in training:
                m.training = True

    @contextmanager
    def _hook(self, name: str, fn: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Call `fn` with the activation as [B, T, d]; what it returns, if anything, takes its place."""
        site = self._sites[name]
        module = self.module.get_submodule(site.path)

        def change(value: Any) -> Any:
            x = value[0] if isinstance(value, tuple) else value
            if not isinstance(x, Tensor):
                raise UsageError(f"{name} is a {type(x).__name__}, not a tensor: hook a module inside it")
            pattern = _pattern(x, site.layout, name)
            y = fn(rearrange(x, pattern))
            if y is None:
                return None
            y = _inverse(y, x, pattern)
            return (y, *value[1:]) if isinstance(value, tuple) else y

        if site.side == "input":
            handle = module.register_forward_pre_hook(lambda _, args: change(args))
        else:
            handle = module.register_forward_hook(lambda _, __, out: change(out))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def hooked(self, edits: Mapping[str, Edit]) -> Iterator[ModuleModel]:
        """Replace activations while the context is open: `fn(x [B, T, d])` returns the new x, or None."""
        with ExitStack() as stack:
            for name, fn in edits.items():
                self.check_hook(name)
                stack.enter_context(self._hook(name, partial(edited, fn=fn, name=name)))
            self.edits_open += 1
            try:
                yield self
            finally:
                self.edits_open -= 1

    def __call__(self, inputs: Tensor) -> Any:
        """What the module returns, in eval mode, under the active edits."""
        with self.running, self._evaluating():
            return self.module(inputs.to(self.device))

    # ------------------------------------------------------------ self-checks

    def _probe(self, example: Tensor) -> None:
        """Find widths and order, and check what any row of a store relies on."""
        if not isinstance(example, Tensor) or example.ndim < 1 or len(example) < 2:
            raise UsageError(
                "example must be a tensor [B, ...] of at least two contexts, as the module takes them"
            )
        batch = example[:4]
        together = self._run(batch, list(self._sites), stop=None)
        missing = [h for h in self._sites if h not in together]
        if missing:
            raise UsageError(f"{missing[0]} does not run for the example: hook a module that does")
        alone = self._run(batch[:1], list(self._sites), stop=None)
        for hook, x in together.items():
            if not x.is_floating_point() or not bool(x.isfinite().all()):
                raise DataError(
                    f"{self.name}: {hook} is not finite floats for the example: check the weights"
                )
            if x.shape[0] != len(batch) or x.ndim != 3:
                raise DataError(
                    f"{self.name}: {hook} is {tuple(x.shape)} for {len(batch)} contexts, not [B, T, d]: give layouts"
                )
            change = (alone[hook][0] - x[0]).norm() / x[0].norm().clamp(min=1e-30)
            if float(change) > _MIXED:
                raise DataError(f"{self.name}: the other contexts of a batch change the rows of {hook}")
            self._rows[hook], self._dims[hook] = x.shape[1], x.shape[2]


def _hook_name(path: str) -> str:
    return path.replace(":input", ".hook_in")


def _pattern(x: Tensor, layout: str, name: str) -> str:
    pattern = layout or LAYOUTS.get(x.ndim, "")
    try:
        parse_shape(x, pattern.partition("->")[0])
    except (EinopsError, RuntimeError) as e:
        raise UsageError(
            f"{name} has shape {tuple(x.shape)}, which the layout {pattern!r} does not fit: "
            'give layouts={hook: "b … -> b rows d"}'
        ) from e
    return pattern


def _inverse(y: Tensor, x: Tensor, pattern: str) -> Tensor:
    left, _, right = pattern.partition("->")
    sizes = {k: v for k, v in parse_shape(x, left).items() if k != "_"}
    return rearrange(y, f"{right} -> {left}", **sizes)


def module_sha256(module: nn.Module) -> str:
    """Hash of all parameters and buffers: name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, x in module.state_dict().items():
        if not isinstance(x, Tensor):
            continue
        digest.update(f"{name}\0{x.dtype}\0{tuple(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
