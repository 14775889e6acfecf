"""Ranks as processes over torch.distributed: the exchange, training that equals one rank's, lost ranks, restarts."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch_ranks as ranks

import hbkit.torch as hb
from hbkit import embedding, errors
from hbkit.shuffle import Loopback


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_exchange_brings_every_byte_on_two_channels_at_once(size):
    assert [ended.value or ended.error for ended in ranks.run(ranks.exchange, size, 7)] == [True] * size


def test_shard_places_tables_and_keeps_what_rounding_leaves_out():
    (alone,) = Loopback.group(1)
    embeddings = embedding.Collection([embedding.Table("user", dim=4), embedding.Table("item", dim=4)])
    sharded = hb.distributed.shard(embeddings, alone, "int8", placement={"user": "replicate"}, feedback=100)
    assert sharded.collection.placement == {"user": "replicate"} and sharded.collection.feedback == 100
    with pytest.raises(errors.HbkitError, match="nobody"):
        hb.distributed.shard(embeddings, alone, placement={"nobody": "replicate"})


@pytest.mark.parametrize("how", ["kill", "stop", "abort"])
def test_a_lost_rank_ends_the_others_in_time_with_its_name(how):
    timeout, lost = 3.0, 2
    ended = ranks.run(ranks.lose, 3, how, lost, timeout, lost=None if how == "abort" else lost)
    for rank, (value, error) in enumerate(ended):
        if rank == lost and how != "abort":
            assert value is None and not error
            continue
        seconds, found = value
        assert seconds < timeout + 1 and len(found) == 2, (value, error)
        said = "rank 2: ValueError: the reason" if how == "abort" else "no sign of life from rank 2"
        assert all(e.startswith("TransportError") and said in e for e in found)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_losing_the_rank_that_keeps_the_store_ends_the_others_too(how):
    ended = ranks.run(ranks.lose, 3, how, 0, 3.0, lost=0)
    for seconds, found in (value for value, _ in ended[1:]):
        assert seconds < 4 and len(found) == 2
        assert all(e.startswith("TransportError") and "which rank 0 keeps" in e for e in found)


def test_a_group_needs_ranks():
    with pytest.raises(errors.InvalidArgument, match="torchrun"):
        ranks.hb.distributed.GroupTransport()


def train_alone(folder, size, batch, optimizer="SGD", lr=0.1):
    trainer = ranks.trainer_of(None, optimizer=optimizer, lr=lr)
    trainer.fit(ranks.dataset(folder / "whole", size * batch))
    return ranks.state_of(trainer)


def values(ended):
    assert not [how.error for how in ended if how.error]
    return [how.value for how in ended]


def assert_equals_one_rank(got, alone, tolerance):
    """Within a tolerance relative to each parameter's largest value, or 0.01: a lone bias may be about 0."""
    dense, rows = alone
    for mine, _, *_ in got:
        for name, value in dense.items():
            np.testing.assert_allclose(
                mine[name], value, atol=tolerance * max(np.abs(value).max(), 0.01), rtol=0, err_msg=name
            )
    for name, (n, value) in rows.items():
        assert sum(theirs[name][0] for _, theirs, *_ in got) == n
        together = sum(theirs[name][1] for _, theirs, *_ in got)
        np.testing.assert_allclose(together, value, atol=tolerance * np.abs(value).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_train_as_one_does_by_sgd(tmp_path, size):
    ranks.write_parts(tmp_path, size, batch=24)
    got = values(ranks.run(ranks.train, size, tmp_path, 24))
    assert_equals_one_rank(got, train_alone(tmp_path, size, 24), 1e-5)
    assert len({auc for *_, auc in got}) == 1 and got[0][-1] > 0.68


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "RowWiseAdagrad", "Adam", "AdamW", "RowWiseAdam", "Ftrl"])
def test_ranks_take_one_step_as_one_does_by_every_optimizer(tmp_path, optimizer):
    ranks.write_parts(tmp_path, 3, batch=24, rounds=4)
    for rank in range(3):
        path = tmp_path / f"{rank}"
        pq.write_table(pq.read_table(path).slice(0, 24 - 7 * rank), path)
    whole = [pq.read_table(tmp_path / f"{rank}") for rank in range(3)]
    pq.write_table(pa.concat_tables(whole), tmp_path / "whole")
    got = values(ranks.run(ranks.train, 3, tmp_path, 24, "float32", optimizer, 0.01))
    assert_equals_one_rank(got, train_alone(tmp_path, 3, 24, optimizer, 0.01), 1e-5)


