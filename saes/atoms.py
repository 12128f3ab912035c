"""`evaluate_atoms`: are an SAE's decoder rows atoms in the sense of arXiv 2509.20784? Measured beside its controls.

    q*       stability of unique sparse codes (saes/coherence.py) in the AIP of the train rows, at the L0s of held-out rows;
             its excess over random unit atoms and over a tight frame of the same shape at the same L0s is the figure
    R^2      1 - sum ||x - x_hat||^2 / sum ||x - x_mean||^2 on train and on held-out rows: memorised atoms keep the first
    pursuit  R^2 of the dictionary alone: matching pursuit with the SAE's mean L0, the same coder for every control
    l1       share of held-out codes that basis pursuit recovers exactly from their sum of atoms

Controls: random unit atoms (isotropic in the AIP), a tight frame (q* only), PCA, k-means centroids, with `topk` a TopK SAE
of the same width and L0, which is trained for it (saes/topk_control.py), and any SAEs given. R^2 leaves out attention sinks (rows of more than SINK_RATIO times the mean norm, which
hold most of the variance); `r2_all_*` has them. Whitened data of any kind has pairwise angles about 90 degrees:
`angle_centre` is a check of the estimate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache as memoise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.errors import DataError, MissingDataError, UsageError
from cache.progress import progress
from saes.aip import AIP, store_aip
from saes.codes import Codes
from saes.coherence import Coherence, coherence, largest_unique, q_star, random_unit, tight_frame, welch
from saes.evaluation import Evaluation, check_fit, save_evaluation
from saes.metrics import SINK_RATIO, Reconstruction
from saes.pursuit import matching_pursuit, recovers
from saes.sae import SAE
from saes.topk_control import matched_topk

PREFIX = "atoms:"
"""Subjects of these rows begin with it, so that other tables can leave them out."""
BATCH_ROWS = 4096
KMEANS_ROWS = 20_000
PURSUIT_WORK, PURSUIT_LEAST = 512 * 64**2, 16
"""Rows of matching pursuit times k^2, at most, and rows at least: past an L0 of 64 fewer are fitted."""
HISTOGRAM = 60
TAKEN = ("sae", "random", "pca", "kmeans", "tight-frame")
"""Subjects of their own; with `topk` topk-<k> too."""
Row = dict[str, Any]


@dataclass(frozen=True)
class _Sample:
    """Usual rows of one split, spread over its documents `[n, d_model]`."""

    name: str
    x: Tensor

    def thinned(self, n: int) -> _Sample:
        return _Sample(self.name, self.x[:: max(1, len(self.x) // n)][:n])

    def r2(self, x_hat: Tensor) -> float:
        spread = ((self.x - self.x.mean(0)).double() ** 2).sum()
        return 1 - float(((self.x - x_hat).double() ** 2).sum() / spread)


@dataclass(frozen=True)
class _Job:
    """What every subject is measured with."""

    store: Any
    hook: str
    aip: AIP
    samples: list[_Sample]
    max_rows: int
    recovery: int
    seed: int


def evaluate_atoms(
    sae: SAE,
    store: Any,
    *,
    beside: Mapping[str, SAE] | None = None,
    topk: bool = False,
    aip: AIP | None = None,
    max_rows: int = 50_000,
    pursuit_rows: int = 512,
    recovery: int = 16,
    seed: int = 0,
) -> Evaluation:
    """Measure a folded SAE's atoms on `store` and add the rows to its evaluation; subjects are `atoms:...`.

    beside: further SAEs by name. topk: also a TopK SAE of the same width and L0, subject `atoms:topk-<k>`, which is trained
    in the store's workspace unless it is there. aip: default that of the store's train rows. recovery: codes given to basis
    pursuit, a linear program each; 0 leaves it out. Raises DataError where the SAE does not fit the store.
    """
    for name in beside or {}:
        if name in TAKEN or (topk and re.fullmatch(r"topk-\d+", name)):
            raise UsageError(
                f"beside={name!r} is the name of the SAE itself or of a control: name the SAE otherwise"
            )
    subjects = {"sae": sae} | dict(beside or {})
    hook = _common_hook(subjects, store)
    aip = aip or store_aip(store, hook)
    if len(aip.root) != sae.cfg.d_model:
        raise DataError(
            f"the AIP has width {len(aip.root)}, the SAE d_model={sae.cfg.d_model}: leave it out, or estimate it on {hook}"
        )
    samples = [_sample(store, hook, split, pursuit_rows) for split in ("train", "heldout")]
    job = _Job(store, hook, aip, samples, max_rows, recovery, seed)
    control = matched_topk(sae, store) if topk else None
    if control is not None:
        subjects[f"topk-{control.k}"] = control.sae
    rows = [_row("sae", f"aip_{m}", aip.record[m], aip.record["rows"]) for m in _AIP_FIELDS]
    for name, one in subjects.items():
        found, l0, codes = _sae_rows(job, name, one)
        atoms = one.W_dec.detach().cpu()
        rows += found + _dictionary_rows(job, name, atoms, l0)
        if recovery:
            rows.append(_recovery(job, name, codes, aip.whiten(atoms.double()), signed=one.cfg.signed))
        if name == "sae":
            rows += _control_rows(job, one, l0, codes)
    return save_evaluation(sae, store, hook, rows)


def _common_hook(subjects: Mapping[str, SAE], store: Any) -> str:
    """The hook that all of them read, the first of them the SAE itself."""
    hook = ""
    for one in subjects.values():
        if one.cfg.transcoder:
            raise UsageError(
                f"{one.cfg.label} is a transcoder: atoms are of the rows that are rebuilt, give an SAE"
            )
        read = check_fit(one, store)
        if (hook := hook or read) != read:
            raise DataError(
                f"{one.cfg.label} reads {read}, the SAE that it stands beside {hook}: give SAEs of one hook"
            )
    return hook


_AIP_FIELDS = ("condition", "condition_ridged", "angle_centre", "angle_centre_euclid", "angle_change")


def _row(subject: str, metric: str, value: float, n: int, **more: Any) -> Row:
    return {"subject": PREFIX + subject, "metric": metric, "value": float(value), "n": int(n)} | more


def _sample(store: Any, hook: str, split: str, rows: int) -> _Sample:
    """Usual rows of a split, spread evenly over it."""
    stats, mean_norm = store.stats(hook, split=split, skip="first"), store.stats(hook).mean_norm
    step, first, kept = max(1, -(-stats.n // rows)), 0, []
    for batch in store.sequential(hook, batch_size=BATCH_ROWS, split=split, skip="first"):
        x = batch.x[hook].cpu()
        part = x[(-first) % step :: step]
        kept.append(part[part.norm(dim=1) <= SINK_RATIO * mean_norm])
        first += len(x)
    return _Sample(split, torch.cat(kept)[:rows])


# ---- SAEs ----


def _sae_rows(job: _Job, name: str, sae: SAE) -> tuple[list[Row], np.ndarray, Codes]:
    """R^2 on both splits; and of held-out rows the L0s `[rows]` and the codes of the first batch."""
    store, hook = job.store, job.hook
    rows: list[Row] = []
    held: list[Codes] = []
    l0 = np.zeros(0)
    limit = SINK_RATIO * store.stats(hook).mean_norm
    for split in ("train", "heldout"):
        usual, every, counts = _Fit(store, hook, job.aip), _Fit(store, hook), []
        with progress(f"atoms of {name}, {split}", job.max_rows, unit="tok") as bar:
            for batch in store.sequential(hook, batch_size=BATCH_ROWS, split=split, skip="first"):
                x = batch.x[hook].to(sae.W_enc.device)
                codes = sae.encode(x)
                x_hat, keep = sae.decode(codes), x.norm(dim=1) <= limit
                context = store.corpus.column("seq")[np.asarray(batch.row)]
                every.add(x, x_hat, context)
                usual.add(x[keep], x_hat[keep], context[keep.cpu().numpy()])
                counts.append(codes.l0().cpu().numpy())
                held = held or ([codes] if split == "heldout" else [])
                bar.advance(len(x))
                if every.plain.n >= job.max_rows:
                    break
        rows += usual.rows(name, "r2", split) + every.rows(name, "r2_all", split)
        l0 = np.concatenate(counts) if counts else np.zeros(0)
    if not held:
        raise MissingDataError("the store has no held-out rows: build the corpus from more documents")
    return [*rows, _row(name, "l0", l0.mean(), len(l0))], l0, held[0]


class _Fit:
    """R^2 in raw space, with an interval over contexts; with an AIP in whitened space too."""

    def __init__(self, store: Any, hook: str, aip: AIP | None = None) -> None:
        mean = torch.as_tensor(store.stats(hook, split="train", skip="first").mean)
        self.aip, self.plain = aip, Reconstruction(store.d(hook), mean)
        self.white = Reconstruction(store.d(hook))

    def add(self, x: Tensor, x_hat: Tensor, context: np.ndarray) -> None:
        self.plain.add(x, x_hat, None, context)
        if self.aip is not None:
            self.white.add(self.aip.whiten(x), self.aip.whiten(x_hat))

    def rows(self, name: str, metric: str, split: str) -> list[Row]:
        if not self.plain.n:
            return []
        low, high = self.plain.intervals().get("fvu", (None, None))
        ends = {} if low is None or high is None else {"ci_low": 1 - high, "ci_high": 1 - low}
        rows = [_row(name, f"{metric}_{split}", 1 - self.plain.values()["fvu"], self.plain.n, **ends)]
        if self.aip is not None:
            rows.append(_row(name, f"{metric}_aip_{split}", 1 - self.white.values()["fvu"], self.white.n))
        return rows


# ---- dictionaries ----


def _dictionary_rows(job: _Job, name: str, atoms: Tensor, l0: np.ndarray) -> list[Row]:
    """Coherence, q* and its excess at these L0s, and R^2 of matching pursuit with as many atoms as the mean L0."""
    n, d = atoms.shape
    white, plain = coherence(job.aip.whiten(atoms.double())), coherence(atoms)
    stable = q_star(white, l0)
    values = {
        "q_star": stable.q_star, "q_star_first_failure": stable.first_failure, "q_star_euclid": q_star(plain, l0).q_star,
        "coherence": white.largest, "coherence_median": float(white.quantile(0.5)), "welch": welch(n, d),
        "excess_random": stable.q_star - q_star(_random(n, d), l0).q_star,
    }  # fmt: skip
    if n >= d:
        values["excess_tight"] = stable.q_star - q_star(_tight(n, d), l0).q_star
    if n > d:
        values["welch_k"] = largest_unique(welch(n, d))
    rows = [_row(name, metric, value, len(l0)) for metric, value in values.items()]
    unit = torch.nn.functional.normalize(atoms.float(), dim=1)
    centre, k = job.samples[0].x.mean(0), max(1, round(float(l0.mean())))
    for whole in job.samples:
        s = whole.thinned(max(PURSUIT_LEAST, PURSUIT_WORK // k**2))
        fit = matching_pursuit(s.x - centre, unit, k) + centre
        rows.append(_row(name, f"pursuit_r2_{s.name}", s.r2(fit), len(s.x)))
    return [*rows, *_histogram(name, white)]


def _histogram(name: str, found: Coherence) -> list[Row]:
    """Pairs by log10 |cos|, in HISTOGRAM parts of the range that matters (above 1e-4)."""
    edges = np.log10(found.edges)
    counts, parts = np.histogram(edges[:-1], bins=HISTOGRAM, range=(-4.0, 0.0), weights=found.counts)
    return [
        _row(name, "coherence_count", c, found.pairs, lo=float(a), hi=float(b))
        for a, b, c in zip(parts, parts[1:], counts)
    ]


@memoise
def _random(n: int, d: int) -> Coherence:
    return coherence(random_unit(n, d, seed=0))


@memoise
def _tight(n: int, d: int) -> Coherence:
    return coherence(tight_frame(n, d, seed=0))


def _control_rows(job: _Job, sae: SAE, l0: np.ndarray, codes: Codes) -> list[Row]:
    """Dictionaries of the SAE's shape (PCA: d_model atoms) at its L0s."""
    n, d = sae.W_dec.shape
    white = random_unit(n, d, seed=job.seed + 1)
    controls = {
        "random": job.aip.unwhiten(white.double()),
        "pca": torch.linalg.eigh(job.aip.inverse)[1].T,
        "kmeans": kmeans_atoms(job.store, job.hook, n, seed=job.seed),
    }
    rows = []
    for name, atoms in controls.items():
        rows += _dictionary_rows(job, name, atoms, l0)
    if job.recovery:
        rows.append(_recovery(job, "random", codes, white, signed=sae.cfg.signed))
    if n >= d:
        rows.append(_row("tight-frame", "q_star", q_star(_tight(n, d), l0).q_star, len(l0)))
    return rows


