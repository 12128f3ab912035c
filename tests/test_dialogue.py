"""Dialogues: every token has the role of the message it belongs to, and an assistant-only reader sees no one else's."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import Corpus, LanguageModel, build_corpus, connect, harvest
from cache.chats import ROLES, parse_messages
from cache.dialogue import ChatTemplate
from cache.errors import AtomscopeError, DataError, UsageError
from cache.packing import split_of
from tests.tiny import CHAT_TEMPLATE, SENTENCES, tiny_tokenizer

HOOK = "blocks.1.hook_resid_post"
SYSTEM, USER, ASSISTANT = 1, 2, 3
START, END = "<|im_start|>", "<|im_end|>"

DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
BOS_AND_TRIM = (
    "{{ '<|endoftext|>' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_end|>\n\n' + message['content'] | trim + '<|im_start|>' }}{% endfor %}"
)
OTHER_NAMES = (
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
)
SYSTEM_IN_USER = (
    "{{ '<|endoftext|>' }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (first if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turns, after a system message if there is one."""
    roles = ("user", "assistant")
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]


def tokenizer(template: str = CHAT_TEMPLATE, bos: bool = False) -> Any:
    tok = tiny_tokenizer()
    tok.chat_template = template
    if bos:
        tok.bos_token = "<|endoftext|>"
    return tok


def pieces(tok: Any, dialogue: list[dict[str, str]]) -> list[tuple[str, int, bool]]:
    """Runs of tokens of one role and kind, as (text, role, template)."""
    found = ChatTemplate(tok).tokenise([parse_messages(dialogue, "x")])[0]
    runs: list[tuple[list[int], int, bool]] = []
    for i, r, t in zip(found.ids.tolist(), found.role.tolist(), found.template.tolist()):
        if runs and runs[-1][1:] == (r, t):
            runs[-1][0].append(i)
        else:
            runs.append(([i], r, t))
    return [(tok.decode(ids), r, t) for ids, r, t in runs]


# ------------------------------------------------------------------------------------------------- roles


def test_roles_and_template_tokens_are_those_of_the_dialogue_written_by_hand() -> None:
    got = pieces(tokenizer(), chat("user", "It's a fox – 😀.\n", " Why? ", system="Be good."))
    assert got == [
        (f"{START}system\n", SYSTEM, True), ("Be good.", SYSTEM, False), (f"{END}\n", SYSTEM, True),
        (f"{START}user\n", USER, True), ("user", USER, False), (f"{END}\n", USER, True),
        (f"{START}assistant\n", ASSISTANT, True), ("It's a fox – 😀.\n", ASSISTANT, False),
        (f"{END}\n", ASSISTANT, True),
        (f"{START}user\n", USER, True), (" Why? ", USER, False), (f"{END}\n", USER, True),
    ]  # fmt: skip


def test_a_default_system_prompt_is_the_systems_and_not_the_users() -> None:
    got = pieces(tokenizer(DEFAULT_SYSTEM), chat("hi", "ho"))
    assert got[:4] == [
        (f"{START}system\n", SYSTEM, True), ("Be kind.", SYSTEM, False), (f"{END}\n", SYSTEM, True),
        (f"{START}user\n", USER, True),
    ]  # fmt: skip
    given_one = pieces(tokenizer(DEFAULT_SYSTEM), chat("hi", system="No."))
    assert [t for t, r, k in given_one if r == SYSTEM and not k] == ["No."]


def test_bos_belongs_to_nobody_and_trimmed_contents_are_found() -> None:
    for system in (None, "S"):
        got = pieces(tokenizer(BOS_AND_TRIM, bos=True), chat("  hi there\n", "well", system=system))
        assert got[0] == ("<|endoftext|>", 0, True)
        contents = [(t, r) for t, r, k in got if not k]
        assert contents == [*([("S", SYSTEM)] if system else []), ("hi there", USER), ("well", ASSISTANT)]


def test_a_template_that_renames_the_assistant_keeps_the_role() -> None:
    got = pieces(tokenizer(OTHER_NAMES), chat("hi", "model"))
    assert (f"{START}model\n", ASSISTANT, True) in got and ("model", ASSISTANT, False) in got


def test_a_template_that_merges_the_system_prompt_into_the_question_keeps_both_roles() -> None:
    got = pieces(tokenizer(SYSTEM_IN_USER, bos=True), chat("Why?", "So.", "Oh.", system="Short please."))
    contents = [(t.strip(), r) for t, r, k in got if not k]
    assert contents == [("Short please.", SYSTEM), ("Why?", USER), ("So.", ASSISTANT), ("Oh.", USER)]


