"""EmbeddingCollection as a training loop uses it: accumulation, scaling, clipping, backward, checkpoints."""

import copy

import numpy as np
import pytest
import torch

import hbkit.torch as hb
from hbkit import embedding, errors
from hbkit_torch.data import Jagged

EVERYWHERE = pytest.mark.parametrize("place", ["host", "device"])
MATCH = "update='backward'.*update='apply'"


def batch(n, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, n)
    splits = np.concatenate([[0], np.cumsum(lengths)])
    return {
        "user": torch.from_numpy(rng.integers(0, 20, n)),
        "item": torch.from_numpy(rng.integers(0, 20, n)),
        "tags": Jagged(torch.from_numpy(rng.integers(0, 9, splits[-1])), (torch.from_numpy(splits),)),
    }


def joined(batches):
    splits = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(b["tags"].row_splits[0]) for b in batches]))])
    tags = Jagged(torch.cat([b["tags"].values for b in batches]), (torch.from_numpy(splits),))
    return {**{f: torch.cat([b[f] for b in batches]) for f in ("user", "item")}, "tags": tags}


class Top(torch.nn.Module):
    """A few dense weights over the three features."""

    def __init__(self, dim=4):
        super().__init__()
        torch.manual_seed(0)
        self.mlp = hb.nn.MLP(3 * dim, [8, 1])

    def forward(self, embeddings):
        return self.mlp(torch.cat(list(embeddings.values()), 1)).squeeze(1)


def target(batch):
    return (batch["user"] % 2).float()


def loss_of(model, module, batch, n=None):
    losses = torch.nn.functional.binary_cross_entropy_with_logits(model(module(batch)), target(batch), reduction="none")
    return losses.sum() / (n or len(losses))


def same(found, expected, **tolerance):
    for name in expected:
        if tolerance:
            np.testing.assert_allclose(found[name], expected[name], **tolerance)
        else:
            np.testing.assert_array_equal(found[name], expected[name])


@EVERYWHERE
@pytest.mark.parametrize("optimizer", [embedding.SGD(lr=0.5), embedding.Adam(lr=0.1)])
def test_accumulation_is_one_update_of_the_joined_batch(collection, rows_of, optimizer):
    batches, runs = [batch(n, n) for n in (5, 3, 8)], []
    for parts in ([batches[0], batches[1], batches[2]], [joined(batches)]):
        c, model = collection(4, optimizer=optimizer), Top()
        module, dense = hb.nn.EmbeddingCollection(c), torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            dense.zero_grad()
            for part in parts:
                loss_of(model, module, part, n=16).backward()
                with torch.no_grad():  # a look between
                    module(part)
            dense.step()
            module.apply()
        assert c.step == 2
        runs.append((rows_of(c), model.state_dict()))
    same(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-6)
    same(runs[0][1], runs[1][1], rtol=1e-4, atol=1e-6)


@EVERYWHERE
def test_two_forwards_of_one_loss_are_both_updated(collection, rows_of):
    """As two towers over one collection."""
    first, second = batch(6, 0), batch(6, 1)
    runs = []
    for joint in (False, True):
        c = collection(4, optimizer=embedding.SGD(lr=1.0))
        module = hb.nn.EmbeddingCollection(c)
        if joint:
            out = module(joined([first, second]))["user"]
            left, right = out[:6], out[6:]
        else:
            left, right = module(first)["user"], module(second)["user"]
        (left * right).sum().backward()
        module.apply()
        runs.append(rows_of(c))
    same(*runs, rtol=1e-5, atol=1e-7)


