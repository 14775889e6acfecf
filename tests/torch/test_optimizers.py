"""The core's optimizers against PyTorch's own dense ones, on rows that every step touches."""

import numpy as np
import pytest
import torch

from hbkit.embedding import SGD, Adagrad, Adam, AdamW, Normal, Table

PAIRS = [
    (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (SGD(lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    (Adagrad(lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
    (Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    (AdamW(lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01)),
    (
        SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    (
        Adagrad(lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator=0.2, eps=1e-3),
        lambda p: torch.optim.Adagrad(
            p, lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.2, eps=1e-3
        ),
    ),
    (Adam(lr=0.01, weight_decay=0.1), lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
    (Adam(lr=0.01, correction="row"), lambda p: torch.optim.Adam(p, lr=0.01)),
    (
        AdamW(lr=0.01, betas=(0.8, 0.99), eps=1e-4, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.99), eps=1e-4, weight_decay=0.3),
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda c: str(c) if not callable(c) else "")
def test_optimizer_equals_torch(ours, theirs):
    table, keys = Table("t", 16, optimizer=ours, initializer=Normal(0, 0.1)), np.arange(50)
    weight = torch.nn.Parameter(torch.from_numpy(table.lookup(keys, train=True)))
    optimizer, rng = theirs([weight]), np.random.default_rng(0)
    for _ in range(20):
        grads = rng.normal(size=(50, 16)).astype(np.float32)
        weight.grad = torch.from_numpy(grads)
        optimizer.step()
        table.update(keys, grads)
    np.testing.assert_allclose(table.lookup(keys), weight.detach().numpy(), rtol=1e-6, atol=1e-6)


def test_clip_value_equals_torch():
    table, keys = Table("t", 16, optimizer=SGD(lr=0.1, clip_value=0.5), initializer=Normal(0, 0.1)), np.arange(50)
    weight = torch.nn.Parameter(torch.from_numpy(table.lookup(keys, train=True)))
    grads = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    weight.grad = torch.from_numpy(grads)
    torch.nn.utils.clip_grad_value_([weight], 0.5)
    torch.optim.SGD([weight], lr=0.1).step()
    table.update(keys, grads)
    np.testing.assert_allclose(table.lookup(keys), weight.detach().numpy(), rtol=1e-6, atol=1e-7)


def test_row_correction_equals_torch_adam_of_each_row_alone():
    table, keys = Table("t", 8, optimizer=Adam(lr=0.01, correction="row"), initializer=Normal(0, 0.1)), np.arange(10)
    rows = [torch.nn.Parameter(r) for r in torch.from_numpy(table.lookup(keys, train=True))]
    optimizers, rng = [torch.optim.Adam([r], lr=0.01) for r in rows], np.random.default_rng(0)
    for _ in range(20):
        touched = np.sort(rng.choice(10, 4, replace=False))
        grads = rng.normal(size=(4, 8)).astype(np.float32)
        for k, g in zip(touched, grads, strict=True):
            rows[k].grad = torch.from_numpy(g)
            optimizers[k].step()
        table.update(touched, grads)
    np.testing.assert_allclose(table.lookup(keys), torch.stack(rows).detach().numpy(), rtol=1e-6, atol=1e-6)


def test_adam_equals_torch_sparse_adam_on_rows_that_rest():
    table, keys = Table("t", 8, optimizer=Adam(lr=0.01), initializer=Normal(0, 0.1)), np.arange(30)
    bag = torch.nn.Embedding(30, 8, sparse=True)
    bag.weight.data = torch.from_numpy(table.lookup(keys, train=True))
    optimizer, rng = torch.optim.SparseAdam(bag.parameters(), lr=0.01), np.random.default_rng(0)
    for _ in range(20):
        touched = rng.integers(0, 30, 20)
        grads = rng.normal(size=(20, 8)).astype(np.float32)
        optimizer.zero_grad()
        (bag(torch.from_numpy(touched)) * torch.from_numpy(grads)).sum().backward()
        optimizer.step()
        table.update(touched, grads)
    np.testing.assert_allclose(table.lookup(keys), bag.weight.detach().numpy(), rtol=1e-4, atol=2e-6)