words = st.text(st.sampled_from("ab user\n.é😀assistant"), max_size=20)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, DEFAULT_SYSTEM, OTHER_NAMES])
@given(turns=st.lists(words, min_size=1, max_size=5), system=st.none() | words)
@settings(max_examples=40, deadline=None)
def test_ids_are_the_chat_templates_and_contents_come_back_whole(
    template: str, turns: list[str], system: str | None, ready: dict[str, Any]
) -> None:
    tok, dialogue = ready[template]._tokenizer, chat(*turns, system=system)
    found = ready[template].tokenise([parse_messages(dialogue, "x")])[0]
    assert found.ids.tolist() == tok.apply_chat_template(dialogue, tokenize=True, return_dict=False)
    marks = np.isin(found.ids, tok.convert_tokens_to_ids([START, END]))
    assert found.template[marks].all()
    for role in (USER, ASSISTANT):
        mine = tok.decode(found.ids[(found.role == role) & ~found.template])
        said = [m["content"] for m in dialogue if ROLES.index(m["role"]) == role]
        kept = [c.strip() for c in said] if template == OTHER_NAMES else said
        assert mine == "".join(kept)


@pytest.fixture(scope="module")
def ready() -> dict[str, Any]:
    return {t: ChatTemplate(tokenizer(t)) for t in (CHAT_TEMPLATE, DEFAULT_SYSTEM, OTHER_NAMES)}


# ----------------------------------------------------------------------------------------------- building


DIALOGUES = [chat(SENTENCES[i], *SENTENCES[i + 1 : i + 2 + i % 3]) for i in range(0, 160, 4)]


def test_a_dialogue_is_one_row_and_what_is_cut_is_counted(tmp_path: Path) -> None:
    tok, context = tokenizer(), 60
    whole = [tok.apply_chat_template(d, tokenize=True, return_dict=False) for d in DIALOGUES]
    corpus = build_corpus(DIALOGUES, tok, workspace=tmp_path, mode="dialogue", context=context)
    assert corpus.n_seqs == corpus.n_docs == len(DIALOGUES)
    tok_column = corpus.column("tok")
    rows = [tok_column[a:b].tolist() for a, b in pairwise(corpus.seq_offsets)]
    assert rows == [w[:context] for w in whole]
    assert corpus.meta["truncated_docs"] == sum(len(w) > context for w in whole) > 3
    assert corpus.meta["truncated_tokens"] == sum(max(len(w) - context, 0) for w in whole)
    # the split is that of the whole dialogue: cutting it does not move it to the other side
    assert corpus.docs().column("split").to_pylist() == [split_of(w) for w in whole]
    flags, role = corpus.column("flags"), corpus.column("role")
    assert (((flags & 4) > 0) == (role != ASSISTANT)).all() and ((flags & 1) > 0).sum() == corpus.n_seqs
    again = build_corpus(iter(DIALOGUES), tok, workspace=tmp_path, mode="dialogue", context=context)
    assert again.path == corpus.path


def test_every_shape_of_chat_file_gives_the_same_corpus(tmp_path: Path) -> None:
    tok = tokenizer()
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [[{"from": names[m["role"]], "value": m["content"]} for m in d] for d in DIALOGUES]
    parts = [[m | {"content": [{"type": "text", "text": m["content"]}]} for m in d] for d in DIALOGUES]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": d}) for d in DIALOGUES))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"conversations": d, "id": 3}) for d in sharegpt))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"log": d}) for d in parts))
    pq.write_table(pa.table({"messages": DIALOGUES, "n": range(len(DIALOGUES))}), tmp_path / "d.parquet")
    options: dict[str, Any] = {"workspace": tmp_path, "mode": "dialogue", "context": 256}
    made = [build_corpus(tmp_path / f, tok, **options) for f in ("a.jsonl", "b.jsonl", "d.parquet")]
    made.append(build_corpus(tmp_path / "c.jsonl", tok, text_field="log", **options))
    made.append(build_corpus([{"messages": d} for d in DIALOGUES], tok, **options))
    assert len({c.fingerprint for c in made}) == 1


def test_wrong_dialogues_are_one_line_that_names_the_place(tmp_path: Path) -> None:
    bare = tokenizer()
    bare.chat_template = None
    strict = tokenizer("{{ raise_exception('roles must alternate') }}")
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "hi"}))
    (tmp_path / "x.txt").write_text("hi")
    tok = tokenizer()
    cases: list[tuple[Any, Any, type[AtomscopeError], str]] = [
        (DIALOGUES, bare, UsageError, "no chat template"),
        (DIALOGUES, strict, DataError, "dialogue 0.*roles must alternate"),
        ([[]], tok, DataError, "document 0"),
        (["hi"], tok, DataError, "document 0"),
        ([chat("a"), [{"role": "user"}]], tok, DataError, "document 1, message 0"),
        (tmp_path / "x.jsonl", tok, DataError, "'messages' or 'conversations'"),
        (tmp_path / "x.txt", tok, UsageError, "plain text"),
        ("boolq", tok, UsageError, "chat-pairs"),
    ]
    for source, t, kind, message in cases:
        with pytest.raises(kind, match=message) as e:
            build_corpus(source, t, workspace=tmp_path, mode="dialogue")
        assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------- harvest and reading


