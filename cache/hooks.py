"""Names of the places in a model where activations are read and edited, in TransformerLens's grammar.

`blocks.{i}.hook_resid_pre`, `attn.hook_z` (heads concatenated), `hook_attn_out`, `hook_resid_mid`, `mlp.hook_in`,
`hook_mlp_out`, `hook_resid_post`. `module_sites` finds them in a plain Hugging Face decoder: each name is the
input or the output of one module. A model whose attention and MLP run in parallel has no `hook_resid_mid`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cache.errors import UsageError

Edit = Callable[[Tensor], Tensor | None]
"""What `hooked` takes: gets the activation [B, T, d], returns its replacement, or None to leave it."""

PROBE_TOKENS = 11
"""Length of the probe that finds hooks: a prime that no head count has, so that [B, T, …] is told from [B, H, …]."""


@dataclass(frozen=True)
class Site:
    """One hook as a module's input or output."""

    path: str
    """Dotted path of the module, as in `named_modules()`."""
    side: str
    """"input" or "output"."""


def resid_mid_block(name: str) -> str | None:
    """ "blocks.3" for "blocks.3.hook_resid_mid", None for any other hook."""
    block, _, rest = name.rpartition(".")
    return block if rest == "hook_resid_mid" else None


def flat(x: Tensor) -> Tensor:
    """[B, T, heads, d_head] as [B, T, heads · d_head]; [B, T, d] as it is."""
    return x.flatten(2) if x.ndim > 3 else x


def edited(x: Tensor, fn: Edit, name: str) -> Tensor | None:
    """`fn` applied to the flat form of `x`; the result has the shape and dtype of `x`, or is None."""
    y = fn(flat(x))
    if y is None:
        return None
    if y.shape != flat(x).shape:
        raise UsageError(
            f"the edit at {name} returned shape {tuple(y.shape)}, the activation is {tuple(flat(x).shape)}: "
            "return a tensor of the same shape, or None to leave it"
        )
    return y.reshape(x.shape).to(x.dtype)


def mid_edit(
    fn: Edit, name: str
) -> tuple[Callable[[Tensor], Tensor | None], Callable[[Tensor], Tensor | None]]:
    """An edit of the stream between attention and MLP, as (at the MLP's norm, at the block's output).

    The norm's input is past the place where the residual branches off, so replacing it there reaches the MLP only. The
    change itself is added to the block's output, which completes the edit: f(x) + mlp(f(x)) = (x + mlp(f(x))) + (f(x) − x).
    """
    change: list[Tensor] = []

    def replace(x: Tensor) -> Tensor | None:
        change.clear()
        y = edited(x, fn, name)
        if y is not None:
            change.append(y - x)
        return y

    def complete(x: Tensor) -> Tensor | None:
        return x + change.pop() if change else None

    return replace, complete


def _child(parent: nn.Module, *options: str) -> str | None:
    return next((o for o in options if isinstance(getattr(parent, o, None), nn.Module)), None)


def _blocks(hf: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(n, m) for n, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    named = [(n, m) for n, m in lists if n.rpartition(".")[2] in ("layers", "h", "blocks")]
    if not named:
        raise UsageError(
            f"{type(hf).__name__} has no list of decoder layers (layers, h or blocks): "
            "use backend='transformer_lens', which knows more architectures"
        )
    return min(named, key=lambda item: item[0].count("."))


def decoder_layers(hf: nn.Module) -> list[nn.Module]:
    """The decoder layers of a Hugging Face model, in order; UsageError where there is no such list."""
    return list(_blocks(hf)[1])


def module_sites(hf: nn.Module) -> dict[str, Site]:
    """Hook name → site, in the order of execution, for the usual pre-norm decoders."""
    prefix, blocks = _blocks(hf)
    sites: dict[str, Site] = {}
    for i, block in enumerate(blocks):
        path, hook = f"{prefix}.{i}", f"blocks.{i}"
        attn = _child(block, "self_attn", "attn", "attention")
        mlp = _child(block, "mlp", "feed_forward")
        if attn is None or mlp is None:
            raise UsageError(
                f"{type(block).__name__} has no attention or MLP that is known: use transformer_lens"
            )
        out_proj = _child(getattr(block, attn), "o_proj", "c_proj", "dense", "out_proj")
        # Gemma norms the outputs of both halves before adding them: what is added is the norm's output.
        sandwich = _child(block, "pre_feedforward_layernorm") is not None
        attn_out = f"{path}.post_attention_layernorm" if sandwich else f"{path}.{attn}"
        mlp_out = f"{path}.post_feedforward_layernorm" if sandwich else f"{path}.{mlp}"
        parallel = bool(getattr(getattr(hf, "config", None), "use_parallel_residual", False))
        second = _child(block, "pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
        sites[f"{hook}.hook_resid_pre"] = Site(path, "input")
        if out_proj:
            sites[f"{hook}.attn.hook_z"] = Site(f"{path}.{attn}.{out_proj}", "input")
        sites[f"{hook}.hook_attn_out"] = Site(attn_out, "output")
        if second and not parallel:
            sites[f"{hook}.hook_resid_mid"] = Site(f"{path}.{second}", "input")
        sites[f"{hook}.mlp.hook_in"] = Site(f"{path}.{mlp}", "input")
        sites[f"{hook}.hook_mlp_out"] = Site(mlp_out, "output")
        sites[f"{hook}.hook_resid_post"] = Site(path, "output")
    return sites


def probe_tokens(d_vocab: int, device: torch.device) -> Tensor:
    """int64 [2, PROBE_TOKENS]: two rows with the same first half, to see that no hook looks ahead."""
    n = PROBE_TOKENS
    first = torch.arange(n) * 7 % d_vocab
    second = first.clone()
    second[n // 2 :] = (torch.arange(n - n // 2) * 5 + 3) % d_vocab
    return torch.stack([first, second]).to(device)


def storable(x: Any) -> bool:
    """Whether a probe's activation is one vector per token."""
    return (
        isinstance(x, Tensor)
        and x.ndim in (3, 4)
        and tuple(x.shape[:2]) == (2, PROBE_TOKENS)
        and x.is_floating_point()
    )
