"""Harvest: every stored row is the model's activation at its own token, and an interruption costs no shard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cache.writer
from cache import ActivationStore, Corpus, LanguageModel, build_corpus, harvest, load_model
from cache.errors import AtomscopeError, DataError, MissingDataError, UsageError
from cache.harvesting import bare_forward_rate, plan_batches
from tests.tiny import SENTENCES

POST = "blocks.1.hook_resid_post"
HOOKS = ["blocks.0.hook_mlp_out", POST, "blocks.2.attn.hook_z"]
OPTIONS: dict[str, Any] = {"rows_per_shard": 150, "batch_tokens": 64, "show_progress": False}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents of very different lengths, some longer than the context of 24."""
    made = [" ".join(SENTENCES[i : i + 1 + i % 5]) for i in range(0, 60, 2)]
    return [*made[:-4], "The fox counted 3 × 4 hens in the old mill.", *made[-4:]]


@pytest.fixture
def corpus(tiny_model: LanguageModel, texts: list[str], tmp_path: Path) -> Corpus:
    return build_corpus(texts, tiny_model.tokenizer, workspace=tmp_path, context=24)


def expected_rows(model: LanguageModel, corpus: Corpus, hook: str) -> Tensor:
    """One unbatched forward pass per sequence, read by a hook of PyTorch's own."""
    hf: Any = model.hf
    layers = hf.model.layers
    got: list[Tensor] = []
    if hook.endswith("hook_z"):
        handle = layers[2].self_attn.o_proj.register_forward_pre_hook(
            lambda _, a: got.append(a[0].flatten(2))
        )
    else:
        module = layers[0].mlp if "mlp" in hook else layers[1]
        handle = module.register_forward_hook(lambda _, __, o: got.append(o))
    tok, at = corpus.column("tok"), corpus.seq_offsets
    with torch.no_grad():
        for a, b in pairwise(at):
            hf(torch.tensor(tok[a:b].astype(np.int64))[None])
    handle.remove()
    return torch.cat([g[0] for g in got])


def all_rows(store: ActivationStore, hook: str) -> Tensor:
    return store.rows(hook, ids=range(store.corpus.n_tokens))


def files(store: ActivationStore) -> dict[str, tuple[int, bytes]]:
    """Time of writing and content of every file under acts/."""
    found = sorted(p for p in (store.path / "acts").rglob("*") if p.is_file())
    return {str(p.relative_to(store.path)): (p.stat().st_mtime_ns, p.read_bytes()) for p in found}


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("mode", ["document", "packed"])
@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_each_row_is_the_activation_at_its_own_token(
    backend: str, mode: str, tiny_dir: Path, texts: list[str], tmp_path: Path
) -> None:
    model = load_model(tiny_dir, backend=backend, device="cpu")
    corpus = build_corpus(texts, model.tokenizer, workspace=tmp_path, context=24, mode=mode)
    store = harvest(model, corpus, hooks=HOOKS, workspace=tmp_path, dtype="fp32", **OPTIONS)
    assert len(store.shards) > 3 and store.last_run["tokens"] == corpus.n_tokens
    for hook in HOOKS:
        want, got = expected_rows(model, corpus, hook), all_rows(store, hook)
        assert store.complete(hook) and store.dtype(hook) == "fp32" and store.d(hook) == model.d_hook(hook)
        assert float(((got - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-9)).max()) < 1e-5
    assert store.verify() == []
    assert not list((tmp_path / "_tmp").iterdir())


def test_stored_precision_is_that_of_the_dtype(
    tiny_model: LanguageModel, corpus: Corpus, tmp_path: Path
) -> None:
    want = expected_rows(tiny_model, corpus, POST)
    for dtype, torch_dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        store = harvest(tiny_model, corpus, hooks=POST, workspace=tmp_path / dtype, dtype=dtype, **OPTIONS)
        eps = torch.finfo(torch_dtype).eps
        assert torch.allclose(all_rows(store, POST), want, rtol=eps, atol=eps * float(want.abs().max()))
        assert store.dtype(POST) == dtype