@pytest.fixture(scope="module")
def chats(tiny_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Any]:
    root = tmp_path_factory.mktemp("chats")
    corpus = build_corpus(DIALOGUES, tiny_model.tokenizer, workspace=root, mode="dialogue", context=96)
    options: dict[str, Any] = {"rows_per_shard": 400, "batch_tokens": 500, "show_progress": False}
    return corpus, harvest(tiny_model, corpus, hooks=HOOK, workspace=root, dtype="fp32", **options)


def test_a_batch_of_dialogues_of_all_lengths_equals_one_at_a_time(
    chats: tuple[Corpus, Any], tiny_model: LanguageModel
) -> None:
    corpus, store = chats
    tok, got = corpus.column("tok"), store.rows(HOOK, ids=range(corpus.n_tokens))
    for a, b in pairwise(corpus.seq_offsets):
        alone = tiny_model.capture(torch.tensor(tok[a:b].astype(np.int64))[None], [HOOK])[HOOK][0]
        assert float(((got[a:b] - alone).norm(dim=1) / alone.norm(dim=1)).max()) < 1e-5


def test_reading_the_assistant_only_gives_its_rows_and_their_statistics(chats: tuple[Corpus, Any]) -> None:
    corpus, store = chats
    role, flags, split = (corpus.column(c) for c in ("role", "flags", "split"))
    for skip, mask in (
        ("not_assistant", role == ASSISTANT),
        ("not_assistant+special", (role == ASSISTANT) & (flags & 2 == 0)),
        ("first+special", (flags & 3) == 0),
    ):
        want = np.flatnonzero(mask & (split == 0))
        assert 0 < len(want) < corpus.n_tokens
        read = np.concatenate(
            [b.row.numpy() for b in store.sequential(HOOK, batch_size=64, split="train", skip=skip)]
        )
        assert read.tolist() == want.tolist()
        stream = store.stream(HOOK, batch_size=32, split="train", skip=skip, window=2)
        assert stream.rows_per_epoch == len(want)
        seen: list[int] = []
        while len(seen) < len(want):
            seen += next(stream).row.tolist()
        stream.close()
        assert sorted(seen[: len(want)]) == want.tolist()
        rows = store.rows(HOOK, ids=want).double()
        stats = store.stats(HOOK, split="train", skip=skip)
        assert stats.n == len(want) and np.allclose(stats.mean, rows.mean(0).numpy(), rtol=1e-9, atol=1e-9)
        assert np.isclose(stats.mean_norm, rows.norm(dim=1).mean().item())
        assert np.allclose(stats.var, rows.var(0, correction=0).numpy(), rtol=1e-6, atol=1e-9)
    with pytest.raises(UsageError, match="not_assistant"):
        store.stats(HOOK, skip="assistant")


def test_training_on_the_assistant_only_sees_its_rows_alone(chats: tuple[Corpus, Any]) -> None:
    from saes import TrainConfig, presets, train

    config = TrainConfig(steps=5, batch_size=64, skip="not_assistant+special", log_every=5)
    result = train(chats[1], [presets.topk(d_sae=80, k=4)], config, hook=HOOK)[0]
    assert np.isfinite(result.metrics[-1]["fvu"])


def test_roles_can_be_asked_for_in_sql(chats: tuple[Corpus, Any]) -> None:
    corpus, store = chats
    where = "role = 3 AND (flags & 2) = 0 AND split = 0"
    role, flags, split = (corpus.column(c) for c in ("role", "flags", "split"))
    want = np.flatnonzero((role == 3) & (flags & 2 == 0) & (split == 0))
    assert store.row_ids(where).tolist() == want.tolist()
    found = (
        connect(corpus.path.parents[1]).sql("SELECT role, count(*) n FROM tokens GROUP BY role").fetchall()
    )
    assert dict(found) == {int(r): int(n) for r, n in zip(*np.unique(role, return_counts=True))}


@pytest.mark.assets
def test_packaged_pairs_are_the_ones_that_have_an_answer(real_workspace: Path) -> None:
    from cache.sources import Fields, open_source

    found = list(open_source("chat-pairs", workspace=real_workspace, fields=Fields(dialogue=True)).documents)
    assert len(found) == 30_380 and {d.labels["label_set"] for d in found} == {d.source for d in found}
    assert all([m.role for m in d.messages] == ["user", "assistant"] for d in found)
