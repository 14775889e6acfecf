"""The models: shapes, what they compute, what they refuse; and step by step against torch.nn.Embedding."""

import numpy as np
import pytest
import torch

import hbkit.torch as hb
from hbkit import embedding, errors
from hbkit_torch.pipeline import Sequence

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
    names = ["DLRM", "DeepFM", "XDeepFM", "DCNv2", "PNN", "MMoE", "DIN"]
    assert list(hb.models.MODELS.items()) == [(name.lower(), getattr(hb.models, name)) for name in names]
    assert [kind.row_dim(16) for kind in hb.models.MODELS.values()] == [16, 17, 17, 16, 16, 16, 16]


def test_models_start_glorot_uniform_with_zero_bias():
    for kind in hb.models.MODELS.values():
        options = {hb.models.DIN: {"sequences": {"seen": "user"}}, hb.models.MMoE: {"n_tasks": 2}}.get(kind, {})
        for name, weight in kind(NAMES, 16, 13, **options).named_parameters():
            if weight.ndim == 2:
                limit = (6 / sum(weight.shape)) ** 0.5
                assert weight.abs().max() <= limit, name
                if weight.numel() > 1000:
                    assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)
            else:
                assert not weight.any(), name


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


def test_din_needs_its_sequence_and_its_target():
    model = hb.models.DIN(NAMES, 4, sequences={"seen": "item"})
    seen = Sequence(torch.randn(5, 2, 4), torch.ones(5, 2).bool())
    embeddings = {**rows(model), "seen": seen}
    assert model(torch.empty(5, 0), embeddings).shape == (5,)
    with pytest.raises(errors.InvalidArgument, match=r"needs a sequence.*seen"):
        model(torch.empty(5, 0), {**embeddings, "seen": embeddings["item"]})
    with pytest.raises(errors.UnknownColumn, match=r"no table.*seen"):
        model(torch.empty(5, 0), rows(model))


@pytest.mark.parametrize("n_tasks", [1, 3])
def test_mmoe_gives_a_logit_for_each_task(n_tasks):
    model = hb.models.MMoE(NAMES, 4, n_tasks=n_tasks)
    logits = model(torch.empty(5, 0), rows(model))
    assert logits.shape == ((5, 3) if n_tasks == 3 else (5,))
    logits.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


class Plain(torch.nn.Module):
    """The same model over torch's own embeddings."""

    def __init__(self, model, tables):
        super().__init__()
        self.model = model
        self.tables = torch.nn.ModuleDict(
            {
                f: torch.nn.EmbeddingBag.from_pretrained(torch.from_numpy(t.copy()), freeze=False, mode=mode)
                if mode
                else torch.nn.Embedding.from_pretrained(torch.from_numpy(t.copy()), freeze=False)
                for f, (t, mode) in tables.items()
            }
        )

    def forward(self, dense, batch):
        tags = batch["tags"]
        out = {f: self.tables[f](batch[f][:, None]) for f in ("user", "item")}
        if isinstance(self.tables["tags"], torch.nn.Embedding):
            parts = [self.tables["tags"](part) for part in tags.values.tensor_split(tags.row_splits[0][1:-1])]
            lengths = tags.row_splits[0].diff()
            values = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
            out["tags"] = Sequence(values, torch.arange(values.shape[1]) < lengths[:, None])
        else:
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
    how = None if kind is hb.models.DIN else "mean"
    c = collection(width, optimizer=ours, pooling={"tags": how})
    every_key = {"user": np.arange(200), "item": np.arange(200) + 10**12, "tag": np.arange(30)}
    first = {name: table.lookup(every_key[name], train=True) for name, table in c.tables.items()}
    twin = Plain(
        dlrm(kind=kind),
        {"user": (first["user"], "sum"), "item": (first["item"], "sum"), "tags": (first["tag"], how)},
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


@pytest.mark.parametrize("kind", hb.models.MODELS.values())
def test_model_takes_rows_side_by_side_to_the_same_bits(kind, clicks, collection, dlrm, rows_of):
    """Losses, rows and parameters are those of features apart; a stack of another model is refused."""
    ds, found = clicks(700, 64), []
    for stacked in (True, False):
        c = collection(kind.row_dim(8), pooling={"tags": None if kind is hb.models.DIN else "mean"})
        model = dlrm(kind=kind)
        if stacked:
            c = embedding.Collection(list(c.tables.values()), c.features, c.pooling, kind.stack(model.features))
            assert bool(c.stack) == (kind is not hb.models.DIN)
        losses = []
        hb.training.Trainer(model, c).fit(ds, lambda n, loss, losses=losses: losses.append(loss))
        found.append((losses, rows_of(c), [p.detach().numpy() for p in model.parameters()]))
    np.testing.assert_equal(*found)
    if kind is not hb.models.DIN:
        (name,) = kind.stack(NAMES)
        with pytest.raises(errors.InvalidArgument, match="stack of 2 features"):
            kind(NAMES, 8)(torch.empty(5, 0), {name: torch.randn(5, 2, 8)})
