"""A plain Hugging Face decoder with named hooks: `module_sites` names its modules, torch's own hooks edit them.

Nothing is wrapped, copied or run: the model stays the object it was, and its hooks are gone when the context closes.
`hook_resid_mid` is the input of the second norm, past the place where the residual branches off, so the change is
completed at the block's output: f(x) + mlp(f(x)) = (x + mlp(f(x))) + (f(x) - x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from cache.assets import nearest
from cache.errors import UsageError
from cache.hooks import Edit, Site, edited, mid_edit, module_sites, resid_mid_block


class PlainModel:
    """Named hooks of a `PreTrainedModel`, as far as a splice needs them."""

    def __init__(self, hf: nn.Module) -> None:
        config: Any = getattr(hf, "config", None)
        if config is None:
            raise UsageError(
                f"{type(hf).__name__} is neither a model of load_model, of Hugging Face nor of TransformerLens: name the "
                "places in it with load_module"
            )
        self.hf = hf
        self.name = str(getattr(config, "_name_or_path", "") or type(hf).__name__)
        self.identity: dict[str, Any] = {"model": self.name}
        self._sites: dict[str, Site] = module_sites(hf)

    def hook_names(self) -> list[str]:
        """The hooks, in the order of execution."""
        return list(self._sites)

    def check_hook(self, name: str) -> None:
        """UsageError with the nearest names if the model has no such hook."""
        if name not in self._sites:
            options = ", ".join(nearest(name, self.hook_names()))
            raise UsageError(f"{self.name} has no hook {name!r}: did you mean {options}?")

    def d_hook(self, name: str) -> int:
        """Width of the vectors at a hook."""
        self.check_hook(name)
        if not name.endswith("hook_z"):
            config: Any = self.hf.config
            return int(config.get_text_config().hidden_size)
        projection: Any = self.hf.get_submodule(self._sites[name].path)
        # GPT-2's Conv1D keeps its weight as [in, out]
        return int(getattr(projection, "in_features", 0) or projection.weight.shape[0])

    @contextmanager
    def hooked(self, edits: Mapping[str, Edit]) -> Iterator[PlainModel]:
        """Replace activations while the context is open: `fn(x [B, T, d])` returns the new x, or None."""
        for name in edits:
            self.check_hook(name)
        with ExitStack() as stack:
            for name, fn in edits.items():
                block = resid_mid_block(name)
                if block is None:
                    stack.enter_context(self._hook(name, partial(edited, fn=fn, name=name)))
                else:
                    stack.enter_context(self._mid(name, block, fn))
            yield self

    @contextmanager
    def _hook(
        self, name: str, fn: Callable[[Tensor], Tensor | None], *, prepend: bool = False
    ) -> Iterator[None]:
        site = self._sites[name]
        module = self.hf.get_submodule(site.path)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key = None if args else next(iter(kwargs))
            y = fn(args[0] if key is None else kwargs[key])
            if y is None:
                return None
            return ((y, *args[1:]), kwargs) if key is None else (args, kwargs | {key: y})

        def after(_: nn.Module, __: Any, out: Any) -> Any:
            y = fn(out[0] if isinstance(out, tuple) else out)
            if y is None:
                return None
            return (y, *out[1:]) if isinstance(out, tuple) else y

        if site.side == "input":
            handle = module.register_forward_pre_hook(before, prepend=prepend, with_kwargs=True)
        else:
            handle = module.register_forward_hook(after, prepend=prepend)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _mid(self, name: str, block: str, fn: Edit) -> Iterator[None]:
        replace, complete = mid_edit(fn, name)
        # prepended: whoever reads or edits hook_resid_post sees the finished stream
        with self._hook(name, replace), self._hook(f"{block}.hook_resid_post", complete, prepend=True):
            yield
