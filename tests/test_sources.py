"""Data sets and label fields: the same documents from wherever they come, and no more of them than asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.cli import main
from cache import Corpus, build_corpus, connect
from cache.corpus import list_corpora
from cache.errors import AtomscopeError, DataError, MissingDataError, UsageError
from tests.tiny import SENTENCES, tiny_tokenizer

ROWS = [
    {"text": s, "topic": "fox" if "fox" in s else "other", "stars": i % 5, "extra": [i]}
    for i, s in enumerate(SENTENCES)
]


@pytest.fixture(scope="module")
def tok() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The library without a network, and with its own cache out of the way."""
    import datasets as library

    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    real = library.load_dataset

    def load(name: str, *args: Any, **options: Any) -> Any:
        if not Path(name).is_dir():
            raise ConnectionError("no network")
        return real(name, *args, **options)

    monkeypatch.setattr(library, "load_dataset", load)
    return library


@pytest.fixture
def plain(tok: Any, tmp_path: Path) -> Corpus:
    return build_corpus(SENTENCES, tok, workspace=tmp_path)


# --------------------------------------------------------------------------------------------- data sets


def test_a_data_set_in_memory_streamed_or_on_disk_is_the_same_corpus(
    datasets: Any, tok: Any, tmp_path: Path, plain: Corpus
) -> None:
    data = datasets.Dataset.from_list([{"text": r["text"], "n": r["stars"]} for r in ROWS])
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(str(tmp_path / "both"))
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.jsonl").write_text("\n".join(json.dumps({"text": s}) for s in SENTENCES))
    sources = [data, data.to_iterable_dataset(), tmp_path / "saved", str(tmp_path / "both") + "#train", files]
    made = [build_corpus(s, tok, workspace=tmp_path) for s in sources]
    assert {c.fingerprint for c in made} == {plain.fingerprint}
    assert build_corpus(f"{tmp_path / 'both'}#test", tok, workspace=tmp_path).n_docs == 3


def test_a_stream_is_read_no_further_than_max_tokens(datasets: Any, tok: Any, tmp_path: Path) -> None:
    read: list[int] = []

    def endless() -> Any:
        for i in range(10**9):
            read.append(i)
            yield {"text": SENTENCES[i % len(SENTENCES)] + f" {i}"}

    data = datasets.IterableDataset.from_generator(endless)
    corpus = build_corpus(data, tok, workspace=tmp_path, max_tokens=2_000)
    lengths = np.bincount(corpus.column("doc"))
    assert 2_000 - lengths.max() < corpus.n_tokens <= 2_000
    assert len(read) < corpus.n_docs + 1_000


