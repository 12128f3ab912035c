"""The backward pass of one clean run, layer by layer, for many rows of gradients at once: plain and GradDrop.

GradDrop stops the gradient through both residual writes of one layer (attention and MLP, all positions), for each layer
in turn, so that two paths that cancel are seen apart. A dropped layer hands the gradient of the stream on unchanged:
its row starts there as a copy of the undropped one. So layer l needs rows for the layers above it only (half of a batch
over all layers), and no forward pass is repeated. Rows go through in chunks of `batch` (arXiv 2403.00745 §3.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache.errors import DataError
from cache.hooks import Edit
from probes.attribution.case import Case
from probes.attribution.nodes import STREAM
from probes.attribution.replay import tolerance


@dataclass(frozen=True, kw_only=True)
class LayerGradients:
    """Gradients of one layer: row 0 undropped, then one row for each dropped layer above this one."""

    layer: int
    at: dict[str, Tensor]
    """Hook → [R, B, T, d]."""
    own: Tensor
    """[1, B, T, d]: the gradient at the stream into this layer when this layer itself is dropped."""


class _Graph:
    """One layer as a graph of its own: x in, named activations, y out."""

    def __init__(self, case: Case, layer: int, x: Tensor, hooks: Sequence[str]) -> None:
        self.x = x.detach().requires_grad_()
        self.acts: dict[str, Tensor] = {}
        with torch.enable_grad(), case.model.running, case.model.hooked({h: self._keep(h) for h in hooks}):
            self.y = case.clean.call(layer, self.x)

    def _keep(self, name: str) -> Edit:
        def see(x: Tensor) -> Tensor:
            # A copy at resid_mid: the bridge completes an edit there by the difference, which must have a gradient.
            self.acts[name] = x.clone() if name.endswith("hook_resid_mid") else x
            return self.acts[name]

        return see

    def gradients(self, rows: Tensor, batch: int, vectorised: bool) -> tuple[Tensor, dict[str, Tensor]]:
        names = list(self.acts)
        inputs = [self.x, *(self.acts[n] for n in names)]
        parts = [self._rows(inputs, part, vectorised) for part in rows.split(batch)]
        whole = [torch.cat(p) for p in zip(*parts)]
        return whole[0], dict(zip(names, whole[1:]))

    def _rows(self, inputs: list[Tensor], rows: Tensor, vectorised: bool) -> list[Tensor]:
        if vectorised:
            out = torch.autograd.grad(
                self.y, inputs, rows, retain_graph=True, is_grads_batched=True, materialize_grads=True
            )
            return list(out)
        each = [
            torch.autograd.grad(self.y, inputs, row, retain_graph=True, materialize_grads=True)
            for row in rows
        ]
        return [torch.stack(g) for g in zip(*each)]


def layer_gradients(case: Case, hooks: dict[int, list[str]], *, grad_drop: bool, batch: int) -> Iterator[LayerGradients]:  # fmt: skip
    """Gradients of the metric, last layer first. `hooks[layer]` are the activations to differentiate."""
    vectorised = not case.saes or case.error  # the SAE's own autograd Functions are not batched
    with case.spliced():
        graphs, x = [], case.clean.inputs[0]
        for layer in range(case.model.n_layers):
            graphs.append(_Graph(case, layer, x, hooks.get(layer, [])))
            x = graphs[-1].y.detach()
        rows = _output_gradient(case, x)[None]
        chunk = max(1, batch // len(case.targets))
        while graphs:
            graph = graphs.pop()
            if grad_drop:
                _check_writes(case, graph, len(graphs))
            below, at = graph.gradients(rows, chunk, vectorised)
            yield LayerGradients(layer=len(graphs), at=at, own=rows[:1])
            rows = (
                torch.cat([below, _handed_on(case, len(graphs), graph.x, rows[:1])]) if grad_drop else below
            )


def _handed_on(case: Case, layer: int, x: Tensor, rows: Tensor) -> Tensor:
    """Gradient [1, B, T, d] at the stream into a dropped layer: that behind it, but through an SAE in the stream's place."""
    if case.error or not any(h.startswith(f"blocks.{layer}.hook_resid_") for h in case.saes):
        return rows
    x = x.detach().requires_grad_()
    writes = [f"blocks.{layer}.{n}" for n in ("hook_attn_out", "hook_mlp_out")]
    with torch.enable_grad(), case.model.running, case.model.hooked(dict.fromkeys(writes, Tensor.detach)):
        y = case.clean.call(layer, x)
    return torch.autograd.grad(y, x, rows[0])[0][None]


def _output_gradient(case: Case, x: Tensor) -> Tensor:
    """∂(sum of the metrics)/∂(stream after the last layer)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        total = x.new_zeros(())
        for i, target in enumerate(case.targets):
            logits = case.clean.head(x[i : i + 1, list(target.positions)])
            total = total + case.values(logits, i)[0]
        return torch.autograd.grad(total, x)[0]


def _check_writes(case: Case, graph: _Graph, layer: int) -> None:
    """GradDrop takes y = x + attn_out + mlp_out as given."""
    names = [f"blocks.{layer}.{n}" for n in ("hook_attn_out", "hook_mlp_out")]
    if any(h.startswith(f"blocks.{layer}.") for h in case.saes) or any(n not in graph.acts for n in names):
        return
    with torch.no_grad():
        written, y = graph.x + graph.acts[names[0]] + graph.acts[names[1]], graph.y.detach()
        limit = tolerance(y.dtype)
        same = torch.allclose(written, y, rtol=limit, atol=limit * float(y.abs().max()))
    if not same:
        raise DataError(
            f"{case.model.name}: layer {layer} does not add attention and MLP to the stream as they are: "
            "use grad_drop=False"
        )


def averaged(rows: Tensor, own: Tensor | None, layer: int, n_layers: int, site: str) -> Tensor:
    """c = mean over dropped layers of |I_l|, from estimates [R, ...] of the rows that differ.

    Layers below leave row 0 as it is. A node that a layer writes is 0 when that layer is dropped (divisor L − 1); a
    site of the stream is not (divisor L): after the layer it has row 0, before it the gradient handed through.
    """
    total = rows[1:].abs().sum(0) + layer * rows[0].abs()
    if site == "hook_resid_post":
        return (total + rows[0].abs()) / n_layers
    if site in STREAM and own is not None:
        return (total + own[0].abs()) / n_layers
    return total / max(n_layers - 1, 1)


def hooks_of(blocks: Any) -> dict[int, list[str]]:
    """Layer → hooks of a list of blocks."""
    out: dict[int, list[str]] = {}
    for block in blocks:
        out.setdefault(block.layer, []).append(block.hook)
    return {layer: list(dict.fromkeys(names)) for layer, names in out.items()}
