"""FAST: dialogues one a row against blocks, and errors by the kind of token, against what can be computed by hand."""

from __future__ import annotations

import importlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cache import build_corpus, harvest
from cache.errors import UsageError
from cache.packing import FLAG_NOT_ASSISTANT, FLAG_SPECIAL, Packing, pack
from saes import presets
from saes.evaluation import evaluate
from saes.token_classes import CLASSES, class_masks, token_class_rows
from saes.train_config import TrainConfig
from saes.training import train
from tests.test_cli import run
from tests.tiny import SENTENCES, tiny_tokenizer

HOOK = "blocks.1.hook_resid_post"
CONTEXT = 90


def dialogues(n: int = 60) -> list[list[dict[str, str]]]:
    """One or two exchanges; every dialogue has another text, so the split has both sides."""
    out = []
    for i in range(n):
        a, b = SENTENCES[i % len(SENTENCES)], SENTENCES[(i * 7 + 1) % len(SENTENCES)]
        chat = [{"role": "user", "content": f"{i}. {a[:25]}"}, {"role": "assistant", "content": b[:20]}]
        out.append(chat if i % 3 else [*chat, {"role": "user", "content": "Why?"}])
    return out


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory):
    ws, tok = tmp_path_factory.mktemp("ws"), tiny_tokenizer()
    modes = ("dialogue", "dialogue_packed", "dialogue_aligned")
    return {m: build_corpus(dialogues(), tok, mode=m, context=CONTEXT, workspace=ws) for m in modes}


def tokens_of(corpus, *names: str) -> dict[int, list[tuple]]:
    """Rows of the token table by document, in the order of the document."""
    columns = [corpus.column(n).tolist() for n in ("doc", "doc_pos", *names)]
    out: dict[int, list[tuple]] = {}
    for doc, doc_pos, *rest in sorted(zip(*columns, strict=True)):
        out.setdefault(doc, []).append((doc_pos, *rest))
    return out


def test_blocks_hold_the_same_dialogues_with_the_same_roles_as_dialogue_rows(corpora) -> None:
    """Whatever the data path, a token keeps its role, its template flag and its side of the split."""
    keep = FLAG_SPECIAL | FLAG_NOT_ASSISTANT
    want = tokens_of(corpora["dialogue"], "tok", "role", "flags", "split")
    for mode in ("dialogue_packed", "dialogue_aligned"):
        found = tokens_of(corpora[mode], "tok", "role", "flags", "split")
        assert found.keys() == want.keys()
        for doc, rows in want.items():
            for a, b in zip(rows, found[doc], strict=False):
                assert a[:3] == b[:3] and a[3] & keep == b[3] & keep and a[4] == b[4]
    assert {2, 3} <= set(np.unique(corpora["dialogue"].column("role")).tolist())


def test_packed_dialogues_are_blocks_of_full_length_without_anything_between(corpora) -> None:
    corpus = corpora["dialogue_packed"]
    lengths = np.diff(corpus.seq_offsets)
    splits = corpus.column("split")[corpus.seq_offsets[:-1]]
    for split in (0, 1):
        assert (lengths[splits == split][:-1] == CONTEXT).all()
    assert corpus.n_tokens == int(corpus.docs().column("n_tokens").to_numpy().sum())
    starts = corpus.column("doc_pos")[corpus.seq_offsets[:-1]]
    assert (starts != 0).sum() > len(starts) / 2


def test_aligned_blocks_begin_with_a_dialogue_and_break_none(corpora) -> None:
    corpus = corpora["dialogue_aligned"]
    assert (corpus.column("doc_pos")[corpus.seq_offsets[:-1]] == 0).all()
    doc, seq = corpus.column("doc"), corpus.column("seq")
    assert all(len(np.unique(seq[doc == d])) == 1 for d in np.unique(doc))
    assert corpus.n_seqs < corpora["dialogue"].n_seqs and np.diff(corpus.seq_offsets).max() <= CONTEXT
    # no row could have taken the next dialogue too
    lengths = np.array([np.count_nonzero(doc == d) for d in range(corpus.n_docs)])
    first = doc[corpus.seq_offsets[:-1]]
    split = corpus.column("split")[corpus.seq_offsets[:-1]]
    rows = np.diff(corpus.seq_offsets)
    for i, (a, b) in enumerate(pairwise(range(corpus.n_seqs))):
        if split[a] == split[b]:
            assert rows[i] + lengths[first[b]] > CONTEXT