@EVERYWHERE
def test_pipeline_accumulates(clicks, collection, dlrm, rows_of):
    runs = []
    for size, k in ((64, 2), (128, 1)):
        c, model = collection(optimizer=embedding.SGD(lr=0.5)), dlrm()
        with hb.pipeline(clicks(512, size), c) as steps:
            for i, s in enumerate(steps):
                (model(s.dense, s.embeddings).square().sum() / 128).backward()
                if i % k < k - 1:
                    s.accumulate()
                    with pytest.raises(errors.Closed, match="was held"):
                        s.accumulate()
                else:
                    assert len(s.leaves) == 3 * k
                    s.apply()
                    with pytest.raises(errors.Closed, match="was applied"):
                        s.apply()
        assert c.step == 4
        runs.append(rows_of(c))
    same(*runs, rtol=1e-4, atol=1e-6)


def test_pipeline_accumulates_gradients_only(clicks, collection):
    with hb.pipeline(clicks(128, 64), collection()) as steps:
        for s in steps:
            with pytest.raises(errors.Closed, match="backward"):
                s.accumulate()


# ------------------------------------------------------------------------------------- scaling and clipping


def scaler(**options):
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**10, "growth_interval": 1000, **options})


@EVERYWHERE
@pytest.mark.parametrize("clip", [False, True])
def test_scaled_training_is_that_without_a_scaler(collection, rows_of, clip):
    runs = []
    for scale in (None, scaler()):
        c, model = collection(4, optimizer=embedding.SGD(lr=0.5)), Top()
        module, dense = hb.nn.EmbeddingCollection(c), torch.optim.SGD(model.parameters(), 0.1)
        for seed in range(3):
            loss = loss_of(model, module, batch(8, seed))
            dense.zero_grad()
            (loss if scale is None else scale.scale(loss)).backward()
            if clip:
                if scale is not None:
                    for part in (dense, module):
                        scale.unscale_(part)
                parameters = [*model.parameters(), *module.leaves]
                before = torch.cat([p.grad.flatten() for p in parameters]).norm()
                norm = torch.nn.utils.clip_grad_norm_(parameters, 0.05)
                torch.testing.assert_close(norm, before)
                after = torch.cat([p.grad.flatten() for p in parameters]).norm()
                torch.testing.assert_close(after, torch.tensor(0.05), rtol=1e-3, atol=0)
            if scale is None:
                dense.step()
                module.apply()
            else:
                scale.step(dense)
                assert module.apply(scaler=scale) is module
                scale.update()
        assert c.step == 3
        runs.append(rows_of(c))
    same(*runs, rtol=1e-5, atol=1e-7)


@EVERYWHERE
@pytest.mark.parametrize("pipelined", [False, True])
def test_step_of_infinities_is_skipped_and_the_scale_falls(clicks, collection, rows_of, dlrm, pipelined):
    c, model, scale = collection(8, optimizer=embedding.SGD(lr=0.5)), dlrm(), scaler()
    module = hb.nn.EmbeddingCollection(c)
    dense = torch.optim.SGD(model.parameters(), 0.1)
    whole = hb.nn.attach(model, module, ignore=["click"])
    steps = hb.pipeline(clicks(192, 64), module) if pipelined else clicks(192, 64)
    for i, s in enumerate(steps):
        before = rows_of(c), copy.deepcopy(model.state_dict())
        loss = (model(s.dense, s.embeddings) if pipelined else whole(s)).square().mean()
        dense.zero_grad()
        scale.scale(loss * (float("inf") if i == 1 else 1.0)).backward()
        scale.step(dense)
        s.apply(scale) if pipelined else module.apply(scaler=scale)
        scale.update()
        assert c.step == [1, 1, 2][i] and scale.get_scale() == [2.0**10, 2.0**9, 2.0**9][i]
        if i == 1:
            created = {name: old.any(1) for name, old in before[0].items()}
            same({n: r[created[n]] for n, r in rows_of(c).items()}, {n: r[created[n]] for n, r in before[0].items()})
            same(model.state_dict(), before[1])


