"""The pipeline: what a step holds, that look-ahead changes nothing, and that no thread outlives the loop."""

import gc
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import hbkit.torch as hb
from hbkit import embedding, errors, store

pytestmark = pytest.mark.usefixtures("no_threads_left")
EVERYWHERE = pytest.mark.parametrize("place", ["host", "device"])
LOOKAHEADS = [0, 1, 8]
MODULE = sys.modules["hbkit_torch.pipeline"]  # by its name one gets the function


def train(step, model):
    loss = (model(step.dense, step.embeddings) * step.weight).square().mean() + step.embeddings["user"].mean()
    loss.backward()
    step.apply()


@EVERYWHERE
def test_step_holds_the_columns_of_its_batch_padded(clicks, collection):
    ds = clicks(100, 64, weight="importance")
    steps = zip(hb.pipeline(ds, collection()), ds.batches(), strict=True)
    for step, batch in steps:
        n = batch.n_rows
        assert (step.n_rows, step.cursor) == (n, batch.cursor)
        assert step.dense.dtype == step.label.dtype == step.weight.dtype == torch.float32
        np.testing.assert_array_equal(step.dense[:n], np.stack([batch["amount"], batch["age"]], 1))
        np.testing.assert_array_equal(step.label[:n], batch["click"])
        np.testing.assert_array_equal(step.weight[:n], batch["importance"])
        assert list(step.embeddings) == ["user", "item", "tags"]
        assert step.embeddings["user"].shape == (64, 8)
        for padded in (step.dense, step.label, step.weight, *step.embeddings.values()):
            assert len(padded) == 64 and not padded[n:].any()
    assert n == 36


def test_step_without_a_weight_column_weighs_valid_rows_one(clicks, collection):
    *_, last = hb.pipeline(clicks(100, 64), collection())
    assert last.weight.tolist() == [1.0] * 36 + [0.0] * 28


def test_step_of_a_padding_dataset_is_the_same(clicks, collection):
    ds = clicks(100, 64)
    padding = ds.batch(64, remainder="pad")
    c, d = collection(), collection()
    for ours, theirs in zip(hb.pipeline(ds, c), hb.pipeline(padding, d), strict=True):
        assert ours.n_rows == theirs.n_rows and torch.equal(ours.dense, theirs.dense)
        assert torch.equal(ours.weight, theirs.weight)
        assert all(torch.equal(ours.embeddings[f], theirs.embeddings[f]) for f in ours.embeddings)
    assert {n: len(t) for n, t in c.tables.items()} == {n: len(t) for n, t in d.tables.items()}


def test_step_takes_dense_columns_of_several_numbers(clicks, collection):
    ds = clicks(100, 64).map(lambda c: {**c, "pair": np.stack([c["age"], -c["age"]], 1)})
    step = next(iter(hb.pipeline(ds, collection())))
    assert step.dense.shape == (64, 4) and torch.equal(step.dense[:, 1], -step.dense[:, 3])


@pytest.fixture(params=[1, 2])
def torch_threads(request):
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@EVERYWHERE
@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("optimizer", [embedding.SGD(lr=0.1), embedding.Adam(lr=0.01)])
def test_lookahead_of_any_depth_equals_none_bit_for_bit(clicks, collection, dlrm, rows_of, optimizer):
    ds = clicks(1000, 64)
    runs = []
    for lookahead in LOOKAHEADS:
        c, model = collection(optimizer=optimizer), dlrm()
        seen = []
        for step in hb.pipeline(ds, hb.nn.EmbeddingCollection(c), lookahead):
            seen.append(step.embeddings["item"].detach().clone())
            train(step, model)
        assert c.step == 16
        runs.append((rows_of(c), seen))
    for rows, seen in runs[1:]:
        assert all(np.array_equal(rows[name], runs[0][0][name]) for name in rows)
        assert all(torch.equal(a, b) for a, b in zip(seen, runs[0][1], strict=True))
    assert all(table.any() and np.isfinite(table).all() for table in runs[0][0].values())


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_lookahead_is_a_bound(clicks, collection, lookahead):
    made = []
    ds = clicks(1000, 64).map(lambda c: made.append(1) or c)
    for at, step in enumerate(hb.pipeline(ds, collection(), lookahead), 1):
        until = time.monotonic() + 10
        while len(made) < min(at + lookahead, 16) and time.monotonic() < until:
            time.sleep(0.001)
        assert len(made) == min(at + lookahead, 16)
        step.close()


