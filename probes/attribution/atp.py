"""AtP*: attribution patching with the QK fix and GradDrop, for every node in a few passes (arXiv 2403.00745).

    exact   I(n) = L(clean run with n ← n(noise)) − L(clean)
    AtP     Î(n) = (n(noise) − n(clean)) · ∂L/∂n at the clean run          c(n) = E over pairs of |Î(n)|
    AtP*    Î with the QK fix for q and k, and c(n) = E of 1/(L − 1) Σ_l |Î_l(n)| over dropped layers l (GradDrop)

Scores are in the metric's units. The estimate ranks; `ExactPatching` verifies, `diagnose` bounds what was missed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cache.errors import DataError, UsageError
from cache.progress import progress
from probes.attribution.backward import LayerGradients, averaged, hooks_of, layer_gradients
from probes.attribution.case import Case, attention_hooks
from probes.attribution.metric import Target, as_metric
from probes.attribution.nodes import Block, NodeSpace, node_blocks
from probes.attribution.pairs import as_pairs
from probes.attribution.qk_fix import Attention, key_effects, pattern_gradient, query_effects
from probes.attribution.replay import tolerance

DEFAULT_NODES = ("q", "k", "v", "z")
BACKWARD_COST = 2.0
"""Forward-equivalents of a backward pass."""


@dataclass
class NodeScores:
    """Scores of all nodes of a space, over one pair or the mean over many."""

    space: NodeSpace
    score: np.ndarray
    """c(n): mean of absolute estimates, float64 [N]."""
    signed: np.ndarray
    """Mean of signed estimates (without GradDrop), float64 [N]."""
    n_pairs: int
    passes: float
    """Forward-equivalents spent for a pair: forwards, and two for each backward."""
    method: str
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Further columns, NaN where not measured: exact, exact_abs."""

    def order(self) -> np.ndarray:
        """Node ids, highest score first; ties in order of id."""
        return np.argsort(-self.score, kind="stable")

    def top(self, k: int) -> np.ndarray:
        return self.order()[:k]

    def frame(self, ids: np.ndarray | None = None) -> pd.DataFrame:
        """The tidy table: node, layer, kind, index, pos, hook, score, signed and what was measured."""
        ids = np.arange(len(self.space)) if ids is None else np.asarray(ids)
        out = self.space.frame(ids).assign(score=self.score[ids], signed=self.signed[ids])
        return out.assign(**{name: values[ids] for name, values in self.columns.items()})


