"""EmbeddingCollection from raw keys to the fused update, and the layers against plain formulas."""

import numpy as np
import pytest
import torch

import hbkit
import hbkit.torch as hb
from hbkit import embedding, errors
from hbkit.embedding import Staged
from hbkit_torch.data import Jagged, from_column

EVERYWHERE = pytest.mark.parametrize("place", ["host", "device"])


def keys(**columns):
    return {"user": np.array([1, 2, 1]), "item": np.array([7, 7, 9]), "tags": np.zeros((3, 1), np.int64), **columns}


def n_rows(collection):
    return {name: len(table) for name, table in collection.tables.items()}


@EVERYWHERE
def test_embeddings_train_creates_rows_and_apply_updates_them(collection):
    c = collection(4, optimizer=embedding.SGD(lr=0.5))
    module = hb.nn.EmbeddingCollection(c)
    out = module(keys())
    assert n_rows(c) == {"user": 2, "item": 2, "tag": 1}
    before = {f: out[f].detach().clone() for f in out}
    assert all(leaf.is_leaf and leaf.requires_grad and leaf.shape == (3, 4) for leaf in out.values())
    (out["user"].sum() + 2 * out["item"].sum() + 0 * out["tags"].sum()).backward()
    module.apply()
    assert c.step == 1
    after = module(keys())
    # Key 1 stands in two rows: its gradients are summed.
    step = torch.tensor([[1.0], [0.5], [1.0]])
    torch.testing.assert_close(after["user"].detach(), before["user"] - step)
    torch.testing.assert_close(after["item"].detach(), before["item"] - torch.tensor([[2.0], [2.0], [1.0]]))
    torch.testing.assert_close(after["tags"].detach(), before["tags"])


@EVERYWHERE
@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_embeddings_reading_creates_nothing(collection, how):
    c = collection(4)
    module = hb.nn.EmbeddingCollection(c)
    if how == "eval":
        out = module.eval()(keys())
    else:
        with torch.no_grad():
            out = module(keys())
    assert sum(n_rows(c).values()) == 0
    assert all(not leaf.requires_grad and not leaf.any() for leaf in out.values())
    with pytest.raises(errors.Closed, match="no forward to apply"):
        module.apply()


@EVERYWHERE
def test_embeddings_take_every_form_of_a_column(collection, core_columns):
    core = {name: core_columns[name] for name in ("user", "item", "tags")}
    tensors = {name: from_column(column) for name, column in core.items()}
    assert isinstance(tensors["tags"], Jagged)
    pair = {**tensors, "tags": (core["tags"].values, core["tags"].row_splits[0])}
    first, *others = (
        {f: t.detach() for f, t in hb.nn.EmbeddingCollection(collection(4))(batch).items()}
        for batch in (core, tensors, pair, {**core, "unused": "anything"})
    )
    for other in others:
        assert all(torch.equal(first[f], other[f]) for f in first)


def test_embeddings_and_gradients_share_the_memory_of_the_core(collection, monkeypatch):
    seen = {}
    outputs, apply = Staged.outputs, Staged.apply

    def spy_outputs(self, empty):
        seen["outputs"] = outputs(self, empty)
        return seen["outputs"]

    def spy_apply(self, grads, held):
        seen["grads"] = grads
        apply(self, grads, held)

    monkeypatch.setattr(Staged, "outputs", spy_outputs)
    monkeypatch.setattr(Staged, "apply", spy_apply)
    module = hb.nn.EmbeddingCollection(collection(4, pooling={"tags": None}))
    out = module(keys())
    leaves = {"user": out["user"], "item": out["item"], "tags": out["tags"].values}
    torch.cat([leaf.reshape(3, 4) for leaf in leaves.values()], 1).square().sum().backward()
    module.apply()
    for feature, leaf in leaves.items():
        core = seen["outputs"][feature]
        core = core.values if feature == "tags" else core
        assert leaf.data_ptr() == core.ctypes.data
        assert leaf.grad.data_ptr() == seen["grads"][feature].ctypes.data
    assert out["tags"].mask.data_ptr() == seen["outputs"]["tags"].mask.ctypes.data


