"""Ranks as processes over torch.distributed: the exchange, training that equals one rank's, lost ranks, restarts."""

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
