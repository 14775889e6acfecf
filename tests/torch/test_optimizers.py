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
    np.testing.assert_allclose(table.lookup(keys), weight.detach().numpy(), rtol=1e-5, atol=1e-6)


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