@EVERYWHERE
def test_step_that_was_not_applied_is_dropped(clicks, collection, rows_of):
    c = collection()
    for at, step in enumerate(hb.pipeline(clicks(300, 64), c, 2)):
        if at == 1:
            before = rows_of(c)["user"]
            step.embeddings["user"].sum().backward()
        if at == 2:
            touched = before.any(1)
            assert np.array_equal(rows_of(c)["user"][touched], before[touched])
    assert c.step == 0


def test_pipeline_drops_a_pending_forward_of_the_module(clicks, collection):
    module = hb.nn.EmbeddingCollection(collection())
    module({"user": np.array([1]), "item": np.array([2]), "tags": np.array([[3]])})
    for step in hb.pipeline(clicks(64, 64), module):
        step.embeddings["user"].sum().backward()
        step.apply()
    assert module.collection.step == 1


@EVERYWHERE
def test_reading_pipeline_creates_no_rows_and_applies_nothing(clicks, collection):
    c = collection()
    for step in hb.pipeline(clicks(100, 64), c, train=False):
        assert not any(t.requires_grad or t.any() for t in step.embeddings.values())
        with pytest.raises(errors.Closed, match="for reading only"):
            step.apply()
    assert sum(len(t) for t in c.tables.values()) == 0


@EVERYWHERE
def test_reading_in_the_midst_of_training_changes_nothing(clicks, collection, dlrm, rows_of):
    runs = []
    for reads in (False, True):
        c, model = collection(), dlrm()
        module = hb.nn.EmbeddingCollection(c)
        for step in hb.pipeline(clicks(500, 64), module, 4):
            if reads:
                for other in hb.pipeline(clicks(64, 32, seed=5), module, 2, train=False):
                    assert not other.embeddings["user"].requires_grad
            train(step, model)
        runs.append(rows_of(c))
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_step_is_applied_once_and_in_its_turn(clicks, collection):
    steps = iter(hb.pipeline(clicks(200, 64), collection()))
    first = next(steps)
    with pytest.raises(errors.Closed, match="backward"):
        first.apply()
    first.embeddings["user"].sum().backward()
    first.apply()
    with pytest.raises(errors.Closed, match="was applied"):
        first.apply()
    second = next(steps)
    second.embeddings["user"].sum().backward()
    next(steps)
    with pytest.raises(errors.Closed, match="was closed"):
        second.apply()


# -------------------------------------------------------------------------------------------- devices


def test_step_on_a_device_is_one_copy_of_the_same(clicks, collection, dlrm, rows_of, monkeypatch):
    """The CPU plays the device: the step packs, and gives what it gives without."""
    runs = []
    for device in (None, "cpu"):
        if device:
            monkeypatch.setattr(MODULE, "target", torch.device)
        c, model = collection(pooling={"tags": "mean", "item": None}), dlrm()
        for step in hb.pipeline(clicks(500, 64), c, 4, device=device):
            train(step, model)
            tensors = [step.dense, step.label, step.weight, *step.embeddings.values()]
            assert len({t.untyped_storage().data_ptr() for t in tensors}) == (1 if device else 6)
        runs.append(rows_of(c))
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_step_copies_once_each_way(clicks, collection, copies, monkeypatch):
    back = []
    monkeypatch.setattr("hbkit_torch.update.to_host", lambda ts: back.append(ts) or [torch.ones(t.shape) for t in ts])
    c = collection(pooling={"tags": None})
    with copies() as made:
        for step in hb.pipeline(clicks(100, 64), c, 2, device="meta"):
            values, mask = step.embeddings["tags"]
            assert values.device.type == mask.device.type == step.dense.device.type == "meta"
            (step.embeddings["user"].sum() + values.sum()).backward()
            step.apply()
    assert made == ["meta"] * 2 and [len(grads) for grads in back] == [2, 2]
    assert c.step == 2


# -------------------------------------------------------------------------------------------- overlap