@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=40),
    batch_tokens=st.integers(1, 200),
    cut=st.integers(0, 39),
)
@settings(deadline=None)
def test_batches_hold_every_token_once_at_its_place(lengths: list[int], batch_tokens: int, cut: int) -> None:
    class Table:
        seq_offsets = np.concatenate([[0], np.cumsum(lengths)])

        def column(self, _: str) -> np.ndarray:
            return np.arange(1, sum(lengths) + 1, dtype=np.int32)  # row r holds token r + 1; 0 is padding

    first = min(cut, len(lengths) - 1)
    seen: list[int] = []
    for batch in plan_batches(Table(), first, len(lengths), batch_tokens):  # type: ignore[arg-type]
        assert torch.equal(batch.tokens.flatten()[batch.source], batch.rows + 1)
        assert int((batch.tokens > 0).sum()) == len(batch.rows)
        assert batch.tokens.numel() <= batch_tokens or len(batch.tokens) == 1
        for row in batch.tokens:  # padding is on the right, and a row is one sequence
            real = row[row > 0]
            assert torch.equal(row[: len(real)], real) and int(real[0]) - 1 in Table.seq_offsets
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(int(Table.seq_offsets[first]), sum(lengths)))


# ------------------------------------------------------------------------------------------------- resume


def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Record which (shard, hook) pairs are handed to the writer."""
    seen: list[tuple[int, str]] = []
    real = cache.writer.ShardWriter.submit

    def submit(self: Any, shard: int, hook: str, x: Any) -> None:
        seen.append((shard, hook))
        real(self, shard, hook, x)

    monkeypatch.setattr(cache.writer.ShardWriter, "submit", submit)
    return seen


def test_an_interrupted_harvest_writes_only_what_is_missing(
    tiny_model: LanguageModel, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = LanguageModel.capture, 0

    def interrupted(self: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            harvest(tiny_model, corpus, hooks=HOOKS[:2], workspace=tmp_path, **OPTIONS)
    (path,) = ActivationStore.find_all(tmp_path)
    store = ActivationStore.open(path)
    done = store.committed(POST)
    assert 0 < len(done) < len(store.shards)
    with pytest.raises(MissingDataError, match="harvest"):
        store.require_complete(POST)
    before = files(store)
    seen = submitted(monkeypatch)
    store = harvest(tiny_model, corpus, hooks=HOOKS[:2], workspace=tmp_path, **OPTIONS)
    missing = set(range(len(store.shards))) - done
    assert sorted(seen) == sorted((s, h) for s in missing for h in HOOKS[:2])
    assert store.last_run["tokens"] == sum(store.shards[s][3] - store.shards[s][2] for s in missing)
    after = files(store)
    assert {k: after[k] for k in before} == before
    whole = harvest(tiny_model, corpus, hooks=HOOKS[:2], workspace=tmp_path / "whole", **OPTIONS)
    for hook in HOOKS[:2]:
        assert torch.equal(all_rows(store, hook), all_rows(whole, hook))


_CHILD = """
import os, signal, sys, time
from itertools import pairwise
from pathlib import Path
import cache.records
from cache import LanguageModel, Corpus, harvest, load_model

folder, model, corpus, where = sys.argv[1:]
def die():
    os.kill(os.getpid(), signal.SIGKILL)

if where == "model":
    capture, calls = LanguageModel.capture, []
    def dying(self, tokens, hooks, attention_mask=None):
        calls.append(1)
        if len(calls) > 14:
            while not list(Path(folder).rglob("shard-00000.json")):
                time.sleep(0.01)  # the writer is a thread of its own: let it commit one
            die()
        return capture(self, tokens, hooks, attention_mask)
    LanguageModel.capture = dying
else:
    save, saved = cache.records.ShardRecord.save, []
    def dying(self, path):
        saved.append(1)
        if len(saved) == 3:
            die()  # the data file is in place, its record is not
        save(self, path)
    cache.records.ShardRecord.save = dying
harvest(load_model(model, device="cpu"), Corpus.open(corpus), hooks=["blocks.1.hook_resid_post"],
        workspace=folder, rows_per_shard=150, batch_tokens=64, show_progress=False)