def test_a_dialogue_longer_than_a_block_goes_on_in_the_next_one() -> None:
    docs = [np.arange(25, dtype=np.int32), np.arange(3, dtype=np.int32)]
    table = pack(docs, Packing(mode="dialogue_packed", context=10), [0, 0])
    assert table["seq"].tolist() == [0] * 10 + [1] * 10 + [2] * 8
    assert table["doc_pos"].tolist() == [*range(25), 0, 1, 2]


@pytest.fixture(scope="module")
def stores(tiny_model, tmp_path_factory: pytest.TempPathFactory):
    ws = tmp_path_factory.mktemp("stores")
    made = {}
    for mode in ("dialogue", "dialogue_packed"):
        corpus = build_corpus(dialogues(), tiny_model.tokenizer, mode=mode, context=CONTEXT, workspace=ws)
        made[mode] = harvest(tiny_model, corpus, hooks=[HOOK], workspace=ws)
    return made


SHORT = TrainConfig(steps=30, batch_size=128, lr=3e-3, log_every=10, skip=None, screen="off")


def test_fast_is_refused_off_its_data_path(stores) -> None:
    job = [presets.fast(presets.topk)(d_sae=64, k=4)]
    with pytest.raises(UsageError, match="dialogue_packed"):
        train(stores["dialogue_packed"], job, SHORT)
    with pytest.raises(UsageError, match="skip=None"):
        train(stores["dialogue"], job, TrainConfig(steps=2))
    with pytest.raises(UsageError, match="a tensor"):
        train(torch.randn(50, 4), job, SHORT)


@pytest.mark.parametrize("preset", ["topk", "jumprelu", "relu_l1", "batch_topk"])
def test_fast_takes_any_architecture_and_changes_nothing_of_it(preset: str, stores) -> None:
    make = presets.PRESETS[preset]
    more = {"d_sae": 64} | ({"k": 4} if "top" in preset else {})
    fast, plain = presets.fast(make)(**more), make(**more)
    assert fast.data == "fast" and fast.label.startswith("fast-")
    a = train(stores["dialogue"], [fast], SHORT)[0].sae
    b = train(stores["dialogue"], [plain], SHORT)[0].sae
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name])


def test_the_papers_schedule_warms_up_falls_by_a_cosine_and_ends_with_its_linear_decay() -> None:
    c = presets.fast_schedule()
    assert c.steps * c.batch_size == 40_960_000 and c.skip is None
    assert c.lr_at(15_999, 4096) == c.lr_at(16_000, 4096) == 7e-5
    middle = 16_000 + (320_000 - 16_000 - 64_000) // 2
    assert c.lr_at(middle, 4096) == pytest.approx((7e-5 + 7e-6) / 2)
    assert c.lr_at(256_000, 4096) == pytest.approx(7e-6)
    assert c.lr_at(288_000, 4096) == pytest.approx(3.5e-6)
    assert presets.fast_schedule(steps=100).steps == 100


def test_template_tokens_are_those_that_the_tokenizers_template_writes(stores) -> None:
    corpus = stores["dialogue"].corpus
    rows = np.arange(corpus.n_tokens)
    masks = class_masks(corpus, rows)
    assert set(masks) == set(CLASSES)
    tok, words = corpus.column("tok"), corpus.vocab
    seen = {words[t] for t in np.unique(tok[masks["special"]])}
    assert {"<|im_start|>", "<|im_end|>"} <= seen and not any(w.isspace() for w in seen)
    # markers are special wherever they stand; a word of a role is so only in a header
    marker = np.isin(tok, [words.index("<|im_start|>"), words.index("<|im_end|>")])
    assert masks["special"][marker].all()
    header = "".join(words[t] for t in tok[masks["special"] & (corpus.column("doc") == 1)])
    assert header.replace(" ", "") == "<|im_start|>user<|im_end|><|im_start|>assistant<|im_end|>"
    assert not (masks["special"] & masks["content"]).any()
    assert (masks["first"] == (corpus.column("pos") == 0)).all()
    assert (masks["special"] & masks["first"]).sum() == corpus.n_seqs