def test_pipeline_overlaps_decoding_deduping_and_fetching_with_the_step(clicks, collection, monkeypatch, tmp_path):
    """While a step is held, others are decoded, staged and fetched up to the bound, none of it by the step's thread."""
    done = {"decode": [], "stage": [], "fetch": []}

    def noted(what, fn):
        def call(*args, **kwargs):
            out = fn(*args, **kwargs)
            done[what].append(threading.current_thread())
            return out

        return call

    monkeypatch.setattr(embedding.Collection, "stage", noted("stage", embedding.Collection.stage))
    monkeypatch.setattr(embedding.Staged, "fetch", noted("fetch", embedding.Staged.fetch))
    ds = clicks(1000, 64).map(noted("decode", dict))
    steps = hb.pipeline(ds, collection(store=store.cached_ssd(tmp_path)), lookahead=6)
    next(steps)
    want = {"decode": 7, "stage": 7, "fetch": 6}  # the last one decoded waits behind those whose rows are fetched
    until = time.monotonic() + 30
    while any(len(done[what]) < n for what, n in want.items()) and time.monotonic() < until:
        time.sleep(0.001)
    assert {what: len(threads) for what, threads in done.items()} == want
    assert not any(threading.current_thread() in threads for threads in done.values())
    assert not set(done["fetch"]) & set(done["stage"])  # nor does staging wait for rows
    steps.close()


# ----------------------------------------------------------------------------------------- clean ends


def alive():
    return [t for t in threading.enumerate() if t.name == "hbkit-prefetch"]


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_break_ends_the_thread_and_lets_the_tables_go_on(clicks, collection, dlrm, lookahead):
    c, model = collection(), dlrm()
    for step in hb.pipeline(clicks(1000, 64), c, lookahead):
        train(step, model)
        if c.step == 3:
            break
    assert alive() == []
    for step in hb.pipeline(clicks(1000, 64), c, lookahead):
        train(step, model)
    assert c.step == 19


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_exception_in_the_loop_ends_the_thread(clicks, collection, error):
    c = collection()
    with pytest.raises(error):
        for _ in hb.pipeline(clicks(1000, 64), c, 4):
            raise error
    assert alive() == []
    assert len(list(hb.pipeline(clicks(1000, 64), c, 4))) == 16


def test_interrupt_while_waiting_ends_the_thread(clicks, collection):
    """The foreground waits for a batch when the signal comes."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    calls = []

    def slow(columns):
        calls.append(1)
        if len(calls) == 3:
            time.sleep(0.2)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)
        return columns

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in hb.pipeline(clicks(1000, 64).map(slow), collection(), 2):
                pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert alive() == []


def test_interrupt_lets_go_of_rows(tmp_path):
    """A real signal, while the loop trains: the process ends by KeyboardInterrupt, without threads or pinned rows."""
    code = """
import os, signal, threading, numpy as np, pyarrow as pa, pyarrow.parquet as pq
import hbkit.torch as hb
from hbkit.embedding import Collection, Table
from hbkit.store import cached_ssd
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
pq.write_table(pa.table({"k": np.arange(100_000) % 5000}), "k.parquet")
c = Collection([Table("k", 4, store=cached_ssd("store", host_budget="4MiB"))])
ds = hb.data.Dataset.from_parquet("k.parquet").batch(64).repeat()
try:
    for at, step in enumerate(hb.pipeline(ds, c, 4)):
        step.embeddings["k"].sum().backward()
        step.apply()
        if at == 3:
            print("training", flush=True)
except KeyboardInterrupt:
    print([t.name for t in threading.enumerate() if t.name.startswith("hbkit-")], c.step > 0)
    for step in hb.pipeline(ds, c, 4):
        step.embeddings["k"].sum().backward()
        step.apply()
        break
    c.close()
    print("closed")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "[] True\nclosed\n")


