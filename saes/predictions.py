"""What a splice does to the model's predictions: cross-entropy and KL per token, on held-out contexts.

    delta_ce = CE(spliced) - CE(clean), nats           delta_loss_pct = 100 * delta_ce / CE(clean)
    ce_recovered_<v> = (CE_v - CE_spliced) / (CE_v - CE_clean)      v: zero, or mean (of the train rows) in the row's place
    kl = mean over tokens of KL(P_clean || P_spliced), nats         kl_score_<v> = (KL_v - KL_spliced) / KL_v

A transcoder reads one hook and its output replaces another one of the same pass.

Rows that are left out (position 0, unless told otherwise) are neither spliced nor ablated, and only targets whose source
row was spliced count. Sums in float64; intervals resample contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cache.errors import MissingDataError
from cache.filters import class_mask, row_class, row_classes
from cache.progress import progress
from saes.metrics import bootstrap

BATCH_TOKENS = 1024
Reconstruct = Callable[[Tensor], tuple[Tensor, Any]]
ABLATIONS = ("zero", "mean")


class Contexts(NamedTuple):
    """Padded contexts: tokens int64 `[B, T]`; bool `[B, T]`: which are there, and which of them are spliced."""

    ids: Tensor
    mask: Tensor
    kept: Tensor


def heldout_contexts(corpus: Any, max_tokens: int, skip: str | None = "first") -> Iterator[Contexts]:
    """Held-out contexts, longest first, of at most max_tokens tokens; rows that `skip` leaves out are not `kept`."""
    offsets, tokens, split = corpus.seq_offsets, corpus.column("tok"), corpus.column("split")
    flags, wanted = corpus.column("flags"), class_mask(row_classes(None, skip))
    for seqs in _batched(offsets, split, max_tokens):
        width = int(offsets[seqs[0] + 1] - offsets[seqs[0]])
        ids = torch.zeros(len(seqs), width, dtype=torch.int64)
        mask, kept = (torch.zeros(len(seqs), width, dtype=torch.bool) for _ in range(2))
        for row, seq in enumerate(seqs):
            at = slice(int(offsets[seq]), int(offsets[seq + 1]))
            n = at.stop - at.start
            ids[row, :n] = torch.from_numpy(tokens[at].astype(np.int64))
            mask[row, :n] = True
            kept[row, :n] = torch.from_numpy(wanted[row_class(flags[at], split[at])])
        yield Contexts(ids, mask, kept)


def heldout_batches(corpus: Any, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, mask) of `heldout_contexts`."""
    for batch in heldout_contexts(corpus, max_tokens):
        yield batch.ids, batch.mask


def _batched(offsets: np.ndarray, split: np.ndarray, max_tokens: int) -> Iterator[list[int]]:
    """Held-out sequences by falling length, as many at a time as BATCH_TOKENS padded tokens hold."""
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
        yield take


@torch.inference_mode()
def prediction_rows(
    subjects: list[Any],
    store: Any,
    model: Any,
    hook: str,
    max_tokens: int,
    *,
    out_hook: str = "",
    skip: str | None = "first",
) -> list[dict[str, Any]]:
    """Rows subject, metric, value, n, ci_low, ci_high of each subject (a `Reconstruct` with a name) and of the model.

    out_hook: where transcoders that read `hook` put their output. skip: rows that are neither spliced nor scored.
    """
    place = out_hook or hook
    mean = torch.as_tensor(store.stats(place, split="train", skip="first").mean).float()
    variants: dict[str, Reconstruct | None] = {"clean": None}
    variants |= {s.name: s for s in subjects}
    variants |= {
        "zero": lambda x: (x.new_zeros(len(x), len(mean)), None),
        "mean": lambda x: (mean.to(x.device).expand(len(x), -1), None),
    }
    batches = list(heldout_contexts(store.corpus, max_tokens, skip))
    sums: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    with progress("evaluate", sum(int(b.mask.sum()) for b in batches) * len(variants), unit="tok") as bar:
        for ids, mask, kept in batches:
            clean: list[CleanContext] = []
            for name, fn in variants.items():
                logits = scored_logits(model, ids, mask, hook, fn, out_hook=out_hook, kept=kept)
                clean = clean or clean_contexts(logits, ids, mask, kept)
                sums[name] += context_sums(logits, clean)
                bar.advance(int(mask.sum()))
    return _rows({name: np.stack(parts) for name, parts in sums.items()}, [s.name for s in subjects])


def scored_logits(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    hook: str,
    fn: Reconstruct | None,
    *,
    out_hook: str = "",
    kept: Tensor | None = None,
) -> Tensor:
    """Logits `[B, S, vocab]` of the last S sources but one, with `fn` of the `kept` rows in their place.

    kept: bool `[B, T]`, default all but position 0; S is T - 1 where a position 0 is among them, else T - 2. With `out_hook`,
    fn of the rows at `hook` takes the place of those at `out_hook`, later in the same pass.
    """
    read: list[Tensor] = []
    ids, mask = ids.to(model.device), mask.to(model.device)
    if kept is None:
        kept = torch.ones_like(mask)
        kept[:, 0] = False
    spliced = kept.to(model.device)

    def keep(x: Tensor) -> None:
        read[:] = [x]

    def splice(y: Tensor) -> Tensor:
        x = read[0] if out_hook else y
        new, _ = fn(x[spliced].float())  # type: ignore[misc]
        out = y.clone()
        out[spliced] = new.to(y.dtype)
        return out

    edits: dict[str, Any] = {hook: keep, out_hook: splice} if out_hook else {hook: splice}
    with model.hooked({} if fn is None else edits):
        logits, _ = model.forward(ids, attention_mask=mask.long())
    # the last token has no target; a sink that is not spliced is not scored
    return logits[:, 0 if bool(spliced[:, 0].any()) else 1 : -1]


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
    at: Any
    """Its scored rows among the logits of a context: a slice, or their places `[n]`."""


def clean_contexts(
    logits: Tensor, ids: Tensor, mask: Tensor, kept: Tensor | None = None
) -> list[CleanContext]:
    """From the logits of the clean pass; padding stands at the end of a context. kept: as for `scored_logits`."""
    out, sources = [], logits.shape[1]
    scored = mask[:, -sources:]
    if kept is not None:
        scored = scored & kept[:, -1 - sources : -1]
    for row, target, wanted in zip(logits, ids[:, -sources:], scored, strict=True):
        places = wanted.nonzero()[:, 0].to(row.device)
        at = slice(0, len(places)) if bool(wanted[: len(places)].all()) else places  # a slice copies nothing
        log_p = F.log_softmax(row[at].float(), dim=-1)
        p = log_p.exp()
        out.append(CleanContext(target[wanted].to(row.device), p, _dot(p, log_p), at))
    return out


def context_sums(logits: Tensor, clean: list[CleanContext]) -> list[np.ndarray]:
    """(targets, summed cross-entropy, summed KL from clean) of each context; one context at a time is held in float32.

    With z = logits - max: KL = sum p log p - sum p z + log sum exp z, one pass over the vocabulary for each term.
    """
    out = []
    for row, c in zip(logits, clean, strict=True):
        z = row[c.at].float()
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
    if not n:
        raise MissingDataError(
            "no held-out token is left to score: leave out fewer rows (skip), or raise max_tokens"
        )
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