def test_class_errors_equal_a_sum_by_hand_and_weigh_dialogues_alike(stores) -> None:
    store = stores["dialogue"]
    sae = train(store, [presets.topk(d_sae=64, k=4)], SHORT)[0].sae
    subject = Subject(sae)
    rows = {r["metric"]: r for r in token_class_rows([subject], store, HOOK)}
    corpus = store.corpus
    at = np.flatnonzero(corpus.column("split") == 1)
    x = torch.cat([b.x[HOOK] for b in store.sequential(HOOK, batch_size=1000, split="heldout", skip=None)])
    error = ((sae(x) - x).double() ** 2).sum(1).numpy()
    size, doc = (x.double() ** 2).sum(1).numpy(), corpus.column("doc")[at]
    l0 = sae.encode(x).l0().double().numpy()
    for name, mask in class_masks(corpus, at).items():
        inside = [mask & (doc == d) for d in np.unique(doc) if (mask & (doc == d)).any()]
        for metric, per_token in (("mse", error / x.shape[1]), ("nmse", error / size), ("l0", l0)):
            want = np.mean([per_token[m].mean() for m in inside])
            assert rows[f"{metric}@{name}"]["value"] == pytest.approx(want, rel=1e-6)
        assert rows[f"log2_mse@{name}"]["value"] == pytest.approx(np.log2(rows[f"mse@{name}"]["value"]))
        assert rows[f"mse@{name}"]["n"] == mask.sum()
        assert rows[f"mse@{name}"]["ci_low"] <= rows[f"mse@{name}"]["value"] <= rows[f"mse@{name}"]["ci_high"]


class Subject:
    def __init__(self, sae) -> None:
        self.sae, self.name = sae, "sae"

    def __call__(self, x):
        codes = self.sae.encode(x)
        return self.sae.decode(codes), codes


def test_an_evaluation_keeps_the_classes_and_the_command_prints_them(stores, capsys) -> None:
    store = stores["dialogue"]
    result = train(store, [presets.topk(d_sae=64, k=4)], SHORT)[0]
    found = evaluate(result.sae, store, token_classes=True)
    assert found.value("mse@special") > 0 and found.value("nmse@content", "untrained") > 0
    assert found.value("nmse@all_rest", "pca-4") > 0
    w = ["-w", str(store.workspace)]
    args = ["evaluate", str(result.path), store.path.name, "--max-tokens", "0", "--token-classes", *w]
    code, out, _ = run(capsys, *args)
    assert code == 0 and "special_rest" in out and "log2 MSE" in out
    code, out, _ = run(capsys, *args, "--json")
    assert code == 0 and "mse@first" in {r["metric"] for r in json.loads(out)}


def test_a_job_file_and_the_command_reach_fast(stores, capsys, tmp_path: Path) -> None:
    store = stores["dialogue"]
    job = tmp_path / "job.yaml"
    job.write_text(
        "saes: [{preset: topk, d_sae: 64, k: 4, data: fast}]\n"
        "train: {steps: 3, batch_size: 64, skip: null, screen: off}\n"
    )
    args = ["train", store.path.name, "--config", str(job), "-w", str(store.workspace), "--json"]
    code, out, _ = run(capsys, *args)
    assert code == 0 and "fast-topk-64" in json.loads(out)[0]["path"]
    code, _, err = run(capsys, *args, "--set", "train.skip=first")
    assert code == 2 and "skip=None" in err


