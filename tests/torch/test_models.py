"""DLRM and DeepFM: shapes, what they compute, what they refuse; and step by step against torch.nn.Embedding."""

import numpy as np
import pytest
import torch

import hbkit.torch as hb
from hbkit import embedding, errors

NAMES = ["user", "item", "tags"]


def rows(model, batch=5, names=NAMES):
    return {name: torch.randn(batch, model.row_dim(model.dim)) for name in names}


@pytest.mark.parametrize("kind", hb.models.MODELS.values())
@pytest.mark.parametrize("n_dense", [0, 3])
def test_model_gives_one_logit_a_row_and_all_its_parts_learn(kind, n_dense):
    model = kind(NAMES, 4, n_dense=n_dense)
    embeddings = {f: t.requires_grad_() for f, t in rows(model).items()}
    logits = model(torch.randn(5, n_dense), embeddings)
    assert logits.shape == (5,)
    logits.square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in [*embeddings.values(), *model.parameters()])


def test_models_are_those_of_the_registry():
    assert list(hb.models.MODELS.items()) == [("dlrm", hb.models.DLRM), ("deepfm", hb.models.DeepFM)]
    assert (hb.models.DLRM.row_dim(16), hb.models.DeepFM.row_dim(16)) == (16, 17)


def test_deepfm_without_its_deep_part_is_a_factorization_machine():
    model = hb.models.DeepFM(NAMES, 4)
    torch.nn.init.zeros_(model.deep[-1].weight)
    embeddings = rows(model)
    x = torch.stack([embeddings[f] for f in NAMES], 1)
    pairs = [(x[:, i, 1:] * x[:, j, 1:]).sum(1) for i in range(3) for j in range(i)]
    torch.testing.assert_close(model(torch.empty(5, 0), embeddings), x[:, :, 0].sum(1) + sum(pairs))


@pytest.mark.parametrize("kind", hb.models.MODELS.values())
def test_model_names_the_feature_it_cannot_use(kind):
    model = kind(NAMES, 4)
    with pytest.raises(errors.UnknownColumn, match=r"no table.*tags"):
        model(torch.empty(5, 0), rows(model, names=["user", "item"]))
    with pytest.raises(errors.InvalidArgument, match=r"width 9.*tags"):
        model(torch.empty(5, 0), {**rows(model), "tags": torch.randn(5, 9)})
    with pytest.raises(errors.InvalidArgument, match=r"sequence.*tags"):
        model(torch.empty(5, 0), {**rows(model), "tags": (torch.randn(5, 2, 4), torch.ones(5, 2).bool())})


class Plain(torch.nn.Module):
    """The same model over torch's own embeddings."""

    def __init__(self, model, tables):
        super().__init__()
        self.model = model
        self.tables = torch.nn.ModuleDict(
            {
                f: torch.nn.EmbeddingBag.from_pretrained(torch.from_numpy(t.copy()), freeze=False, mode=mode)
                for f, (t, mode) in tables.items()
            }
        )

    def forward(self, dense, batch):
        tags = batch["tags"]
        out = {f: self.tables[f](batch[f][:, None]) for f in ("user", "item")}
        out["tags"] = self.tables["tags"](tags.values, tags.row_splits[0][:-1])
        return self.model(dense, out)


OPTIMIZERS = {
    "sgd": (embedding.SGD(lr=2.0), lambda p: torch.optim.SGD(p, lr=2.0)),
    "adagrad": (embedding.Adagrad(lr=0.05), lambda p: torch.optim.Adagrad(p, lr=0.05)),
}


@pytest.mark.parametrize("kind", hb.models.MODELS.values())
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_model_trains_as_over_torch_embeddings(kind, optimizer, clicks, collection, dlrm):
    ours, theirs = OPTIMIZERS[optimizer]
    width = kind.row_dim(8)
    c = collection(width, optimizer=ours)
    every_key = {"user": np.arange(200), "item": np.arange(200) + 10**12, "tag": np.arange(30)}
    first = {name: table.lookup(every_key[name], train=True) for name, table in c.tables.items()}
    twin = Plain(
        dlrm(kind=kind),
        {"user": (first["user"], "sum"), "item": (first["item"], "sum"), "tags": (first["tag"], "mean")},
    )
    trainer = hb.training.Trainer(dlrm(kind=kind), c, optimizer="adagrad", lr=0.01)
    dense_optimizer = torch.optim.Adagrad(twin.model.parameters(), lr=0.01)
    table_optimizer = theirs(twin.tables.parameters())
    expected = []
    ds = clicks(128 * 50, 128)
    for batch in ds:
        dense = torch.stack([batch["amount"], batch["age"].float()], 1)
        logits = twin(dense, {**batch, "item": batch["item"] - 10**12})
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["click"])
        dense_optimizer.zero_grad()
        table_optimizer.zero_grad()
        loss.backward()
        dense_optimizer.step()
        table_optimizer.step()
        expected.append(loss.item())
    losses = []
    trainer.fit(ds, lambda n, loss: losses.append(loss))
    assert len(losses) == 50
    np.testing.assert_allclose(losses, expected, atol=1e-4, rtol=0)
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.02  # it has learnt, so agreeing means something
