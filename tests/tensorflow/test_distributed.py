"""Ranks as processes over TensorFlow's collectives: the exchange, training that equals one rank's, lost ranks."""

import numpy as np
import pytest
import tf_ranks as ranks

BATCH = 24
# Over all of them in one go: TensorFlow's processes start slowly.
RUNS = [
    {},
    {},
    {"optimizer": "Adagrad", "compile": True},
    {"wire": "int8", "optimizer": "Adagrad"},
    {"wire": "int8", "optimizer": "Adagrad"},
]


def train_alone(folder, size, **options):
    trainer, losses = ranks.trainer_of(None, **options), []
    trainer.fit(ranks.dataset(folder / "whole", size * BATCH), lambda n, loss: losses.append(loss))
    return *ranks.state_of(trainer), losses


def close(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def assert_equals_one_rank(got, alone, tolerance):
    """`got`: of each rank."""
    dense, rows, losses = alone
    for mine, _, found, _ in got:
        close(found, losses, tolerance)
        for weight, expected in zip(mine, dense, strict=True):
            close(weight, expected, tolerance)
    for name, (n, values) in rows.items():
        assert sum(theirs[name][0] for _, theirs, *_ in got) == n
        close(sum(theirs[name][1] for _, theirs, *_ in got), values, tolerance)


def flat(result):
    dense, rows, losses, auc = result
    return [*dense, *(values for _, values in rows.values()), np.array([*losses, auc])]


@pytest.mark.parametrize(("size", "rounds"), [(1, 5), (3, 20), pytest.param(2, 100, marks=pytest.mark.slow)])
def test_ranks_train_as_one_does_and_alike_each_time(tmp_path, size, rounds):
    ranks.write_parts(tmp_path, size, BATCH, rounds)
    ended = ranks.run(ranks.train, size, tmp_path, BATCH, RUNS)
    assert [e.error for e in ended] == [""] * size
    assert all(exchanged for exchanged, _ in (e.value for e in ended))
    sgd, again, adagrad, int8, int8_again = (list(run) for run in zip(*(e.value[1] for e in ended), strict=True))
    assert_equals_one_rank(sgd, train_alone(tmp_path, size), 1e-5)
    assert_equals_one_rank(adagrad, train_alone(tmp_path, size, optimizer="Adagrad"), 1e-3)
    for one, other in (sgd, again), (int8, int8_again):
        for mine, repeated in zip(one, other, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(flat(mine), flat(repeated), strict=True))
        assert len({auc for *_, auc in one}) == 1
    assert abs(int8[0][-1] - adagrad[0][-1]) < 0.01


@pytest.mark.parametrize("how", ["kill", "stop", "abort"])
def test_a_lost_rank_ends_the_others_in_time_with_its_name(how):
    timeout, lost = 4.0, 1
    ended = ranks.run(ranks.lose, 3, how, lost, timeout, lost=None if how == "abort" else lost)
    for rank, (value, error) in enumerate(ended):
        if rank == lost and how != "abort":
            assert value is None and not error
            continue
        seconds, found = value
        assert seconds < timeout + 1 and len(found) == 2, (value, error)
        said = "rank 1: ValueError: the reason" if how == "abort" else "rank 1 at 127.0.0.1"
        assert all(e.startswith("TransportError") and said in e for e in found), found
