"""Ranks as processes over torch.distributed: the exchange, training that equals one rank's, lost ranks, restarts."""

import numpy as np
import pytest
import torch_ranks as ranks

from hbkit import errors


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_exchange_brings_every_byte_on_two_channels_at_once(size):
    assert [ended.value or ended.error for ended in ranks.run(ranks.exchange, size, 7)] == [True] * size


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
        ranks.pq.write_table(ranks.pq.read_table(path).slice(0, 24 - 7 * rank), path)
    whole = [ranks.pq.read_table(tmp_path / f"{rank}") for rank in range(3)]
    ranks.pq.write_table(ranks.pa.concat_tables(whole), tmp_path / "whole")
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