@pytest.mark.parametrize("wire", ["float32", "float16", "bfloat16", "int8"])
def test_ranks_repeat_themselves_bit_for_bit_and_learn_on_any_wire(tmp_path, wire):
    ranks.write_parts(tmp_path, 2, batch=48, rounds=40)
    first, again = (values(ranks.run(ranks.train, 2, tmp_path, 48, wire, "Adagrad")) for _ in range(2))
    for (dense, rows, auc), (dense2, rows2, auc2) in zip(first, again, strict=True):
        assert auc == auc2 > 0.7
        assert all(np.array_equal(dense[name], dense2[name]) for name in dense)
        assert all(rows[name][0] == rows2[name][0] for name in rows)
        assert all(np.array_equal(rows[name][1], rows2[name][1]) for name in rows)


def test_a_model_saved_by_two_ranks_goes_on_with_three(tmp_path):
    alone = ranks.trainer_of(None)
    for size in (2, 3):
        (folder := tmp_path / f"{size}").mkdir()
        ranks.write_parts(folder, size, batch=24, rounds=30, seed=size)
        got = values(ranks.run(ranks.go_on, size, folder, 24, tmp_path / "model"))
        alone.fit(ranks.dataset(folder / "whole", size * 24))
        assert_equals_one_rank(got, ranks.state_of(alone), 1e-5)


BATCH, EVERY = 24, 4


def shared_file(path, n_batches=60):
    pq.write_table(pa.table(ranks.click_columns(n_batches * BATCH)), path, row_group_size=100)
    return path


def alone_after(folder, before, steps, after):
    """What one rank comes to in some steps of the batches of `before` ranks, then those of `after` ranks."""
    alone, table, n = ranks.trainer_of(None), pq.read_table(folder / "data"), steps * before * BATCH
    for size, rows in ((before, table.slice(0, n)), (after, table.slice(n))):
        pq.write_table(rows, folder / "part")
        alone.fit(ranks.dataset(folder / "part", size * BATCH))
    return ranks.state_of(alone)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_training_goes_on_from_the_last_snapshot_with_other_ranks_after_one_is_lost(tmp_path, how):
    data, model, timeout = shared_file(tmp_path / "data"), tmp_path / "model", 4.0
    ended = ranks.run(ranks.share_out, 3, data, BATCH, model, EVERY, how, 1, 11, timeout, lost=1)
    for rank in (0, 2):
        seconds, error = ended[rank].value
        assert seconds < timeout + 1 and "no sign of life from rank 1" in error
    got = values(ranks.run(ranks.share_out, 2, data, BATCH, model, EVERY))
    assert_equals_one_rank(got, alone_after(tmp_path, 3, 8, 2), 1e-5)


def torchrun(options, how, folder, name):
    """One node of torchrun, on whose first attempt a rank is lost as `how` says."""
    script = [ranks.__file__, folder / "data", BATCH, folder / f"{name}-model", EVERY, how, folder / name]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", options.pop("nproc", "1")]
    command += [f"--{option.replace('_', '-')}={value}" for option, value in options.items()] + script
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([str(c) for c in command], env=env, stderr=subprocess.PIPE, text=True)


def states(folder, name, size):
    return [pickle.loads((folder / f"{name}-{rank}-of-{size}").read_bytes()) for rank in range(size)]


@pytest.mark.slow
def test_torchrun_restarts_ranks_that_go_on_exactly(tmp_path):
    shared_file(tmp_path / "data")
    for how in ("whole", "kill"):
        options = {"nproc": 2, "max_restarts": 1, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
        run = torchrun(options, how, tmp_path, how)
        _, said = run.communicate(timeout=200)
        assert run.returncode == 0, said
    for (dense, rows), (dense2, rows2) in zip(states(tmp_path, "whole", 2), states(tmp_path, "kill", 2), strict=True):
        assert all(np.array_equal(dense[name], dense2[name]) for name in dense)
        assert all(np.array_equal(rows[name][1], rows2[name][1]) for name in rows)


@pytest.mark.slow
def test_torchrun_goes_on_with_one_node_when_the_other_is_lost(tmp_path):
    shared_file(tmp_path / "data")
    endpoint, nodes = f"localhost:{ranks.free_port()}", []
    for host, how in ((1, "whole"), (0, "node")):
        conf = f"is_host={host},last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
        rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": endpoint, "rdzv_id": "job", "rdzv_conf": conf}
        nodes.append(torchrun({"nnodes": "1:2", "max_restarts": 3, **rendezvous}, how, tmp_path, "end"))
    _, said = nodes[0].communicate(timeout=200)
    nodes[1].communicate()
    assert nodes[0].returncode == 0, said
    assert nodes[1].returncode == -9 and "no sign of life" in said
    assert (tmp_path / "end-0-of-1").exists()
    assert_equals_one_rank(states(tmp_path, "end", 1), alone_after(tmp_path, 2, 8, 1), 1e-5)