def kmeans_atoms(store: Any, hook: str, n: int, *, seed: int = 0) -> Tensor:
    """Centroids `[n, d_model]` of usual train rows about their mean; as many as there are rows where n is more."""
    from sklearn.cluster import MiniBatchKMeans

    x = _sample(store, hook, "train", max(KMEANS_ROWS, n)).x
    x = x - x.mean(0)
    fit = MiniBatchKMeans(
        min(n, len(x)), batch_size=max(1024, n), n_init=1, max_iter=5, init="random", random_state=seed
    )
    return torch.as_tensor(fit.fit(x.numpy()).cluster_centers_).float()


def _recovery(job: _Job, name: str, codes: Codes, white: Tensor, *, signed: bool) -> Row:
    """Share of codes, drawn from rows with any atoms, that basis pursuit recovers; Clopper-Pearson interval."""
    from scipy.stats import binomtest

    rows = np.flatnonzero((codes.l0() > 0).cpu().numpy())
    if not len(rows):
        return _row(name, "l1_recovery", 0.0, 0)
    picked = np.random.default_rng(job.seed).choice(rows, size=min(job.recovery, len(rows)), replace=False)
    norm = torch.linalg.vector_norm(white.double(), dim=1).numpy()
    unit = white.double().numpy() / np.maximum(norm, 1e-300)[:, None]
    owner, ids, values = (t.reshape(-1).cpu().numpy() for t in (codes.rows(), codes.indices, codes.values))
    hits = 0
    with progress(f"l1 recovery of {name}", len(picked), unit="code") as bar:
        for row in picked:
            code = np.zeros(len(unit))
            code[ids[owner == row]] = values[owner == row]
            hits += recovers(code * norm, unit, signed=signed)
            bar.advance(1)
    ends = binomtest(hits, len(picked)).proportion_ci()
    return _row(
        name, "l1_recovery", hits / len(picked), len(picked), ci_low=float(ends.low), ci_high=float(ends.high)
    )
