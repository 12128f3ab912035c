"""A clean run that can be taken up again at any layer and position, with edits and gradients.

One pass records what every decoder layer is called with (mask, rotary tables) and its input. After that layer l can be
called by itself: on the stream of any batch of rows, from position `start` on, with the keys and values of the clean
run before it. What cannot have changed is not computed: layers below an edit, positions before it, logits nobody reads.
The parts are put together again and compared with the model's own logits when a replay is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from cache.errors import DataError, UsageError
from cache.hooks import Edit, decoder_layers

_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference that rounding explains: half precision has three digits or fewer."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 3e-2


class Prefix:
    """Keys and values [1, KV, start, d_head] of the clean run, with the interface of a key-value cache."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        shape = (k.shape[0], -1, -1, -1)
        return torch.cat([self.k.expand(shape), k], dim=2), torch.cat([self.v.expand(shape), v], dim=2)

    def get_seq_length(self, *_: Any) -> int:
        return int(self.k.shape[2])


class Replay:
    """The clean run of tokens [B, T]: `inputs[l]` the stream into layer l, `acts[hook]` what was asked for."""

    def __init__(self, model: Any, tokens: Tensor, hooks: Sequence[str] = (), *, check: bool = True) -> None:
        if model.backend != "transformer_lens":
            raise UsageError(
                "attribution runs on the TransformerLens backend: load_model(name) without backend="
            )
        self.model, self.tokens = model, tokens.to(model.device)
        self.layers = decoder_layers(model.hf)
        base: Any = getattr(model.hf, str(model.hf.base_model_prefix), model.hf)
        norms = [getattr(base, n) for n in _NORMS if getattr(base, n, None) is not None]
        if not norms:
            raise UsageError(
                f"{type(model.hf).__name__} has no final norm that is known ({', '.join(_NORMS)})"
            )
        self._norm, self._unembed = norms[0], model.hf.get_output_embeddings()
        self._cap = getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {})] * len(self.layers)
        self.inputs: list[Tensor] = [tokens] * len(self.layers)
        self.acts: dict[str, Tensor] = {}
        rotary = [f"blocks.{i}.attn.{n}" for i in range(len(self.layers)) for n in ("hook_rot_k", "hook_v")]
        known = set(model.hook_names())
        rotary = rotary if all(name in known for name in rotary) else []
        self._record([*hooks, *rotary], check)
        self.has_prefix = bool(rotary) and all("position_embeddings" in kwargs for _, kwargs in self._calls)

    @torch.no_grad()
    def _record(self, hooks: Sequence[str], check: bool) -> None:
        def at(i: int) -> Any:
            def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.inputs[i] = args[0].detach()
                clean = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
                self._calls[i] = (args[1:], clean)

            return see

        def keep(name: str) -> Edit:
            def see(x: Tensor) -> None:
                self.acts[name] = x.detach()

            return see

        edits = {name: keep(name) for name in dict.fromkeys(hooks)}
        with ExitStack() as stack:
            stack.enter_context(self.model.running)
            for i, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_pre_hook(at(i), with_kwargs=True).remove)
            stack.enter_context(self.model.hooked(edits))
            own = self.model(self.tokens)
        if check:
            self._verify(own)

    def _verify(self, own: Tensor) -> None:
        last = self.tokens.shape[1] - 1
        mine = self.run(self.inputs[0], 0, 0, (last,))
        limit = tolerance(own.dtype)
        if not torch.allclose(mine[:, 0], own[:, last], rtol=limit, atol=limit * float(own.std()) + 1e-6):
            raise DataError(
                f"{self.model.name}: layers called one by one do not give the model's logits: "
                "its decoder does more than layers, a norm and an unembedding, which attribution does not know"
            )

    def mask(self, layer: int) -> Tensor:
        """Which keys a query of this layer sees, bool [1 or B, 1, T, T]: causal, sliding or both, as the model was told."""
        args, kwargs = self._calls[layer]
        n = self.tokens.shape[1]
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] == n:
                allowed = value if value.dtype == torch.bool else value > torch.finfo(value.dtype).min / 2
                return allowed & torch.ones(n, n, dtype=torch.bool, device=value.device).tril()
        return torch.ones(1, 1, n, n, dtype=torch.bool, device=self.tokens.device).tril()

    def call(self, layer: int, x: Tensor, start: int = 0) -> Tensor:
        """Output of one layer for the stream x [R, T - start, d] at positions from `start` on."""
        args, kwargs = self._calls[layer]
        if start:
            kwargs = self._sliced(layer, kwargs, start)
        out = self.layers[layer](x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _sliced(self, layer: int, kwargs: Mapping[str, Any], start: int) -> dict[str, Any]:
        out = dict(kwargs)
        if out.get("attention_mask") is not None:
            out["attention_mask"] = out["attention_mask"][:, :, start:]
        for name in ("position_ids", "cache_position"):
            if out.get(name) is not None:
                out[name] = out[name][..., start:]
        cos, sin = out["position_embeddings"]
        out["position_embeddings"] = (cos[:, start:], sin[:, start:])
        k, v = (self._heads(f"blocks.{layer}.attn.{n}") for n in ("hook_rot_k", "hook_v"))
        out["past_key_values"] = Prefix(k[:, :, :start], v[:, :, :start])
        return out

    def _heads(self, hook: str) -> Tensor:
        x = self.acts[hook]
        text = self.model.hf.config.get_text_config()
        d_head = self.model.d_hook("blocks.0.attn.hook_z") // int(text.num_attention_heads)
        return x.unflatten(-1, (-1, d_head)).transpose(1, 2)

    def head(self, x: Tensor) -> Tensor:
        """Logits of a stream after the last layer."""
        logits = self._unembed(self._norm(x))
        return self._cap * torch.tanh(logits / self._cap) if self._cap else logits

    def run(self, x: Tensor, layer: int, start: int, positions: Sequence[int], edits: Mapping[str, Edit] | None = None) -> Tensor:  # fmt: skip
        """Logits [R, P, V] at `positions`, from the stream x [R, T - start, d] into `layer`, under `edits`."""
        with self.model.running, self.model.hooked(edits) if edits else nullcontext():
            for i in range(layer, len(self.layers)):
                x = self.call(i, x, start)
            return self.head(x[:, [p - start for p in positions]])
