"""What a splice does to the model's predictions: cross-entropy and KL per token, on held-out contexts.

    delta_ce = CE(spliced) - CE(clean), nats           delta_loss_pct = 100 * delta_ce / CE(clean)
    ce_recovered_<v> = (CE_v - CE_spliced) / (CE_v - CE_clean)      v: zero, or mean (of the train rows) in the row's place
    kl = mean over tokens of KL(P_clean || P_spliced), nats         kl_score_<v> = (KL_v - KL_spliced) / KL_v

A transcoder reads one hook and its output replaces another one of the same pass.

Position 0 is neither spliced nor ablated, and only targets whose source row was spliced count. Sums in float64;
intervals resample contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cache.errors import MissingDataError
from cache.progress import progress
from saes.metrics import bootstrap

BATCH_TOKENS = 1024
Reconstruct = Callable[[Tensor], tuple[Tensor, Any]]
ABLATIONS = ("zero", "mean")


def heldout_batches(corpus: Any, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out contexts, longest first, as padded (tokens int64 `[B, T]`, mask bool `[B, T]`); <= max_tokens tokens."""
    offsets, tokens, split = corpus.seq_offsets, corpus.column("tok"), corpus.column("split")
    chosen, total = [], 0
    for seq in np.flatnonzero(split[offsets[:-1]] == 1).tolist():
        length = int(offsets[seq + 1] - offsets[seq])
        # two tokens give no target with a spliced source
        if length < 3 or total + length > max_tokens:
            continue
        chosen.append(seq)
        total += length
    if not chosen:
        raise MissingDataError(
            f"no held-out context fits in max_tokens={max_tokens}: raise it, or build a larger corpus"
        )
    chosen.sort(key=lambda s: int(offsets[s] - offsets[s + 1]))
    while chosen:
        width = int(offsets[chosen[0] + 1] - offsets[chosen[0]])
        take = chosen[: max(1, BATCH_TOKENS // width)]
        chosen = chosen[len(take) :]
        ids = torch.zeros(len(take), width, dtype=torch.int64)
        mask = torch.zeros(len(take), width, dtype=torch.bool)
        for row, seq in enumerate(take):
            part = torch.from_numpy(tokens[offsets[seq] : offsets[seq + 1]].astype(np.int64))
            ids[row, : len(part)] = part
            mask[row, : len(part)] = True
        yield ids, mask


@torch.inference_mode()
def prediction_rows(
    subjects: list[Any], store: Any, model: Any, hook: str, max_tokens: int, *, out_hook: str = ""
) -> list[dict[str, Any]]:
    """Rows subject, metric, value, n, ci_low, ci_high of each subject (a `Reconstruct` with a name) and of the model.

    out_hook: where transcoders that read `hook` put their output.
    """
    place = out_hook or hook
    mean = torch.as_tensor(store.stats(place, split="train", skip="first").mean).float()
    variants: dict[str, Reconstruct | None] = {"clean": None}
    variants |= {s.name: s for s in subjects}
    variants |= {
        "zero": lambda x: (x.new_zeros(len(x), len(mean)), None),
        "mean": lambda x: (mean.to(x.device).expand(len(x), -1), None),
    }
    batches = list(heldout_batches(store.corpus, max_tokens))
    sums: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    with progress("evaluate", sum(int(mask.sum()) for _, mask in batches) * len(variants), unit="tok") as bar:
        for ids, mask in batches:
            clean: list[CleanContext] = []
            for name, fn in variants.items():
                logits = scored_logits(model, ids, mask, hook, fn, out_hook=out_hook)
                clean = clean or clean_contexts(logits, ids, mask)
                sums[name] += context_sums(logits, clean)
                bar.advance(int(mask.sum()))
    return _rows({name: np.stack(parts) for name, parts in sums.items()}, [s.name for s in subjects])


def scored_logits(
    model: Any, ids: Tensor, mask: Tensor, hook: str, fn: Reconstruct | None, *, out_hook: str = ""
) -> Tensor:
    """Logits `[B, T - 2, vocab]` of sources 1 .. T-2, with `fn` of the rows after position 0 in their place.

    With `out_hook`, fn of the rows at `hook` takes the place of those at `out_hook`, later in the same pass.
    """
    read: list[Tensor] = []

    def keep(x: Tensor) -> None:
        read[:] = [x]

    def splice(y: Tensor) -> Tensor:
        x = read[0] if out_hook else y
        new, _ = fn(x[:, 1:].reshape(-1, x.shape[-1]).float())  # type: ignore[misc]
        return torch.cat([y[:, :1], new.view_as(y[:, 1:]).to(y.dtype)], dim=1)

    ids, mask = ids.to(model.device), mask.to(model.device)
    edits: dict[str, Any] = {hook: keep, out_hook: splice} if out_hook else {hook: splice}
    with model.hooked({} if fn is None else edits):
        logits, _ = model.forward(ids, attention_mask=mask.long())
    # the sink's own prediction is not spliced and not scored, and the last token has no target
    return logits[:, 1:-1]


def context_losses(
    model: Any, ids: Tensor, mask: Tensor, hook: str, fn: Reconstruct | None
) -> list[np.ndarray]:
    """Losses in nats of the scored targets of each context."""
    logits, out = scored_logits(model, ids, mask, hook, fn), []
    for row, target, n in zip(logits, ids[:, 2:], mask[:, 2:].sum(1).tolist(), strict=True):
        loss = F.cross_entropy(row[:n].float(), target[:n].to(row.device), reduction="none")
        out.append(loss.detach().double().cpu().numpy())
    return out


class CleanContext(NamedTuple):
    """What one context predicts unspliced: target ids `[n]`, probabilities `[n, vocab]`, and sum p log p `[n]`."""

    target: Tensor
    p: Tensor
    negentropy: Tensor


def clean_contexts(logits: Tensor, ids: Tensor, mask: Tensor) -> list[CleanContext]:
    """From the logits of the clean pass; padding stands at the end of a context."""
    out = []
    for row, target, n in zip(logits, ids[:, 2:], mask[:, 2:].sum(1).tolist(), strict=True):
        log_p = F.log_softmax(row[:n].float(), dim=-1)
        p = log_p.exp()
        out.append(CleanContext(target[:n].to(row.device), p, _dot(p, log_p)))
    return out


def context_sums(logits: Tensor, clean: list[CleanContext]) -> list[np.ndarray]:
    """(targets, summed cross-entropy, summed KL from clean) of each context; one context at a time is held in float32.

    With z = logits - max: KL = sum p log p - sum p z + log sum exp z, one pass over the vocabulary for each term.
    """
    out = []
    for row, c in zip(logits, clean, strict=True):
        z = row[: len(c.target)].float()
        z = z - z.amax(dim=-1, keepdim=True)
        log_sum = z.logsumexp(dim=-1)
        loss = log_sum - z.gather(1, c.target[:, None])[:, 0]
        kl = c.negentropy - _dot(c.p, z) + log_sum
        out.append(np.array([len(loss), loss.double().sum().item(), kl.double().sum().item()]))
    return out


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, without a product of the size of both."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]


def _rows(sums: dict[str, np.ndarray], subjects: list[str]) -> list[dict[str, Any]]:
    """sums: per variant `[contexts, 3]` of targets, cross-entropy and KL."""
    n = int(sums["clean"][:, 0].sum())
    mean = {name: s[:, 1:].sum(0) / n for name, s in sums.items()}
    rows = [
        {"subject": "model", "metric": f"ce_{v}", "value": float(mean[v][0]), "n": n}
        for v in ("clean", *ABLATIONS)
    ]
    rows += [{"subject": "model", "metric": f"kl_{v}", "value": float(mean[v][1]), "n": n} for v in ABLATIONS]
    for name in subjects:
        # columns: targets, CE clean, CE spliced, KL spliced, then CE and KL of each ablation
        parts = [sums["clean"][:, :2], sums[name][:, 1:], *(sums[v][:, 1:] for v in ABLATIONS)]
        table = np.concatenate(parts, axis=1)
        for metric, value in _METRICS.items():
            low, high = bootstrap(table, value)
            rows.append({
                "subject": name, "metric": metric, "value": float(value(table.sum(0))), "n": n, "ci_low": low,
                "ci_high": high,
            })  # fmt: skip
    return rows


_N, _CLEAN, _CE, _KL = range(4)


def _recovered(at: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda t: (t[..., at] - t[..., _CE]) / (t[..., at] - t[..., _CLEAN])


def _kl_score(at: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda t: (t[..., at] - t[..., _KL]) / t[..., at]


_METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ce": lambda t: t[..., _CE] / t[..., _N],
    "delta_ce": lambda t: (t[..., _CE] - t[..., _CLEAN]) / t[..., _N],
    "delta_loss_pct": lambda t: 100 * (t[..., _CE] - t[..., _CLEAN]) / t[..., _CLEAN],
    "kl": lambda t: t[..., _KL] / t[..., _N],
}
for _i, _v in enumerate(ABLATIONS):
    _METRICS[f"ce_recovered_{_v}"] = _recovered(4 + 2 * _i)
    _METRICS[f"kl_score_{_v}"] = _kl_score(5 + 2 * _i)
