"""Models that are not language models: a CNN's feature maps are stored, streamed, asked for and trained on like text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cache import (
    Corpus,
    ModuleModel,
    build_contexts,
    build_corpus,
    connect,
    grid_columns,
    harvest,
    load_module,
)
from cache.errors import AtomscopeError, DataError, UsageError
from tests.tiny import SENTENCES, tiny_tokenizer

CONV = "conv2"
C, H, W = 12, 8, 8


class Net(nn.Module):
    """Two convolutions and a head; batch norm, so that eval mode matters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, C, 3, padding=1)
        self.head = nn.Linear(C, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, list[int]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images[:300]).float()[:, None] / 16, data.target[:300].tolist()


@pytest.fixture(scope="module")
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().train()


@pytest.fixture(scope="module")
def model(net: Net, digits: tuple[Tensor, list[int]]) -> ModuleModel:
    return load_module(net, ["conv1", CONV, "head"], digits[0][:4], name="digits-cnn")


@pytest.fixture(scope="module")
def made(
    model: ModuleModel, digits: tuple[Tensor, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Corpus, Any]:
    root = tmp_path_factory.mktemp("digits")
    images, target = digits
    corpus = build_contexts(
        images,
        rows=H * W,
        columns=grid_columns(H, W),
        labels={"digit": target},
        name="digits",
        workspace=root,
    )
    options: dict[str, Any] = {"rows_per_shard": 5000, "batch_tokens": 1000, "show_progress": False}
    return corpus, harvest(model, corpus, hooks=["conv1", CONV], workspace=root, dtype="fp32", **options)


def feature_maps(net: Net, images: Tensor) -> Tensor:
    """[N, C, H, W] without any hook."""
    was = net.training
    net.eval()
    with torch.no_grad():
        out = net.conv2(torch.relu(net.norm(net.conv1(images))))
    net.train(was)
    return out


def test_each_row_is_the_feature_vector_at_its_place_in_the_image(
    made: tuple[Corpus, Any], net: Net, digits: tuple[Tensor, list[int]]
) -> None:
    corpus, store = made
    maps = feature_maps(net, digits[0])
    assert store.complete(CONV) and len(store.shards) > 2 and store.d(CONV) == C and net.training
    seq, y, x = (torch.from_numpy(corpus.column(c).astype(np.int64)) for c in ("seq", "y", "x"))
    got = store.rows(CONV, ids=range(corpus.n_tokens))
    assert torch.allclose(got, maps[seq, :, y, x], atol=1e-5)
    assert corpus.n_tokens == len(maps) * H * W and store.verify() == []


def test_rows_are_asked_for_by_their_place_and_their_images_label(
    made: tuple[Corpus, Any], net: Net, digits: tuple[Tensor, list[int]]
) -> None:
    corpus, store = made
    maps, target = feature_maps(net, digits[0]), np.array(digits[1])
    got = store.rows(CONV, where="y = 2 AND x > 5 AND label_digit = 7")
    want = maps[target == 7][:, :, 2, 6:].transpose(1, 2).reshape(-1, C)
    assert len(got) == 2 * (target == 7).sum() and torch.allclose(got, want, atol=1e-5)
    con = connect(corpus.path.parents[1])
    query = f"SELECT count(*), avg(r.norm) FROM rows_{CONV} r JOIN tokens t USING (corpus, row) WHERE t.y = 0"
    [(n, mean)] = con.sql(query).fetchall()
    assert n == len(maps) * W
    assert np.isclose(mean, maps[:, :, 0].norm(dim=1).mean().item(), rtol=1e-5)
    assert con.sql("SELECT DISTINCT token FROM tokens").fetchall() == [("",)]


def test_readers_leave_out_no_row_of_an_image(made: tuple[Corpus, Any]) -> None:
    corpus, store = made
    train = np.flatnonzero(corpus.column("split") == 0)
    assert 0 < len(train) < corpus.n_tokens
    rows = store.rows(CONV, ids=train).double()
    stats = store.stats(CONV)
    assert stats.n == len(train) and np.allclose(stats.mean, rows.mean(0).numpy(), atol=1e-9)
    stream = store.stream(["conv1", CONV], batch_size=500)
    batch = next(stream)
    stream.close()
    assert stream.rows_per_epoch == len(train)
    assert torch.equal(batch.x[CONV], store.rows(CONV, ids=batch.row.numpy()))


def test_an_sae_is_trained_evaluated_and_spliced_without_a_language_model(
    made: tuple[Corpus, Any], model: ModuleModel, digits: tuple[Tensor, list[int]]
) -> None:
    from saes import TrainConfig, attach, evaluate, presets, train

    config = TrainConfig(steps=150, batch_size=512, lr=3e-3, log_every=50)
    result = train(made[1], [presets.topk(d_sae=48, k=4)], config, hook=CONV)[0]
    found = evaluate(result.sae, made[1], None)
    assert found.value("fvu") < 0.2
    before = model(digits[0][:5])
    with attach(model, {CONV: result.sae}, skip_first=False, error=True) as spliced:
        same = model(digits[0][:5])
        assert spliced.codes[CONV].values.shape == (5 * H * W, 4)
    with attach(model, {CONV: result.sae}, skip_first=False, error=False):
        changed = model(digits[0][:5])
    assert torch.allclose(same, before, atol=1e-5) and not torch.allclose(changed, before, atol=1e-5)


def test_a_hook_is_added_later_and_nothing_else_is_written(
    made: tuple[Corpus, Any], net: Net, digits: Any
) -> None:
    corpus, store = made
    again = load_module(net, ["conv1", CONV, "norm"], digits[0][:4], name="digits-cnn")
    before = {p: p.stat().st_mtime_ns for p in store.path.rglob("*.parquet")}
    more = harvest(
        again, corpus, hooks=[CONV, "norm"], workspace=store.workspace, dtype="fp32", show_progress=False
    )
    assert more.path == store.path and set(more.hooks) == {"conv1", CONV, "norm"}
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_other_weights_layouts_or_names_are_another_store(net: Net, digits: tuple[Tensor, list[int]]) -> None:
    x = digits[0][:4]
    base = load_module(net, [CONV], x).identity
    assert load_module(net, ["conv1"], x).identity == base
    others = [
        load_module(net, {"mine": CONV}, x),
        load_module(net, [CONV], x, layouts={CONV: "b c h w -> b (w h) c"}),
        load_module(Net(), [CONV], x),
    ]
    assert all(o.identity != base for o in others)


def test_an_edit_is_undone_and_keeps_the_shape(model: ModuleModel, digits: tuple[Tensor, list[int]]) -> None:
    x = digits[0][:3]
    plain = model(x)
    with model.hooked({CONV: lambda a: torch.zeros_like(a)}):
        assert torch.allclose(model(x), model.module.head.bias.expand(3, 10))  # type: ignore
    with model.hooked({CONV: lambda a: a}):
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)


