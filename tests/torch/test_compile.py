"""Compiled models: whole, once, and to the same figures, however many distinct keys a batch has."""

import shutil

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import hbkit.torch as hb


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


N_STEPS, SIZE = 200, 16
N_ROWS = N_STEPS * SIZE - 5  # the last batch is padded


class TagModel(torch.nn.Module):
    """Reads a sequence under its mask."""

    def __init__(self, dim):
        super().__init__()
        self.top = hb.nn.MLP(2 * dim, [16, 1])

    def forward(self, dense, embeddings):
        tags = embeddings["tags"]
        weights = torch.where(tags.mask, tags.values.sum(2), -1e9).softmax(1)
        pooled = (weights.unsqueeze(2) * tags.values).sum(1)
        return self.top(torch.cat([pooled, embeddings["user"]], 1)).squeeze(1)


def losses(compiled, ds, c, model):
    """Loss of each step; after the first, compiling again is an error."""
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    found, n_unique = [], set()
    for step in hb.pipeline(ds, c):
        with torch._dynamo.config.patch(error_on_recompile=bool(found)):
            logits = forward(step.dense, step.embeddings)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, step.label, step.weight)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        step.apply()
        found.append(loss.item())
        n_unique.add(len(c.tables["user"]))
    assert len(found) == N_STEPS and len(n_unique) > 10  # new keys kept coming
    return found


def padded(columns):
    return {**columns, "tags": columns["tags"].to_padded(4)}


@pytest.mark.parametrize("kind", hb.models.MODELS.values())
def test_model_compiles_whole_and_once(kind, clicks, collection, dlrm):
    ds, how = clicks(N_ROWS, SIZE), "mean"
    if kind is hb.models.DIN:
        ds, how = ds.map(padded), None
    runs = [losses(on, ds, collection(kind.row_dim(8), pooling={"tags": how}), dlrm(kind=kind)) for on in (True, False)]
    np.testing.assert_allclose(*runs, rtol=1e-5)


def test_model_of_a_padded_sequence_compiles_whole_and_once(clicks, collection):
    ds = clicks(N_ROWS, SIZE).map(padded)
    runs = []
    for on in (True, False):
        torch.manual_seed(0)
        runs.append(losses(on, ds, collection(pooling={"tags": None}), TagModel(8)))
    np.testing.assert_allclose(*runs, rtol=1e-5)


def test_sequences_compile_once_per_padded_length(clicks, collection):
    """L is the next power of two; dynamo makes no guesses about it."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.manual_seed(0)
    model, lengths = TagModel(8), set()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for step in hb.pipeline(clicks(400, 2), collection(pooling={"tags": None})):
        compiled(step.dense, step.embeddings).sum().backward()
        step.apply()
        lengths.add(step.embeddings["tags"].values.shape[1])
        assert counter.frame_count == len(lengths)
    assert lengths == {1, 2, 4}


def test_attached_model_may_be_compiled_behind_its_embeddings(clicks, collection, dlrm):
    model = dlrm()
    embeddings = hb.nn.EmbeddingCollection(collection())
    attached = hb.nn.attach(torch.compile(model, fullgraph=True, backend="aot_eager"), embeddings, ignore=["click"])
    whole = torch.compile(hb.nn.attach(model, embeddings, ignore=["click"]), backend="aot_eager")
    batch = next(iter(clicks(64, 64)))
    expected = hb.nn.attach(model, embeddings, ignore=["click"])(batch)
    torch.testing.assert_close(attached(batch), expected)
    torch.testing.assert_close(whole(batch), expected)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_trainer_compiled_by_inductor_trains_to_the_same_losses(clicks, collection, dlrm):
    ds = clicks(64 * 20 + 17, 64)
    runs = []
    for on in (True, False):
        found = []

        def on_step(n_rows, loss, found=found):
            found.append(loss)
            torch._dynamo.config.error_on_recompile = True

        with torch._dynamo.config.patch(error_on_recompile=False):
            hb.training.Trainer(dlrm(), collection(), compile=on).fit(ds, on_step)
        runs.append(found)
    np.testing.assert_allclose(*runs, rtol=1e-4)