@EVERYWHERE
def test_embeddings_without_pooling_give_rows_and_a_mask(collection):
    module = hb.nn.EmbeddingCollection(collection(4, pooling={"tags": None}))
    tags = hbkit.Ragged.from_lists([[3, 4, 5], [], [3]], np.int64)
    rows = module(keys(tags=tags))["tags"]
    assert rows.values.shape == (3, 4, 4) and rows.mask.tolist() == [[1, 1, 1, 0], [0] * 4, [1, 0, 0, 0]]
    assert torch.equal(rows.values[0, 0], rows.values[2, 0]) and not rows.values[1].any()
    rows.values[0, 1].sum().backward()
    module.apply()
    again = module(keys(tags=tags))["tags"].values
    changed = (again != rows.values).any(2)
    assert changed.tolist() == [[False, True, False, False], [False] * 4, [False] * 4]


@EVERYWHERE
def test_embeddings_drop_forgets_forwards_and_gradients(collection):
    c = collection(4)
    module = hb.nn.EmbeddingCollection(c)
    first = module(keys())
    before = {f: t.detach().clone() for f, t in first.items()}
    sum(t.sum() for t in first.values()).backward()
    module.zero_grad()
    with pytest.raises(errors.Closed, match="no forward to apply"):
        module.apply()
    second = module(keys())
    assert c.step == 0 and all(torch.equal(before[f], second[f]) for f in before)


def test_embeddings_apply_before_backward_is_refused_and_can_be_mended(collection):
    c = collection(4)
    module = hb.nn.EmbeddingCollection(c)
    out = module(keys())
    with pytest.raises(errors.Closed, match="backward"):
        module.apply()
    out["user"].sum().backward()
    module.apply()
    assert c.step == 1


@EVERYWHERE
def test_embeddings_leave_the_rows_of_an_unused_feature(collection):
    c = collection(4)
    module = hb.nn.EmbeddingCollection(c)
    out = module(keys())
    out["user"].sum().backward()
    module.apply()
    after = module(keys())
    assert torch.equal(out["item"], after["item"]) and not torch.equal(out["user"], after["user"])


def test_embeddings_keep_apply_of_a_function(collection):
    seen = []
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), hb.nn.EmbeddingCollection(collection(4)))
    model.apply(lambda module: seen.append(type(module).__name__))
    assert seen == ["Linear", "EmbeddingCollection", "Sequential"]


def test_embeddings_close_is_final_and_leaves_the_tables(collection):
    c = collection(4)
    module = hb.nn.EmbeddingCollection(c)
    module(keys())
    module.close()
    module.close()
    with pytest.raises(errors.Closed, match=r"closed.*user"):
        module(keys())
    hb.nn.EmbeddingCollection(c)(keys())


@pytest.mark.parametrize(
    ("batch", "error", "says"),
    [
        (keys(user=np.array([1.0, 2.0, 3.0])), errors.InvalidArgument, "float64.*user"),
        (keys(item=torch.tensor([True, False, True])), errors.InvalidArgument, "bool.*item"),
        (keys(tags=hbkit.Ragged.from_lists([[0.5], [], []], np.float32)), errors.InvalidArgument, "float32.*tags"),
        (keys(user=hbkit.Strings.from_list(["a", "b", "c"])), errors.InvalidArgument, "user.*hash_to"),
        (keys(user=torch.empty(3, dtype=torch.int64, device="meta")), errors.InvalidArgument, "meta.*user"),
        (keys(user=np.array([1, 2])), errors.InvalidArgument, "rows"),
        ({"user": np.array([1])}, errors.UnknownColumn, "not in the batch.*item"),
    ],
)
@EVERYWHERE
def test_embeddings_errors_name_the_feature(collection, batch, error, says):
    c = collection(4)
    module = hb.nn.EmbeddingCollection(c)
    with pytest.raises(error, match=says):
        module(batch)
    assert sum(n_rows(c).values()) == 0
    module(keys())  # and the module goes on