"""


@pytest.mark.parametrize("where", ["model", "record"])
def test_a_kill_loses_no_committed_shard_and_leaves_no_half_one(
    where: str, tiny_model: LanguageModel, tiny_dir: Path, corpus: Corpus, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", _CHILD, str(tmp_path), str(tiny_dir), str(corpus.path), where]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == -signal.SIGKILL
    (path,) = ActivationStore.find_all(tmp_path)
    store = ActivationStore.open(path)
    done, before = store.committed(POST), files(store)
    assert 0 < len(done) < len(store.shards)
    assert store.verify() == []
    committed = {k: v for k, v in before.items() if any(f"shard-{s:05d}" in k for s in done)}
    store = harvest(tiny_model, corpus, hooks=POST, workspace=tmp_path, **OPTIONS)
    after = files(store)
    assert {k: after[k] for k in committed} == committed
    assert len(after) == 2 * len(store.shards)  # data and record of each shard, no orphan
    want = expected_rows(tiny_model, corpus, POST)
    assert torch.allclose(all_rows(store, POST), want, rtol=1e-3, atol=1e-2)


def test_a_hook_added_later_leaves_the_earlier_files_alone(
    tiny_model: LanguageModel, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = harvest(tiny_model, corpus, hooks=POST, workspace=tmp_path, **OPTIONS)
    before = files(first)
    seen = submitted(monkeypatch)
    second = harvest(tiny_model, corpus, hooks=[POST, HOOKS[2]], workspace=tmp_path, **OPTIONS)
    assert second.path == first.path and {h for _, h in seen} == {HOOKS[2]}
    after = files(second)
    assert {k: after[k] for k in before} == before and len(after) == 2 * len(before)
    seen.clear()
    third = harvest(tiny_model, corpus, hooks=[POST, HOOKS[2]], workspace=tmp_path, **OPTIONS)
    assert not seen and third.last_run["tokens"] == 0 and files(third) == after


def test_another_model_backend_or_corpus_is_another_store(
    tiny_model: LanguageModel, tiny_dir: Path, corpus: Corpus, texts: list[str], tmp_path: Path
) -> None:
    nnsight = load_model(tiny_dir, backend="nnsight", device="cpu")
    packed = build_corpus(texts, tiny_model.tokenizer, workspace=tmp_path, context=24, mode="packed")
    stores = [
        harvest(m, c, hooks=POST, workspace=tmp_path, **OPTIONS)
        for m, c in ((tiny_model, corpus), (nnsight, corpus), (tiny_model, packed))
    ]
    assert len({s.path for s in stores}) == 3
    identity = stores[0].identity
    assert identity["corpus"] == corpus.fingerprint and identity["context"] == 24
    assert identity["prepend_bos"] is False and identity["backend"] == "transformer_lens"


# --------------------------------------------------------------------------------------------- refusals


def damaged(tiny_dir: Path, corpus: Corpus, value: float) -> tuple[LanguageModel, int, int]:
    """A model whose embedding of one token is `value`, and the only place of that token: doc, pos."""
    model = load_model(tiny_dir, device="cpu")
    tok = corpus.column("tok")
    cross = model.tokenizer("×").input_ids[-1]
    (row,) = np.flatnonzero(tok == cross)  # in a late document, so that earlier shards are fine
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[int(tok[row]), 3] = value  # type: ignore[operator]
    return model, int(corpus.column("doc")[row]), int(corpus.column("pos")[row])


def doc_seq(corpus: Corpus, doc: int) -> int:
    """First sequence of a document."""
    return int(corpus.column("seq")[np.argmax(corpus.column("doc") == doc)])


def test_nan_is_refused_with_hook_document_and_position(
    tiny_dir: Path, corpus: Corpus, tmp_path: Path
) -> None:
    model, doc, pos = damaged(tiny_dir, corpus, float("nan"))
    pre = "blocks.0.hook_resid_pre"
    with pytest.raises(DataError, match="NaN or infinite") as e:
        harvest(model, corpus, hooks=pre, workspace=tmp_path, **OPTIONS)
    assert f"{pre}: doc {doc}, position {pos} " in str(e.value) and "\n" not in str(e.value)
    (path,) = ActivationStore.find_all(tmp_path)
    store = ActivationStore.open(path)
    bad = next(i for i, s in enumerate(store.shards) if s[0] <= doc_seq(corpus, doc) < s[1])
    assert store.committed(pre) == set(range(bad)) and store.verify() == []
    # attention weighs later tokens by 0, and 0 · NaN is NaN: past the first block the whole row is bad
    with pytest.raises(DataError, match=f"{POST}: doc {doc}, position 0 .*NaN or infinite"):
        harvest(model, corpus, hooks=POST, workspace=tmp_path, **OPTIONS)


def test_a_value_too_large_for_the_dtype_is_refused_before_the_cast(
    tiny_dir: Path, corpus: Corpus, tmp_path: Path
) -> None:
    model, doc, pos = damaged(tiny_dir, corpus, 1e5)
    pre = "blocks.0.hook_resid_pre"
    with pytest.raises(DataError, match=r"1e\+05, too large for fp16.*dtype='bf16'") as e:
        harvest(model, corpus, hooks=pre, workspace=tmp_path, dtype="fp16", **OPTIONS)
    assert f"{pre}: doc {doc}, position {pos} " in str(e.value)
    store = harvest(model, corpus, hooks=pre, workspace=tmp_path / "b", dtype="bf16", **OPTIONS)
    assert store.complete(pre) and store.stats(pre, split=None, skip=None).max_abs > 9e4


def test_auto_dtype_is_bf16_where_fp16_would_be_tight(tiny_dir: Path, corpus: Corpus, tmp_path: Path) -> None:
    model = load_model(tiny_dir, device="cpu")
    pre = "blocks.0.hook_resid_pre"
    small = harvest(model, corpus, hooks=pre, workspace=tmp_path / "a", **OPTIONS)
    with torch.no_grad():
        model.hf.get_input_embeddings().weight.mul_(1e5)  # type: ignore[operator]
    large = harvest(model, corpus, hooks=pre, workspace=tmp_path / "b", **OPTIONS)
    assert (small.dtype(pre), large.dtype(pre)) == ("fp16", "bf16")


def test_wrong_uses_are_one_line_that_says_what_to_do(
    tiny_model: LanguageModel, corpus: Corpus, tmp_path: Path
) -> None:
    harvest(tiny_model, corpus, hooks=POST, workspace=tmp_path, **OPTIONS)
    long = build_corpus(SENTENCES[:3], tiny_model.tokenizer, workspace=tmp_path, context=513)
    other = build_corpus(SENTENCES[:3], tiny_model.tokenizer, workspace=tmp_path)
    other.meta["tokenizer_sha256"] = "0" * 64
    cases: list[tuple[Corpus, dict[str, Any], type[AtomscopeError], str]] = [
        (corpus, {"hooks": []}, UsageError, "no hooks"),
        (corpus, {"hooks": "blocks.1.hook_resid"}, UsageError, "did you mean"),
        (corpus, {"hooks": POST, "dtype": "int8"}, UsageError, "fp16, bf16, fp32"),
        (corpus, {"hooks": POST, "dtype": "fp32"}, UsageError, "is stored as fp16"),
        (corpus, {"hooks": POST, "batch_tokens": 0}, UsageError, "batch_tokens"),
        (corpus, {"hooks": POST, "rows_per_shard": 151}, UsageError, "rows_per_shard"),
        (long, {"hooks": POST}, UsageError, "context=512"),
        (other, {"hooks": POST}, DataError, "another tokenizer"),
    ]
    for table, options, kind, message in cases:
        with pytest.raises(kind, match=message) as e:
            harvest(tiny_model, table, workspace=tmp_path, **(OPTIONS | options))
        assert "\n" not in str(e.value)


def test_bare_forward_rate_runs_the_batches_of_a_harvest(
    tiny_model: LanguageModel, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    real = LanguageModel.capture

    def capture(self: LanguageModel, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tokens)
        return real(self, tokens, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "capture", capture)
    harvest(tiny_model, corpus, hooks=POST, workspace=tmp_path, dtype="fp16", **OPTIONS)
    harvested = list(seen)
    seen.clear()
    ticks = iter([0.0, 2.0])
    rate = bare_forward_rate(
        tiny_model, corpus, POST, batch_tokens=64, rows_per_shard=150, clock=lambda: next(ticks)
    )
    assert rate == corpus.n_tokens / 2.0
    assert len(seen) == len(harvested) and all(torch.equal(a, b) for a, b in zip(seen, harvested))


# -------------------------------------------------------------------------------------------- real model


@pytest.mark.assets
def test_the_packaged_model_is_harvested_as_it_computes(real_workspace: Path, tmp_path: Path) -> None:
    model = load_model("smollm2-135m-instruct-q4_1", workspace=real_workspace, device="cpu")
    hook = "blocks.15.hook_resid_post"
    corpus = build_corpus("boolq", model.tokenizer, workspace=real_workspace, max_tokens=600, context=64)
    store = harvest(model, corpus, hooks=hook, workspace=real_workspace, show_progress=False)
    tok, at = corpus.column("tok"), corpus.seq_offsets
    for s in range(0, corpus.n_seqs, 4):
        ids = torch.tensor(tok[at[s] : at[s + 1]].astype(np.int64))[None]
        with torch.no_grad():
            hidden = model.hf(ids, output_hidden_states=True).hidden_states[16][0]
        got = store.rows(hook, ids=range(at[s], at[s + 1]))
        assert float(((got - hidden).norm(dim=1) / hidden.norm(dim=1)).max()) < 1e-3
    # position 0 is an attention sink: its norm is why readers skip it
    sink, rest = store.rows(hook, where="pos = 0"), store.rows(hook, where="pos > 0")
    assert float(sink.norm(dim=1).mean()) > 50 * float(rest.norm(dim=1).mean())