class AtPStar:
    """Attribution patching of a model (a `cache.LanguageModel`) under a metric.

    nodes: kinds among q, k, v, z, mlp, resid, attn_out, mlp_out; `saes={hook: SAE}` adds features (with error=True also
    the error term as a node, with error=False the SAE takes its hook's place). positions: "each", or "sum" to patch a
    place at all positions together. batch: rows (pairs × dropped layers) of one backward pass, the cap on memory.
    """

    def __init__(
        self, model: Any, metric: Any = "logit_diff", nodes: Sequence[str] = DEFAULT_NODES, *,
        positions: str = "each", qk_fix: bool = True, grad_drop: bool = True, batch: int = 32,
        saes: Mapping[str, Any] | None = None, error: bool = True,
    ) -> None:  # fmt: skip
        if positions not in ("each", "sum"):
            raise UsageError(f"positions is 'each' or 'sum', not {positions!r}")
        self.model, self.metric, self.saes, self.error = model, as_metric(metric), dict(saes or {}), error
        self.summed, self.qk_fix, self.grad_drop = positions == "sum", qk_fix, grad_drop
        self.batch = max(1, batch)
        if grad_drop and model.n_layers < 2:
            raise UsageError(
                "GradDrop drops one layer of several and this model has one: use grad_drop=False"
            )
        self.blocks = node_blocks(model, tuple(nodes), self.saes, error=error)
        self._geometry: set[int] = set()
        self._checked = False

    @property
    def method(self) -> str:
        parts = [name for name, on in (("qk_fix", self.qk_fix), ("grad_drop", self.grad_drop)) if on]
        return "atp_star" if len(parts) == 2 else "+".join(["atp", *parts])

    @property
    def passes(self) -> float:
        """Forward-equivalents of a pair: noise and clean forward, the forward with gradients, backward; GradDrop is
        (L − 1) / 2 more backwards, the QK fix is none (two more products a layer)."""
        rows = 1 + (self.model.n_layers - 1) / 2 if self.grad_drop else 1
        return 3 + BACKWARD_COST * rows

    # ------------------------------------------------------------------ attribute

    def targets(self, clean: Any, noise: Any = None) -> list[Target]:
        """The pairs made ready: tokenised, aligned, with what the metric appends."""
        out = [self.metric.target(p) for p in as_pairs(clean, noise, self.model.tokenizer)]
        lengths = sorted({t.length for t in out})
        if len(lengths) > 1 and not self.summed:
            raise UsageError(
                f"pairs have {lengths[0]} to {lengths[-1]} tokens, so positions do not mean the same: "
                "use positions='sum', or pairs of one length"
            )
        return out

    def space(self, targets: Sequence[Target]) -> NodeSpace:
        return NodeSpace(self.blocks, max(t.length for t in targets), summed=self.summed)

    def attribute(self, clean: Any, noise: Any = None) -> NodeScores:
        """Scores over a PromptPair or a list of them: absolute values inside the mean, the signed mean beside it."""
        targets = self.targets(clean, noise)
        space = self.space(targets)
        score, signed = np.zeros(len(space)), np.zeros(len(space))
        # A batch of pairs is one forward; GradDrop multiplies its rows, so it takes few pairs at a time.
        step = max(1, self.batch // (self.model.n_layers if self.grad_drop else 1))
        with progress("attribution", len(targets), unit="pair") as bar:
            for i in range(0, len(targets), step):
                part = targets[i : i + step]
                one, both = self._batch(space, part)
                signed += one.sum(0)
                score += both.sum(0)
                bar.advance(len(part))
        n = len(targets)
        return NodeScores(space, score / n, signed / n, n, self.passes, self.method)

    def verify(self, scores: NodeScores, pairs: Any, top_k: int = 50) -> NodeScores:
        """The scores with the exact effect of the best `top_k` nodes beside them (`ExactPatching`)."""
        from probes.attribution.patching import verify

        return verify(self, scores, pairs, top_k)

    def diagnose(self, scores: NodeScores, pairs: Any, top_k: int = 50, **options: Any) -> list[Any]:
        """Bounds, pair by pair, on the effect of any node outside the best `top_k` (`probes.attribution.diagnose`)."""
        from probes.attribution.diagnose import diagnose
        from probes.attribution.patching import ExactPatching

        verified = scores.top(top_k)
        return [diagnose(ExactPatching(self, target), verified, **options) for target in self.targets(pairs)]

    def report(self, scores: NodeScores, pairs: Any, workspace: Any = None, **options: Any) -> Any:
        """Write the tables to `attributions/<run>/` of the workspace and return the folder."""
        from probes.attribution.report import write_attribution

        return write_attribution(self, scores, pairs, workspace, **options)

    def case(self, space: NodeSpace, targets: Sequence[Target], *, check: bool = True) -> Case:
        """Clean and noise runs of some targets with everything that estimates need."""
        extra = [h for layer in self._fixed_layers() for h in attention_hooks(self.model, layer).values()]
        if self.metric.needs_noise_logits:
            extra.append(f"blocks.{self.model.n_layers - 1}.hook_resid_post")
        return Case(
            self.model,
            space,
            targets,
            self.metric,
            saes=self.saes,
            error=self.error,
            extra=extra,
            check=check,
        )

    def _fixed_layers(self) -> list[int]:
        return sorted({b.layer for b in self.blocks if b.kind in "qk"}) if self.qk_fix else []

    def _batch(self, space: NodeSpace, targets: Sequence[Target]) -> tuple[np.ndarray, np.ndarray]:
        """Signed estimates and scores [B, N] of a batch."""
        with torch.no_grad():
            case = self.case(space, targets, check=not self._checked)
        self._checked = True
        fixed = set(self._fixed_layers())
        hooks = hooks_of(self.blocks)
        for layer in range(self.model.n_layers):
            more = [f"blocks.{layer}.attn.hook_z"] if layer in fixed else []
            if self.grad_drop:
                more += [f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out"]
            hooks[layer] = list(dict.fromkeys([*hooks.get(layer, []), *more]))
        out = [np.zeros((len(targets), len(space))) for _ in range(2)]
        for grads in layer_gradients(case, hooks, grad_drop=self.grad_drop, batch=self.batch):
            with torch.no_grad():
                self._layer(case, grads, out)
        return out[0], out[1]

    def _layer(self, case: Case, grads: LayerGradients, out: list[np.ndarray]) -> None:
        corrected: dict[str, Tensor] = {}
        if grads.layer in self._fixed_layers():
            corrected = self._corrected(case, grads)
        for number, block in enumerate(case.space.blocks):
            if block.layer != grads.layer:
                continue
            rows = corrected.get(block.kind)
            own = None
            if rows is None:
                rows = self._reduced(case, first_order(case, block, grads.at[block.hook]))
            if block.site.startswith("hook_resid") and self.grad_drop:
                own = self._reduced(case, first_order(case, block, grads.own))
            one = rows[0]
            both = (
                averaged(rows, own, block.layer, self.model.n_layers, block.site)
                if self.grad_drop
                else one.abs()
            )
            place = slice(case.space.offsets[number], case.space.offsets[number + 1])
            for array, value in zip(out, (one, both)):
                array[:, place] = padded(value, case.space.positions).flatten(1).double().cpu().numpy()

    def _reduced(self, case: Case, rows: Tensor) -> Tensor:
        """[R, B, T, n] without padding, summed over positions where asked."""
        rows = rows * case.real[None, :, :, None].to(rows)
        return rows.sum(2, keepdim=True) if self.summed else rows

    # --------------------------------------------------------------------- QK fix

    def _corrected(self, case: Case, grads: LayerGradients) -> dict[str, Tensor]:
        attention = self.attention(case, grads.layer)
        z = grads.at[f"blocks.{grads.layer}.attn.hook_z"]
        g = pattern_gradient(attention, z.unflatten(-1, (attention.q.shape[2], -1)))
        wanted = {b.kind for b in self.blocks if b.layer == grads.layer}
        effects = {"q": query_effects, "k": key_effects}
        return {kind: self._reduced(case, fn(attention, g)) for kind, fn in effects.items() if kind in wanted}

    def attention(self, case: Case, layer: int) -> Attention:
        """What the scores of a layer are made of, checked once a layer against the model's own head outputs."""
        names = attention_hooks(self.model, layer)
        text = self.model.hf.config.get_text_config()
        d_head = self.model.d_hook(names["z"]) // int(text.num_attention_heads)
        heads = {n: case.clean.acts[names[n]].unflatten(-1, (-1, d_head)) for n in "qkvz"}
        noise = {n: case.noise[names[n]].unflatten(-1, (-1, d_head)) for n in "qk"}
        module = _attention_module(self.model, layer)
        scale = float(getattr(module, "scaling", None) or d_head**-0.5)
        out = Attention(
            q=heads["q"], k=heads["k"], v=heads["v"], q_noise=noise["q"], k_noise=noise["k"], mask=case.clean.mask(layer),
            scale=scale, softcap=getattr(module, "attn_logit_softcapping", None),
        )  # fmt: skip
        if layer not in self._geometry:
            limit = 10 * tolerance(heads["z"].dtype)
            if not torch.allclose(out.output().to(heads["z"]), heads["z"], rtol=limit, atol=limit):
                raise DataError(
                    f"{self.model.name}: layer {layer} is not softmax attention as the QK fix knows it: qk_fix=False"
                )
            self._geometry.add(layer)
        return out


def first_order(case: Case, block: Block, grads: Tensor) -> Tensor:
    """Change times gradient, [R, B, T, n]."""
    change = case.change(block)
    work = torch.promote_types(grads.dtype, torch.float32)
    if block.kind == "sae":
        weights = case.saes[block.hook].W_dec.to(grads.device, work)
        return (grads.to(work) @ weights.T) * change
    return (grads.to(work).unflatten(-1, (block.n, -1)) * change.to(work)).sum(-1)


def padded(value: Tensor, positions: int) -> Tensor:
    """[B, T, n] with zeros up to `positions`."""
    return torch.nn.functional.pad(value, (0, 0, 0, positions - value.shape[1]))


def _attention_module(model: Any, layer: int) -> Any:
    attn = model._backend.bridge.blocks[layer].attn
    return getattr(attn, "original_component", attn)