def test_scaler_over_ranks_is_refused(collection):
    module, model = hb.nn.EmbeddingCollection(collection(4)), Top()
    loss_of(model, module, batch(6, 0)).backward()
    module._forwards[-1].staged.transport = object()  # as over `hb.distributed.shard`
    with pytest.raises(errors.Unsupported, match=r"GradScaler.*ranks.*bfloat16"):
        module.apply(scaler=scaler())


@EVERYWHERE
def test_float16_gradients_are_taken(collection, rows_of):
    runs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        c = collection(4, optimizer=embedding.SGD(lr=1.0))
        module = hb.nn.EmbeddingCollection(c)
        out = module(batch(5, 0))
        out["user"].to(dtype).sum().backward()
        module.apply()
        runs.append(rows_of(c))
    same(runs[1], runs[0])
    same(runs[2], runs[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_stay_float32_under_autocast(collection, rows_of, dtype):
    losses, plain = [], []
    for found, on in ((losses, True), (plain, False)):
        c, model, scale = collection(4, optimizer=embedding.SGD(lr=2.0)), Top(), scaler(enabled=dtype == torch.float16)
        module, dense = hb.nn.EmbeddingCollection(c), torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(8):
            with torch.autocast("cpu", dtype, enabled=on):
                out = module(batch(16, 0))
                assert all(t.dtype == torch.float32 for t in out.values())
                logits = model(out)
                assert logits.dtype == (dtype if on else torch.float32)
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), target(batch(16, 0)))
            dense.zero_grad()
            scale.scale(loss).backward()
            scale.step(dense)
            module.apply(scaler=scale)
            scale.update()
            found.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    np.testing.assert_allclose(losses, plain, atol=0.02)


# ------------------------------------------------------------------------------------------------ in backward


@EVERYWHERE
def test_update_in_backward_is_that_of_apply(collection, rows_of):
    """Bit for bit, with two optimizers, a sequence, and a feature that the loss did not use."""
    runs = []
    for update in ("apply", "backward"):
        c, model = collection(4, optimizer=embedding.Adam(lr=0.1), pooling={"tags": None}), Top()
        module = hb.nn.EmbeddingCollection(c, update=update)
        first, second = (torch.optim.SGD(model.mlp[i].parameters(), 0.1) for i in (0, 2))
        for seed in range(4):
            part = batch(6, seed)
            out = module(part)
            inputs = {**out, "tags": out["tags"].values.sum(1)} if seed != 2 else {**out, "tags": out["user"]}
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(inputs), target(part))
            for optimizer in (first, second):
                optimizer.zero_grad()
            loss.backward()
            for optimizer in (first, second):
                optimizer.step()
            if update == "apply":
                module.apply()
        assert c.step == 4
        module.close()
        runs.append((rows_of(c), model.state_dict()))
    same(runs[1][0], runs[0][0])
    same(runs[1][1], runs[0][1])


@pytest.fixture
def in_backward(collection):
    c, model = collection(4), Top()
    module = hb.nn.EmbeddingCollection(c, update="backward")
    yield module, model, torch.optim.SGD(model.parameters(), 0.1)
    module.close()  # else it would refuse things as long as it lives


def test_update_in_backward_refuses_a_scaler(in_backward):
    module, model, _ = in_backward
    loss = loss_of(model, module, batch(6, 0))
    with pytest.raises(errors.Unsupported, match=f"GradScaler.*{MATCH}"):
        scaler().scale(loss)
    assert scaler(enabled=False).scale(loss) is loss
    loss.backward()
    with pytest.raises(errors.Unsupported, match=f"GradScaler.*{MATCH}"):
        module.apply(scaler=scaler())
    with pytest.raises(errors.Unsupported, match=f"GradScaler.*{MATCH}"):
        module.param_groups  # noqa: B018 what unscale_ asks for
    assert module.collection.step == 1
    with pytest.raises(errors.Closed, match=r"backward\(\) has updated"):
        module.apply()
    scaler().scale(torch.ones(1))  # another model's