def test_corpus_build_knows_the_block_modes(tiny_dir, capsys, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"messages": d}) for d in dialogues(12)))
    args = ["corpus", "build", str(chats), "--model", str(tiny_dir), "--context", "40", "-w", str(tmp_path)]
    for mode in ("dialogue_packed", "dialogue_aligned"):
        code, out, _ = run(capsys, *args, "--mode", mode, "--json")
        assert code == 0 and json.loads(out)["mode"] == mode
    code, _, err = run(capsys, *args, "--mode", "packed_dialogue")
    assert code == 2 and "dialogue_packed" in err


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """The claim script."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks" / "claims"))
    return importlib.import_module("fast")


def scores(gap: float, l0: tuple[float, float] = (16.0, 64.0)) -> dict[str, dict[str, float]]:
    """An arm whose errors are 2^gap on every class, and of JumpReLU fall as L0 rises: 2^gap at L0 32."""
    metrics = [f"mse@{c}" for c in CLASSES] + ["nmse@all"]
    out = {
        "topk": {m: 2.0**gap for m in metrics}
        | dict.fromkeys(("l0@all", "l0@special", "l0@special_rest"), 32.0)
    }
    for target, at in zip((16, 64), l0, strict=True):
        out[f"jumprelu_{target}"] = {m: 2.0 ** (gap + np.log2(32 / at)) for m in metrics} | dict.fromkeys(
            ("l0@all", "l0@special", "l0@special_rest"), at
        )
    return out


def test_the_claims_compare_jumprelu_at_one_l0_and_judge_the_planted_gap(script) -> None:
    assert script.bits(scores(1.5), "jumprelu", "mse@special") == pytest.approx(1.5)
    assert script.bits(scores(1.5, (20.0, 50.0)), "jumprelu", "mse@special") == pytest.approx(1.5)
    assert np.isnan(script.bits(scores(1.5, (8.0, 30.0)), "jumprelu", "mse@special"))
    found = {}
    for s in range(3):
        found |= {
            (s, "fast"): scores(0.01 * s),
            (s, "packed_text"): scores(2.0),
            (s, "packed_dialogues"): scores(0.0),
        }
    report = script.Report("x")
    script.decide(report, found, {}, 3)
    verdicts = {c["id"]: c["verdict"] for c in report.claims}
    assert verdicts["packed_text_special_topk"] == verdicts["packed_text_all_jumprelu"] == "holds"
    assert verdicts["packed_dialogues_special_rest_topk"] == "does not hold"


def test_a_claim_without_a_bracketed_l0_is_underpowered_not_an_error(script) -> None:
    found = {
        (s, a): scores(0.0, (4.0, 8.0)) for s in range(3) for a in ("fast", "packed_text", "packed_dialogues")
    }
    report = script.Report("x")
    script.decide(report, found, {(s, a): (0.2, 9) for s in range(3) for a in ("fast", *script.BASELINES)}, 3)
    rows = {c["id"]: c for c in report.claims}
    assert rows["packed_text_special_jumprelu"]["verdict"] == "underpowered"
    assert rows["packed_text_top_rated"]["ours"] == 0.0


def test_steering_takes_the_latent_that_the_template_fires_most_and_scores_the_answers_alone(
    script, stores, tiny_model
) -> None:
    steering, store = importlib.import_module("fast_steering"), stores["dialogue"]
    sae = train(store, [presets.fast(presets.topk)(d_sae=64, k=4)], SHORT)[0].sae
    corpus = store.corpus
    x = torch.cat([b.x[HOOK] for b in store.sequential(HOOK, batch_size=500, split=None, skip=None)])
    z, masks = sae.encode(x).dense(64), class_masks(corpus, np.arange(corpus.n_tokens))
    doc, train_side = corpus.column("doc"), corpus.column("split") == 0
    peaks = [
        z[torch.from_numpy(masks["special_rest"] & (doc == d))].max(0).values
        for d in np.unique(doc[train_side])
    ]
    assert steering.template_latent(sae, store, HOOK) == int(torch.stack(peaks).mean(0).argmax())

    ids = torch.from_numpy(corpus.column("tok")[: corpus.seq_offsets[1]].astype(np.int64))[None]
    with torch.no_grad():
        log_p = tiny_model.forward(ids)[0][0].float().log_softmax(-1)
    answer = (corpus.column("role") == 3) & (corpus.column("flags") & FLAG_SPECIAL == 0)
    at = np.flatnonzero(answer[: ids.shape[1]])
    want = -np.mean([log_p[i - 1, ids[0, i]].item() for i in at])
    got = steering.answer_losses(tiny_model, corpus, [0], HOOK, None)
    assert got[0] == pytest.approx(want, rel=1e-4)
    shifted = steering.answer_losses(tiny_model, corpus, [0], HOOK, 50 * sae.W_dec[0].detach())
    assert shifted[0] != pytest.approx(want, rel=1e-3)