@pytest.mark.parametrize("at", ["wait", "outputs"])
def test_interrupt_at_the_step_lets_go_of_the_batch(clicks, collection, monkeypatch, at):
    """Between the background and the loop: while rows are waited for, or gathered."""
    c, real = collection(), getattr(embedding.Staged, at)
    steps = hb.pipeline(clicks(300, 64), c, 2)
    next(steps)

    def interrupted(staged, *args):
        real(staged, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding.Staged, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    monkeypatch.setattr(embedding.Staged, at, real)
    assert alive() == [] and c._training is None
    assert len(list(hb.pipeline(clicks(300, 64), c, 2))) == 5


@pytest.mark.parametrize("how", ["break", "error", "end"])
def test_no_lease_is_left(clicks, collection, how, monkeypatch):
    """Every batch that was staged is closed, however the loop ends."""
    made = []
    stage = embedding.Collection.stage
    monkeypatch.setattr(embedding.Collection, "stage", lambda *a, **k: made.append(stage(*a, **k)) or made[-1])
    try:
        for at, step in enumerate(hb.pipeline(clicks(500, 64), collection(), 3)):
            if at == 2 and how == "break":
                break
            if at == 2 and how == "error":
                raise ZeroDivisionError
            step.embeddings["user"].sum().backward()
            step.apply()
    except ZeroDivisionError:
        pass
    assert len(made) >= 3 and {s._state for s in made} <= {"applied", "closed"}


def test_with_and_close_end_the_thread_of_a_held_pipeline(clicks, collection):
    with hb.pipeline(clicks(1000, 64), collection(), 4) as steps:
        next(steps)
        assert len(alive()) == 1
    assert alive() == []
    steps.close()
    with pytest.raises(StopIteration):
        next(steps)


def test_forgotten_pipeline_ends_its_thread(clicks, collection):
    steps = hb.pipeline(clicks(1000, 64), collection(), 4)
    next(steps)
    cycle = [steps]
    cycle.append(cycle)
    del steps, cycle
    gc.collect()
    assert alive() == []


def test_thread_of_the_dataset_ends_with_the_pipeline(clicks, collection):
    n = threading.active_count()
    for _ in hb.pipeline(clicks(1000, 64).prefetch(2), collection(), 2):
        break
    assert threading.active_count() == n


def test_held_pipeline_does_not_keep_the_interpreter(tmp_path):
    code = """
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
import hbkit.torch as hb
from hbkit.embedding import Collection, Table
pq.write_table(pa.table({"k": np.arange(100)}), "k.parquet")
steps = hb.pipeline(hb.data.Dataset.from_parquet("k.parquet").batch(4), Collection([Table("k", 2)]), 2)
print(next(steps).n_rows)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_error_in_the_background_surfaces_with_its_cause_at_its_step(clicks, collection, lookahead):
    calls = []

    def fail(columns):
        calls.append(1)
        if len(calls) == 4:
            try:
                raise OSError("the disk is gone")
            except OSError as e:
                raise errors.StorageError("cannot read", file="part-3") from e
        return columns

    seen = []
    with pytest.raises(errors.StorageError, match="part-3") as caught:
        for step in hb.pipeline(clicks(1000, 64).map(fail), collection(), lookahead):
            seen.append(step.n_rows)
    assert seen == [64, 64, 64]
    assert isinstance(caught.value.__cause__, OSError) and "disk is gone" in str(caught.value.__cause__)
    assert "fail" in [entry.name for entry in caught.traceback]


def test_error_of_staging_names_the_feature(clicks, collection):
    ds = clicks(100, 64).map(lambda c: {**c, "item": c["item"].astype(np.float32)})
    with pytest.raises(errors.InvalidArgument, match=r"float32.*item"):
        list(hb.pipeline(ds, collection()))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda c: {k: v for k, v in c.items() if k != "item"}, errors.UnknownColumn, "not in the batch.*item"),
        (lambda c: {k: v for k, v in c.items() if k != "click"}, errors.UnknownColumn, "not in the batch.*click"),
        (lambda c: {**c, "more": c["tags"]}, errors.InvalidArgument, "Ragged.*more"),
        (lambda c: {**c, "click": np.stack([c["click"]] * 2, 1)}, errors.InvalidArgument, "2 values.*click"),
    ],
)
def test_pipeline_refuses_columns_by_name(clicks, collection, change, error, says):
    with pytest.raises(error, match=says):
        list(hb.pipeline(clicks(100, 64).map(change), collection()))


def test_pipeline_refuses_what_it_cannot_run(clicks, collection, tmp_path):
    ds = clicks(100, 64)
    unbatched = hb.data.Dataset.from_parquet(str(tmp_path))
    with pytest.raises(errors.InvalidArgument, match=r"\.batch"):
        hb.pipeline(unbatched, collection())
    with pytest.raises(errors.InvalidArgument, match="lookahead=-1"):
        hb.pipeline(ds, collection(), -1)
    module = hb.nn.EmbeddingCollection(collection())
    module.close()
    with pytest.raises(errors.Closed, match="closed"):
        hb.pipeline(ds, module)