def test_update_in_backward_refuses_a_pipeline(clicks, in_backward):
    with pytest.raises(errors.Unsupported, match=f"pipeline.*{MATCH}"):
        hb.pipeline(clicks(64, 64), in_backward[0])


@EVERYWHERE
def test_update_in_backward_refuses_accumulation(in_backward):
    module, model, dense = in_backward
    loss_of(model, module, batch(6, 0)).backward()
    dense.step()
    for seed in (1, 2):
        loss_of(model, module, batch(6, seed)).backward()
    with pytest.raises(errors.Unsupported, match=f"Accumulation.*{MATCH}"):
        dense.step()
    both = loss_of(model, module, batch(6, 3)) + loss_of(model, module, batch(6, 4))
    with pytest.raises(errors.Unsupported, match=f"Accumulation.*{MATCH}"):
        both.backward()
    loss = loss_of(model, module, batch(6, 5))
    loss.backward(retain_graph=True)
    with pytest.raises(errors.Unsupported, match=f"Accumulation.*{MATCH}"):
        loss.backward()


def test_update_in_backward_refuses_clipping_by_a_global_norm(in_backward):
    module, model, dense = in_backward
    out = module(batch(6, 0))
    model(out).sum().backward()
    with pytest.raises(errors.Unsupported, match=f"global norm.*{MATCH}"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(errors.Unsupported, match=f"global norm.*{MATCH}"):
        module.leaves  # noqa: B018 what a user would clip
    with pytest.warns(UserWarning, match="not a leaf"):
        assert out["user"].grad is None
    dense.step()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # nothing was updated since
    with pytest.raises(errors.InvalidArgument, match="update='never'"):
        hb.nn.EmbeddingCollection(module._collection, update="never")


# ------------------------------------------------------------------------------------------------- checkpoints


class Whole(torch.nn.Module):
    def __init__(self, c, path=None):
        super().__init__()
        self.embeddings, self.top = hb.nn.EmbeddingCollection(c, snapshot=path), Top()

    def forward(self, batch):
        return self.top(self.embeddings(batch))


def trained(model, dense, seeds):
    found = []
    for seed in seeds:
        part = batch(8, seed)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(part), target(part))
        dense.zero_grad()
        loss.backward()
        dense.step()
        model.embeddings.apply()
        found.append(loss.item())
    return found


@EVERYWHERE
def test_a_usual_checkpoint_of_the_whole_model_restores_the_rows(collection, rows_of, tmp_path):
    c = collection(4)
    model = Whole(c, tmp_path / "rows")
    dense = torch.optim.Adagrad(model.parameters(), 0.1)
    trained(model, dense, range(3))
    torch.save({"model": model.state_dict(), "dense": dense.state_dict()}, tmp_path / "checkpoint.pt")
    expected = trained(model, dense, range(3, 6))
    d = collection(4)
    other = Whole(d)
    again = torch.optim.Adagrad(other.parameters(), 0.1)
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert loaded["model"]["embeddings._extra_state"]["commit"] == "c00000001"
    other.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["dense"])
    assert d.step == 3 and trained(other, again, range(3, 6)) == expected
    same(rows_of(d), rows_of(c))


@EVERYWHERE
def test_state_dict_needs_a_commit(collection, tmp_path):
    with pytest.raises(errors.InvalidArgument, match=r"no snapshot.*user.*snapshot=path"):
        Whole(collection(4)).state_dict()
    state = Whole(collection(4), tmp_path / "rows").state_dict()
    (tmp_path / "rows").rename(tmp_path / "gone")
    with pytest.raises(errors.NotFound, match="c00000001"):
        Whole(collection(4)).load_state_dict(state)
    Whole(collection(4), tmp_path / "gone").load_state_dict(state)  # moved
    del state["embeddings._extra_state"]
    with pytest.raises(RuntimeError, match=r"Missing.*embeddings\._extra_state"):
        Whole(collection(4)).load_state_dict(state)