@EVERYWHERE
def test_attach_is_the_model_over_the_embeddings_of_a_batch(clicks, collection, dlrm):
    embeddings = hb.nn.EmbeddingCollection(collection(8))
    model = dlrm(8)
    whole = hb.nn.attach(model, embeddings, ignore=["click"])
    batch = next(iter(clicks(64, 64)))
    dense = torch.stack([batch["amount"], batch["age"].float()], 1)
    logits = whole(batch)
    assert torch.equal(logits, model(dense, embeddings(batch)))
    whole(batch).sum().backward()
    embeddings.apply()
    assert embeddings.collection.step == 1
    assert {id(p) for p in whole.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"amount": Jagged(torch.zeros(3), (torch.arange(4),))}, errors.InvalidArgument, "Ragged.*amount"),
        ({"amount": torch.zeros(3, device="meta")}, errors.InvalidArgument, "meta.*amount"),
        ({"amount": np.array(["a", "b", "c"])}, errors.InvalidArgument, "amount"),
        ({"item": Jagged(torch.zeros(3, dtype=torch.int64), (torch.arange(4),))}, errors.InvalidArgument, "item"),
        ({"user": torch.zeros(3)}, errors.InvalidArgument, "float32.*user"),
    ],
)
def test_attach_refuses_by_column(collection, dlrm, change, error, says):
    how = {"item": None}
    whole = hb.nn.attach(dlrm(8), hb.nn.EmbeddingCollection(collection(8, pooling=how)))
    batch = {"amount": torch.ones(3), "age": torch.ones(3), **keys()}
    whole(batch)
    with pytest.raises(error, match=says):
        whole({**batch, **change})
    whole.embeddings.close()
    with pytest.raises(errors.Closed, match="user, item, tags"):
        whole(batch)


def test_model_of_a_feature_without_a_table_is_refused(collection):
    module = hb.nn.EmbeddingCollection(collection(8))
    with pytest.raises(errors.UnknownColumn, match=r"no table.*city"):
        hb.nn.attach(hb.models.DLRM(["user", "city"], 8), module)({**keys(), "city": np.zeros(3, np.int64)})


def test_signed_log_is_odd_and_logarithmic():
    x = torch.tensor([-7.0, 0.0, 7.0])
    torch.testing.assert_close(hb.nn.SignedLog()(x), torch.tensor([-1.0, 0.0, 1.0]) * np.log(8))


def test_dot_interaction_is_each_pair_once():
    x = torch.randn(5, 4, 3)
    pairs = [(x[:, i] * x[:, j]).sum(1) for i in range(4) for j in range(i)]
    torch.testing.assert_close(hb.nn.DotInteraction()(x), torch.stack(pairs, 1))


def test_factorization_machine_is_the_sum_of_the_dot_interactions():
    x = torch.randn(5, 6, 3)
    torch.testing.assert_close(hb.nn.FactorizationMachine()(x), hb.nn.DotInteraction()(x).sum(1))


def test_cross_network_follows_its_formula():
    net, x = hb.nn.CrossNetwork(4, 2), torch.randn(3, 4)
    expected = x
    for layer in net.layers:
        expected = x * (expected @ layer.weight.T + layer.bias) + expected
    torch.testing.assert_close(net(x), expected)


def test_linear_layers_start_glorot_uniform_with_zero_bias():
    torch.manual_seed(0)
    mlp = hb.nn.MLP(300, [200, 1])
    first = mlp[0].weight
    bound = (6 / 500) ** 0.5
    assert first.abs().max() <= bound and first.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not mlp[0].bias.any() and not mlp[2].bias.any()
    assert [type(m).__name__ for m in mlp] == ["Linear", "ReLU", "Linear"]
    assert isinstance(hb.nn.MLP(3, [2], last_relu=True)[-1], torch.nn.ReLU)