def test_a_hub_name_is_streamed_with_its_config_and_split(
    datasets: Any, tok: Any, tmp_path: Path, plain: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.Dataset.from_list([{"body": s} for s in SENTENCES]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = build_corpus("hf:some/set@en#dev", tok, workspace=tmp_path, text_field="body")
    assert corpus.fingerprint == plain.fingerprint
    assert asked == [(("some/set", "en"), {"split": "dev", "streaming": True})]
    build_corpus("hf:some/set", tok, workspace=tmp_path, text_field="body")
    assert asked[1] == (("some/set", None), {"split": "train", "streaming": True})


def test_dialogues_come_from_data_sets_too(datasets: Any, tok: Any, tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(SENTENCES[::2], SENTENCES[1::2])
    ]
    data = datasets.Dataset.from_list([{"messages": c, "lang": "en"} for c in chats])
    options: dict[str, Any] = {"workspace": tmp_path, "mode": "dialogue", "context": 256}
    made = build_corpus(data, tok, label_fields=["lang"], **options)
    listed = build_corpus(chats, tok, labels={"lang": ["en"] * len(chats)}, **options)
    assert made.fingerprint == listed.fingerprint
    assert made.fingerprint != build_corpus(chats, tok, **options).fingerprint


# ------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "rows", "dataset"])
def test_named_fields_become_labels_that_sql_can_ask_for(
    kind: str, datasets: Any, tok: Any, tmp_path: Path
) -> None:
    source: Any = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        source.write_text("\n".join(json.dumps(r) for r in ROWS))
    elif kind == "csv":
        lines = ['"{}",{},{}'.format(r["text"].replace('"', '""'), r["topic"], r["stars"]) for r in ROWS]
        source.write_text("text,topic,stars\n" + "\n".join(lines), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), source)
    else:
        source = ROWS if kind == "rows" else datasets.Dataset.from_list(ROWS)
    corpus = build_corpus(source, tok, workspace=tmp_path, label_fields=["topic", "stars"])
    docs = corpus.docs().to_pydict()
    assert docs["label_topic"] == [r["topic"] for r in ROWS] and docs["label_stars"] == [
        r["stars"] for r in ROWS
    ]
    assert "label_extra" not in docs and "topic" not in docs
    query = "SELECT count(*) FROM tokens WHERE label_topic = 'fox' AND label_stars > 2"
    wanted = {i for i, r in enumerate(ROWS) if r["topic"] == "fox" and r["stars"] > 2}
    [(n,)] = connect(tmp_path).sql(query).fetchall()
    assert n == np.isin(corpus.column("doc"), list(wanted)).sum() > 0


def test_wrong_sources_are_one_line_that_says_what_to_do(datasets: Any, tok: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in ROWS[:3]))
    data = datasets.Dataset.from_list(ROWS[:3])
    both = datasets.DatasetDict({"train": data, "test": data})
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Any, dict[str, Any], type[AtomscopeError], str]] = [
        (file, {"label_fields": ["colour"]}, DataError, "rows.jsonl:1 has no field 'colour'"),
        (file, {"label_fields": ["extra"]}, DataError, "label_extra is a list"),
        (file, {"text_field": "stars"}, DataError, 'no string "stars"'),
        (data, {"text_field": "body"}, DataError, "row 0.*text_field"),
        (both, {}, UsageError, "the splits train, test"),
        (tmp_path / "empty", {}, DataError, "not a data set"),
        ("hf:", {}, UsageError, "hf:owner/name"),
        ("hf:nobody/nothing-at-all", {}, MissingDataError, "nobody/nothing-at-all.*no network"),
    ]
    for source, options, kind, message in cases:
        with pytest.raises(kind, match=message) as e:
            build_corpus(source, tok, workspace=tmp_path, **options)
        assert "\n" not in str(e.value)


# ----------------------------------------------------------------------------------------------- command


def test_the_commands_take_dialogues_labels_and_a_dry_run(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: str) -> str:
        monkeypatch.setattr("sys.argv", ["atomscope", *args, "-w", str(tmp_path), "--model", str(tiny_dir)])
        with pytest.raises(SystemExit) as e:
            main()
        assert not e.value.code
        return capsys.readouterr().out

    file = tmp_path / "chats.jsonl"
    rows = [
        {"log": [{"role": "user", "content": s}, {"role": "assistant", "content": s}], "lang": "en"}
        for s in SENTENCES
    ]
    file.write_text("\n".join(json.dumps(r) for r in rows))
    out = run(
        "corpus", "build", str(file), "--mode", "dialogue", "--context", "40", "--text-field", "log",
        "--label-field", "lang",
    )  # fmt: skip
    (corpus,) = list_corpora(tmp_path)
    assert corpus.meta["truncated_docs"] > 0 and f"{corpus.meta['truncated_docs']} dialogues cut" in out
    assert corpus.docs().column("label_lang").to_pylist() == ["en"] * corpus.n_docs
    args = ("harvest", "latest", "--hook", "blocks.1.hook_resid_post", "--dry-run")
    said = json.loads(run(*args, "--json"))
    assert said["tokens"] == corpus.n_tokens and said["disk_bytes"] > corpus.n_tokens * 128
    assert "memory" in run(*args) and not (tmp_path / "activations").exists()
