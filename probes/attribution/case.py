"""A batch of prompt pairs on a model: the clean run that can be replayed, and what the noise run has at every node.

Pairs of different length are padded on the right, which a causal model never sees. SAEs are read, and where the error
term is off spliced in, through `saes.attach`; then the clean run, the noise run and every patched run are of the spliced
model. Position 0 is never spliced, so an SAE has no node there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from probes.attribution.metric import Metric, Target
from probes.attribution.nodes import Block, NodeSpace
from probes.attribution.replay import Replay

ROTATED = {"q": "hook_rot_q", "k": "hook_rot_k"}


def attention_hooks(model: Any, layer: int) -> dict[str, str]:
    """Hooks of q and k as the scores see them (after QK-norm and RoPE where there are any), v and z."""
    known = set(model.hook_names())
    out = {}
    for kind in "qkvz":
        name = f"blocks.{layer}.attn.{ROTATED.get(kind, f'hook_{kind}')}"
        out[kind] = name if name in known else f"blocks.{layer}.attn.hook_{kind}"
    return out


class Case:
    """Clean and noise run of B targets."""

    def __init__(
        self, model: Any, space: NodeSpace, targets: Sequence[Target], metric: Metric, *,
        saes: Mapping[str, Any] | None = None, error: bool = True, extra: Sequence[str] = (), check: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.space, self.metric = model, space, metric
        self.saes, self.error = dict(saes or {}), error
        self.lengths = torch.tensor([t.length for t in targets])
        clean, noise = (self._padded([getattr(t.pair, side) for t in targets]) for side in ("clean", "noise"))
        hooks = [*dict.fromkeys([*(b.hook for b in space.blocks), *extra])]
        self.clean, self.codes = self._run(clean, hooks, check)
        other, self.noise_codes = self._run(noise, hooks, False)
        self.noise = other.acts
        self.targets = [self._referenced(t, other, i) for i, t in enumerate(targets)]

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row)
            out[i, len(row) :] = row[-1]
        return out

    def spliced(self) -> AbstractContextManager[Any]:
        """The model with its SAEs in, where the error term is off."""
        if not self.saes or self.error:
            return nullcontext()
        from saes import attach

        return attach(self.model, self.saes, error=False)

    def _run(self, tokens: Tensor, hooks: Sequence[str], check: bool) -> tuple[Replay, dict[str, Tensor]]:
        if not self.saes:
            return Replay(self.model, tokens, hooks, check=check), {}
        from saes import attach

        with torch.no_grad(), attach(self.model, self.saes, error=self.error) as attached:
            run = Replay(self.model, tokens, hooks, check=check)
        codes = {}
        for hook, sae in self.saes.items():
            dense = attached.codes[hook].dense(sae.cfg.d_sae).unflatten(0, (len(tokens), -1))
            codes[hook] = torch.nn.functional.pad(dense, (0, 0, tokens.shape[1] - dense.shape[1], 0))
        return run, codes

    def _referenced(self, target: Target, noise: Replay, row: int) -> Target:
        if not self.metric.needs_noise_logits:
            return target
        x = noise.acts[f"blocks.{self.model.n_layers - 1}.hook_resid_post"][row : row + 1]
        logits = noise.head(x[:, list(target.positions)])
        return Target(
            pair=target.pair,
            positions=target.positions,
            reference=logits[0].detach().float().log_softmax(-1),
        )

    @property
    def real(self) -> Tensor:
        """bool [B, T], false at padding."""
        return torch.arange(self.clean.tokens.shape[1])[None] < self.lengths[:, None]

    def change(self, block: Block) -> Tensor:
        """What patching the nodes of a block adds: [B, T, n, d], for features [B, T, n] codes."""
        if block.kind == "sae":
            return self.noise_codes[block.hook] - self.codes[block.hook]
        delta = self.noise[block.hook] - self.clean.acts[block.hook]
        if block.kind == "sae_error":
            sae = self.saes[block.hook]
            explained = (self.noise_codes[block.hook] - self.codes[block.hook]) @ sae.W_dec
            delta = delta - explained.to(delta.dtype)
            if self.clean.tokens.shape[1]:
                delta[:, 0] = 0
        return delta.unflatten(-1, (block.n, -1))

    def values(self, logits: Tensor, row: int = 0) -> Tensor:
        """The metric [R] of logits [R, P, V] of the pair `row`."""
        return self.metric(logits, self.targets[row])

    @torch.no_grad()
    def baseline(self, row: int = 0) -> float:
        """The metric on the clean run."""
        with self.spliced():
            layer = self.model.n_layers - 1
            logits = self.clean.run(
                self.clean.inputs[layer][row : row + 1], layer, 0, self.targets[row].positions
            )
        return float(self.values(logits, row)[0])
