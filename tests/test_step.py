"""The optimiser step of a `Trainer` against a textbook one: what its shortcuts (buffers, fused clip) must not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saes import presets
from saes.config import SAEConfig
from saes.kernels import Dead, sparse_step
from saes.row_topk import largest
from saes.sources import Moments
from saes.train_config import TrainConfig
from saes.trainer import Trainer

D, F, K, B = 16, 96, 4, 64
DEAD = torch.tensor([3, 10, 11, 40, 95])


def rows(n: int = 4 * B) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(3)) + 0.5


def trainer(cfg: SAEConfig, **more: object) -> Trainer:
    x = rows()
    config = TrainConfig(
        steps=100, batch_size=B, lr=1e-2, warmup_steps=1, decay_fraction=0.0, screen="off", **more
    )  # type: ignore[arg-type]
    t = Trainer(cfg, config, Moments(len(x), x.norm(dim=1).mean().item()), x.device)
    t.start(x)
    if cfg.auxk:
        t.dead = Dead(DEAD, 2)
        t.refresh_dead = lambda: None  # type: ignore[method-assign]
    return t


class Textbook:
    """Dense autograd in the space of training, explicit projection, torch's clip and unfused Adam."""

    def __init__(self, t: Trainer) -> None:
        self.t = t
        s = t.sae
        self.p = [p.detach().clone().requires_grad_() for p in (s.W_enc, s.b_enc, s.W_dec, s.b_dec)]
        self.adam = torch.optim.Adam(self.p, lr=1e-2, eps=t.train.eps, foreach=False, fused=False)

    def step(self, x: Tensor) -> None:
        we, be, wd, bd = self.p
        x = x * self.t.scale
        u = (x - bd) @ we.T + be
        z = (u * torch.zeros_like(u).scatter(1, u.topk(K, dim=1).indices, 1.0)).relu()
        e = x - (z @ wd + bd)
        ud = u[:, DEAD]
        e_hat = (ud * torch.zeros_like(ud).scatter(1, ud.topk(2, dim=1).indices, 1.0)) @ wd[DEAD]
        left = e.detach()
        aux = ((e_hat - left) ** 2).sum() / ((left - left.mean(0)) ** 2).sum()
        share = min(1.0, len(DEAD) / self.t.cfg.aux_width())
        loss = (e**2).sum() / (len(x) * self.t.variance) + share * aux / 32
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert wd.grad is not None
            wd.grad -= (wd.grad * wd).sum(1, keepdim=True) * wd
            torch.nn.utils.clip_grad_norm_(self.p, self.t.train.grad_clip)
            self.adam.step()
            wd /= wd.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_steps_equal_dense_autograd_projection_clip_and_adam(clip: float) -> None:
    """Five steps, so that buffers are written again and Adam's moments matter; clipped and not."""
    t = trainer(presets.topk(d_sae=F, k=K, d_model=D), grad_clip=clip)
    book = Textbook(t)
    for i in range(5):
        x = rows()[i % 4 * B : (i % 4 + 1) * B]
        t.step(x, 1)
        book.step(x)
    s = t.sae
    for name, got, want in zip(
        ["W_enc", "b_enc", "W_dec", "b_dec"], (s.W_enc, s.b_enc, s.W_dec, s.b_dec), book.p
    ):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "preset", ["topk", "abs_topk", "batch_topk", "matryoshka", "jumprelu", "relu_l1", "gated"]
)
def test_buffers_give_the_gradients_that_autograd_gives(preset: str, monkeypatch) -> None:
    """Slices of a few latents, so that a latent may be first or last of one, and whole slices may be silent."""
    monkeypatch.setattr("saes.gradients.SLICE_BYTES", 5 * D * 4)
    more = {"k": K} if "topk" in preset or preset == "matryoshka" else {}
    cfg = getattr(presets, preset)(d_sae=F, d_model=D, **more)
    own, plain = trainer(cfg), trainer(cfg)
    assert own._into is not None
    plain._into = None
    for i in range(3):
        x = rows()[i * B : (i + 1) * B]
        own.step(x, 1)
        plain.step(x, 1)
    for (name, a), b in zip(own.sae.named_parameters(), plain.sae.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 32, 48, 64])
def test_search_by_groups_finds_the_largest_of_each_row(dtype: torch.dtype, k: int) -> None:
    """bfloat16 has many equal values: those found must be as large, and no column twice."""
    u = torch.randn(20, 4096, generator=torch.Generator().manual_seed(k)).to(dtype)
    values, ids = largest(u, k)
    assert torch.equal(values.sort(1).values, u.topk(k, dim=1).values.sort(1).values)
    assert torch.equal(values, u.gather(1, ids))
    assert all(len(set(row)) == k for row in ids.tolist())


def test_rows_all_equal_or_with_one_large_group_are_searched_right() -> None:
    u = torch.zeros(3, 4096)
    u[1, torch.arange(8) * 512 + 5] = 1.0  # eight of the k largest stand in one group
    u[2] = -torch.arange(4096.0)
    values, ids = largest(u, 32)
    assert torch.equal(values.sort(1).values, u.topk(32, dim=1).values.sort(1).values)
    assert all(len(set(row)) == 32 for row in ids.tolist())


def test_auxk_in_bfloat16_stays_near_its_float32_gradients() -> None:
    gen = torch.Generator().manual_seed(0)
    shapes = ((B, D), (F, D), (F,), (F, D), (D,))
    grads = []
    for coarse in (False, True):
        gen.manual_seed(0)
        p = [torch.randn(s, generator=gen).requires_grad_() for s in shapes]
        out = sparse_step(*p, k=K, dead=Dead(DEAD, 5, coarse=coarse))
        ((out.e_hat - (p[0] - out.x_hat).detach()) ** 2).sum().backward()
        grads.append([p[1].grad, p[3].grad])
    for exact, near in zip(*grads):
        assert exact is not None and near is not None
        assert (near - exact).norm() < 0.01 * exact.norm()