def test_inputs_of_modules_and_sequences_are_rows_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.Tanh())
    boards = torch.randint(0, 20, (30, 7))
    model = load_module(layer, ["1:input", "2"], boards[:4], name="boards")
    assert model.hook_names() == ["1.hook_in", "2"] and model.rows("2") == 7
    corpus = build_contexts(
        boards, rows=7, tokens=boards, vocab=[f"s{i}" for i in range(20)], workspace=tmp_path
    )
    store = harvest(model, corpus, hooks=["1.hook_in"], workspace=tmp_path, dtype="fp32", show_progress=False)
    got = store.rows("1.hook_in", where="token = 's3'")
    assert len(got) == int((boards == 3).sum())
    assert torch.equal(got, layer[0].weight[3].detach().expand_as(got))


def test_vectors_are_contexts_of_one_row_and_the_split_may_be_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, net = torch.randn(40, 5), nn.Sequential(nn.Linear(5, 6), nn.ReLU())
    split = ["heldout" if i % 4 == 0 else "train" for i in range(40)]
    corpus = build_contexts(x, split=split, workspace=tmp_path)
    store = harvest(
        load_module(net, ["0"], x[:2]), corpus, hooks="0", workspace=tmp_path, show_progress=False
    )
    assert store.stats("0").n == 30 and store.stats("0", split="heldout").n == 10
    assert build_contexts(x, split=split, workspace=tmp_path).path == corpus.path
    assert build_contexts(x + 1, split=split, workspace=tmp_path).path != corpus.path


def test_a_module_with_a_tokenizer_reads_a_text_corpus(tmp_path: Path) -> None:
    tok = tiny_tokenizer()
    net = nn.Sequential(nn.Embedding(len(tok), 8), nn.LayerNorm(8))
    model = load_module(net, ["1"], torch.randint(0, 9, (2, 3)), tokenizer=tok)
    corpus = build_corpus(SENTENCES[:20], tok, workspace=tmp_path)
    store = harvest(model, corpus, hooks="1", workspace=tmp_path, dtype="fp32", show_progress=False)
    want = net(torch.from_numpy(corpus.column("tok").astype(np.int64)))
    assert torch.allclose(store.rows("1", ids=range(corpus.n_tokens)), want, atol=1e-6)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - x.mean(0))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


def test_wrong_uses_are_one_line_that_says_what_to_do(
    net: Net, model: ModuleModel, digits: Any, tmp_path: Path, tiny_model: Any
) -> None:
    images, x = digits[0][:20], torch.randn(6, 5)
    flat = build_contexts(images, name="flat", workspace=tmp_path)
    text = build_corpus(SENTENCES[:9], tiny_model.tokenizer, workspace=tmp_path)
    go: dict[str, Any] = {"workspace": tmp_path, "show_progress": False}
    cases: list[tuple[Any, type[AtomscopeError], str]] = [
        (lambda: load_module(net, ["conv3"], images), UsageError, "did you mean conv"),
        (lambda: load_module(net, [CONV], images[:1]), UsageError, "at least two"),
        (lambda: load_module(net, [CONV], images, layouts={CONV: "b t d -> b t d"}), UsageError, "layout"),
        (lambda: load_module(Mixing(), ["inner"], x), DataError, "other contexts"),
        (lambda: load_module(Twice(), ["inner"], x), UsageError, "more than once"),
        (lambda: harvest(model, flat, hooks=CONV, **go), UsageError, "rows=64"),
        (lambda: harvest(model, flat, hooks="conv9", **go), UsageError, "did you mean"),
        (lambda: harvest(model, text, hooks=CONV, **go), UsageError, "no tokenizer"),
        (
            lambda: harvest(tiny_model, flat, hooks="blocks.0.hook_resid_post", **go),
            UsageError,
            "build_corpus",
        ),
        (
            lambda: build_contexts(images, rows=4, columns={"pos": range(4)}, workspace=tmp_path),
            UsageError,
            "taken",
        ),
        (
            lambda: build_contexts(images, rows=4, columns={"y": [1]}, workspace=tmp_path),
            UsageError,
            "column 'y'",
        ),
        (lambda: build_contexts(images, labels={"d": [1]}, workspace=tmp_path), UsageError, "20 contexts"),
        (lambda: build_contexts(images * float("nan"), workspace=tmp_path), DataError, "context 0"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message) as e:
            call()
        assert "\n" not in str(e.value)
