"""Run a model over a corpus once and keep its activations.

A shard is a range of sequences. Within it, sequences are sorted by length and cut into batches of about
`batch_tokens` padded tokens; the vectors of the real tokens are checked, cast on the device and put at their place
in (seq, pos) order. A full shard goes to the writer thread. (hook, shard) pairs that are committed are skipped, so
a harvest that was stopped, killed, or asked for one more hook does only what is missing. One process at a time harvests a
hook: it holds a lock, which goes with the process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from cache.corpus import Corpus
from cache.errors import DataError, UsageError
from cache.progress import progress
from cache.protocol import HookedModel
from cache.store import ActivationStore
from cache.workspace import only_one
from cache.writer import TORCH_DTYPE

BATCH_TOKENS = 2048
AUTO_FP16_BELOW = 32_000.0
"""`dtype="auto"` stores fp16 if a probe of the model stays below this (half of the fp16 limit), else bf16."""
PROBE_TOKENS = 512


if TYPE_CHECKING:
    from cache.estimate import Estimate


@dataclass(frozen=True)
class PlannedBatch:
    """One forward pass: tokens padded on the right, and where its real tokens belong."""

    tokens: Tensor
    """int64 [B, T]."""
    source: Tensor
    """int64 [n]: index of each real token in the flattened [B · T]."""
    rows: Tensor
    """int64 [n]: row id of each real token, aligned with `source`."""
    width: int
    """T: rows that the model must give for each context."""

    def real(self, x: Tensor, hook: str) -> Tensor:
        """The rows [n, d] of an activation [B, T, d] that are of real tokens."""
        if x.shape[1] != self.width:
            raise UsageError(
                f"{hook} has {x.shape[1]} rows a context, the table has {self.width}: build one for this hook with "
                f"build_contexts(inputs, rows={x.shape[1]})"
            )
        return x.flatten(0, 1).index_select(0, self.source.to(x.device))


def plan_batches(corpus: Corpus, seq0: int, seq1: int, batch_tokens: int) -> Iterator[PlannedBatch]:
    """Batches that cover sequences seq0 … seq1 − 1, shortest first."""
    if getattr(corpus, "inputs", None) is not None:
        yield from _plan_contexts(corpus, seq0, seq1, batch_tokens)
        return
    offsets, tok = corpus.seq_offsets, corpus.column("tok")
    lengths = np.diff(offsets[seq0 : seq1 + 1])
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        # Sorted by length: the last sequence of a batch is its width.
        while end < len(order) and lengths[order[end]] * (end + 1 - start) <= batch_tokens:
            end += 1
        chosen, width = order[start:end], int(lengths[order[end - 1]])
        tokens = np.zeros((len(chosen), width), dtype=np.int64)
        source, rows = [], []
        for b, i in enumerate(chosen):
            row0, n = int(offsets[seq0 + i]), int(lengths[i])
            tokens[b, :n] = tok[row0 : row0 + n]
            source.append(np.arange(n) + b * width)
            rows.append(np.arange(row0, row0 + n))
        yield PlannedBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(np.concatenate(source)),
            torch.from_numpy(np.concatenate(rows)),
            width,
        )
        start = end


def _plan_contexts(corpus: Corpus, seq0: int, seq1: int, batch_tokens: int) -> Iterator[PlannedBatch]:
    """Inputs of a table of contexts, which all have the same number of rows."""
    inputs, width = corpus.inputs, corpus.context
    assert inputs is not None
    step = max(1, batch_tokens // width)
    for a in range(seq0, seq1, step):
        b = min(a + step, seq1)
        tokens = torch.from_numpy(np.array(inputs[a:b]))
        yield PlannedBatch(tokens, torch.arange((b - a) * width), torch.arange(a * width, b * width), width)


@overload
def harvest(
    model: HookedModel,
    corpus: Corpus,
    *,
    hooks: str | Sequence[str],
    workspace: str | os.PathLike[str] | None = ...,
    batch_tokens: int = ...,
    rows_per_shard: int | None = ...,
    dtype: str = ...,
    show_progress: bool = ...,
    dry_run: Literal[False] = ...,
) -> ActivationStore: ...


@overload
def harvest(
    model: HookedModel,
    corpus: Corpus,
    *,
    hooks: str | Sequence[str],
    workspace: str | os.PathLike[str] | None = ...,
    batch_tokens: int = ...,
    rows_per_shard: int | None = ...,
    dtype: str = ...,
    show_progress: bool = ...,
    dry_run: Literal[True],
) -> Estimate: ...


def harvest(
    model: HookedModel,
    corpus: Corpus,
    *,
    hooks: str | Sequence[str],
    workspace: str | os.PathLike[str] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    rows_per_shard: int | None = None,
    dtype: str = "auto",
    show_progress: bool = True,
    dry_run: bool = False,
) -> ActivationStore | Estimate:
    """Store the activations of `model` at `hooks` for every token of `corpus`; resumes.

    `dtype` is fp16, bf16, fp32 or auto. With `dry_run` nothing is stored, and an `Estimate` of what is missing comes
    back: tokens, disk, peak memory and seconds. `store.last_run` tells tokens, seconds, forward_seconds and write_seconds
    (the writer's thread, in parallel to the model). Raises AtomscopeError where another process harvests one of the hooks.
    """
    started = time.monotonic()
    wanted = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
    check_request(model, corpus, wanted, batch_tokens, dtype)
    identity = store_identity(model, corpus)
    if dry_run:
        from cache.estimate import estimate

        return estimate(
            model, corpus, wanted, identity=identity, workspace=workspace, batch_tokens=batch_tokens,
            rows_per_shard=rows_per_shard, dtype=dtype,
        )  # fmt: skip
    store = ActivationStore.create(
        workspace, identity, corpus, rows_per_shard=rows_per_shard, model_source=model.source
    )
    _known_dtypes(store, wanted, dtype)  # refuses another one before anything else
    store.last_run = {"tokens": 0, "seconds": 0.0, "forward_seconds": 0.0, "write_seconds": 0.0}
    with ExitStack() as held:
        for hook in sorted(h for h, shards in _missing(store, wanted).items() if shards):
            # not the hook's own folder, which all writers share (cache/writer.py)
            lock = store.path / "locks" / store.folder(hook).name
            held.enter_context(only_one(lock, f"{hook} is being harvested"))
            store.records(hook, refresh=True)  # another process may have added to it until just now
        _fill(model, store, wanted, _known_dtypes(store, wanted, dtype), batch_tokens, show_progress)
    if store.last_run["tokens"]:
        store.last_run["seconds"] = time.monotonic() - started
    return store


def _missing(store: ActivationStore, hooks: list[str]) -> dict[str, set[int]]:
    """Shards that are not committed, of each hook."""
    return {h: set(range(len(store.shards))) - store.committed(h) for h in hooks}


def _fill(
    model: HookedModel,
    store: ActivationStore,
    wanted: list[str],
    dtypes: dict[str, torch.dtype],
    batch_tokens: int,
    show_progress: bool,
) -> None:
    """Harvest what is missing, and say in `store.last_run` what that took."""
    missing, corpus = _missing(store, wanted), store.corpus
    todo = [s for s in range(len(store.shards)) if any(s in missing[h] for h in wanted)]
    if not todo:
        return
    probed = [h for h in wanted if h not in dtypes]
    dtypes = dtypes | probed_dtypes(model, corpus, store.shards[todo[0]][:2], probed)
    rows = sum(store.shards[s][3] - store.shards[s][2] for s in todo)
    done = corpus.n_tokens - rows
    shown = progress("harvest", corpus.n_tokens, unit="tok", done=done) if show_progress else nullcontext()
    forward_seconds, pending, room = 0.0, 0, _Buffers(store, todo)
    with shown as bar, store.writer() as writer:
        for number, shard in enumerate(todo, 1):
            if bar is not None:
                bar.note(f"shard {number}/{len(todo)}")
            here = {h: dtypes[h] for h in wanted if shard in missing[h]}
            tick = None if bar is None else bar.advance
            writer.wait(pending)  # of the shard before; the buffers of the one before that are free
            out = room.take(shard, {h: (model.d_hook(h), t) for h, t in here.items()})
            values, seconds = run_shard(model, store, shard, here, batch_tokens, tick, out)
            forward_seconds, pending = forward_seconds + seconds, len(values)
            for hook, x in values.items():
                writer.submit(shard, hook, x)
    store.last_run |= {"tokens": rows, "forward_seconds": forward_seconds, "write_seconds": writer.seconds}


class _Buffers:
    """Two sets of vectors in turn, one filled while the other is written: the memory of a harvest has a bound."""

    def __init__(self, store: ActivationStore, todo: Sequence[int]) -> None:
        self._shards = store.shards
        self._rows = max(store.shards[s][3] - store.shards[s][2] for s in todo)
        self._sets: list[dict[str, Tensor]] = [{}, {}]

    def take(self, shard: int, shapes: dict[str, tuple[int, torch.dtype]]) -> dict[str, Tensor]:
        """Room for one shard, [rows, d] per hook."""
        self._sets.reverse()
        mine, rows = self._sets[0], self._shards[shard][3] - self._shards[shard][2]
        for hook, (d, dtype) in shapes.items():
            if hook not in mine:
                mine[hook] = torch.empty(self._rows, d, dtype=dtype)
        return {hook: mine[hook][:rows] for hook in shapes}


def run_shard(
    model: HookedModel,
    store: ActivationStore,
    shard: int,
    dtypes: dict[str, torch.dtype],
    batch_tokens: int,
    tick: Callable[[int], None] | None = None,
    out: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Vectors of one shard, [rows, d] per hook on the CPU, and the seconds spent in the model.

    `tick` is called with the number of tokens after every batch; `out` is memory to use, [rows, d] per hook.
    """
    seq0, seq1, row0, row1 = store.shards[shard]
    if out is None:
        out = {h: torch.empty(row1 - row0, model.d_hook(h), dtype=t) for h, t in dtypes.items()}
    seconds = 0.0
    for batch in plan_batches(store.corpus, seq0, seq1, batch_tokens):
        began = time.monotonic()
        acts = _capture(model, batch.tokens, list(dtypes))
        seconds += time.monotonic() - began
        for hook, x in acts.items():
            x = batch.real(x, hook)
            _refuse_bad(x, batch.rows, hook, dtypes[hook], store.corpus)
            out[hook][batch.rows - row0] = x.to(dtypes[hook]).cpu()
        if tick is not None:
            tick(len(batch.rows))
    return out, seconds


def _capture(model: HookedModel, tokens: Tensor, hooks: list[str]) -> dict[str, Tensor]:
    """Activations of the model as it is loaded; what an edit changes is another model's."""
    with model.running:
        if model.edits_open:
            raise UsageError(
                f"{model.name} is edited or spliced at the moment: leave that `with` block before harvesting"
            )
        return model.capture(tokens, hooks)


def store_identity(model: HookedModel, corpus: Corpus) -> dict[str, Any]:
    """Everything that determines the activations of `model` over `corpus`."""
    return model.identity | {
        "corpus": corpus.fingerprint,
        "context": corpus.context,
        "prepend_bos": bool(corpus.meta["prepend_bos"]),
    }


def check_request(
    model: HookedModel, corpus: Corpus, hooks: list[str], batch_tokens: int, dtype: str
) -> None:
    """Refuse what a harvest of these hooks could not do."""
    if not hooks:
        raise UsageError("no hooks to harvest: name at least one, e.g. 'blocks.0.hook_resid_post'")
    for name in hooks:
        model.check_hook(name)
    if dtype != "auto" and dtype not in TORCH_DTYPE:
        raise UsageError(f"no store dtype {dtype!r}: choose auto, {', '.join(TORCH_DTYPE)}")
    if batch_tokens < 1:
        raise UsageError(f"batch_tokens is {batch_tokens}: give at least 1")
    if corpus.inputs is not None and model.identity["backend"] != "module":
        raise UsageError(
            f"{corpus.meta['name']!r} is a table of contexts for a module, {model.name} takes text: use build_corpus"
        )
    if corpus.inputs is None and model.identity["tokenizer_sha256"] is None:
        raise UsageError(
            f"{model.name} has no tokenizer: give it contexts, or name its tokenizer in load_module(tokenizer=…)"
        )
    if corpus.inputs is None and corpus.meta["tokenizer_sha256"] != model.identity["tokenizer_sha256"]:
        raise DataError(
            f"the corpus {corpus.meta['name']!r} was tokenised by another tokenizer than {model.name}'s: "
            "build it again with model.tokenizer"
        )
    if model.max_context is not None and corpus.context > model.max_context:
        raise UsageError(
            f"the corpus has a context of {corpus.context} tokens, {model.name} takes {model.max_context}: "
            f"build it with context={model.max_context} or less"
        )


def _known_dtypes(store: ActivationStore, hooks: list[str], dtype: str) -> dict[str, torch.dtype]:
    """Store dtype of the hooks that have one already; of all of them if one was asked for."""
    out: dict[str, torch.dtype] = {}
    for hook in hooks:
        stored = store.dtype(hook) if store.committed(hook) else None
        if stored is not None and dtype not in ("auto", stored):
            raise UsageError(
                f"{hook} is stored as {stored} in {store.path}, not {dtype}: "
                f"go on with dtype={stored!r}, or delete {store.folder(hook)}"
            )
        if stored is not None or dtype != "auto":
            out[hook] = TORCH_DTYPE[stored or dtype]
    return out


def probed_dtypes(
    model: HookedModel, corpus: Corpus, seqs: tuple[int, int], hooks: list[str]
) -> dict[str, torch.dtype]:
    """fp16 for the hooks whose probe, of some sequences `seqs`, leaves enough room, else bf16."""
    if not hooks:
        return {}
    # The longest sequences: short ones do not show how far a stream can go.
    *_, batch = plan_batches(corpus, *seqs, PROBE_TOKENS)
    out: dict[str, torch.dtype] = {}
    for hook, x in _capture(model, batch.tokens, hooks).items():
        x = batch.real(x, hook)
        _refuse_bad(x, batch.rows, hook, torch.float32, corpus)
        out[hook] = torch.float16 if float(x.abs().max()) < AUTO_FP16_BELOW else torch.bfloat16
    return out


def _refuse_bad(x: Tensor, rows: Tensor, hook: str, dtype: torch.dtype, corpus: Corpus) -> None:
    """DataError that names the first value which is NaN, infinite or too large for `dtype`."""
    limit = torch.finfo(dtype).max
    low, high = (float(v) for v in torch.aminmax(x))
    if -limit <= low and high <= limit:  # false for NaN too
        return
    bad = ~(x.abs() <= limit).all(dim=1).cpu()
    row = int(rows[bad].min())
    at = int((rows == row).nonzero()[0])
    doc, pos = int(corpus.column("doc")[row]), int(corpus.column("pos")[row])
    place = f"{hook}: doc {doc}, position {pos} (row {row})"
    if not bool(x[at].isfinite().all()):
        raise DataError(f"{place} is NaN or infinite before storing: check the weights and the forward dtype")
    peak = float(x[at].abs().max())
    name = next(k for k, v in TORCH_DTYPE.items() if v == dtype)
    raise DataError(
        f"{place} reaches {peak:.4g}, too large for {name} (max {limit:.4g}): harvest with dtype='bf16'"
    )


def bare_forward_rate(
    model: HookedModel,
    corpus: Corpus,
    hooks: str | Sequence[str],
    n_batches: int | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    rows_per_shard: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Tokens per second of the forward passes alone: the batches of a harvest, with early stop and no store.

    `n_batches` of them, evenly spaced over the first shard (all of all shards by default).
    """
    from cache.store import ROWS_PER_SHARD, plan_shards

    wanted = [hooks] if isinstance(hooks, str) else list(hooks)
    shards = plan_shards(corpus.seq_offsets, rows_per_shard or ROWS_PER_SHARD)
    chosen: list[Any] = []
    for seq0, seq1, _, _ in shards if n_batches is None else shards[:1]:
        chosen += plan_batches(corpus, seq0, seq1, batch_tokens)
    if n_batches is not None and n_batches < len(chosen):
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, n_batches).round().astype(int)]
    began = clock()
    for batch in chosen:
        model.capture(batch.tokens, wanted)
    return sum(len(b.rows) for b in chosen) / (clock() - began)
