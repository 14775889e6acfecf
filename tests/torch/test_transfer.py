"""Copies between host and device. Without a GPU the packing runs on the CPU, and a stand-in sees what a GPU gets."""

from types import SimpleNamespace

import pytest
import torch

from hbkit import errors
from hbkit_torch.transfer import target, to_device, to_host

TENSORS = [
    torch.arange(6.0).reshape(2, 3),
    torch.tensor([True, False, True]),
    torch.empty(0, 4),
    torch.arange(5),
    torch.arange(12, dtype=torch.float16).reshape(3, 4).T,
    torch.tensor(7, dtype=torch.uint8),
]


def test_to_device_packs_into_one_buffer():
    moved = to_device(TENSORS, torch.device("cpu"))
    for ours, given in zip(moved, TENSORS, strict=True):
        assert ours.dtype == given.dtype and torch.equal(ours, given) and ours.is_contiguous()
        assert ours.data_ptr() % 64 == 0 or not ours.numel()
    assert len({t.untyped_storage().data_ptr() for t in moved}) == 1
    assert to_device([], torch.device("cpu")) == []
    assert not {t.untyped_storage().data_ptr() for t in TENSORS} & {t.untyped_storage().data_ptr() for t in moved}


def test_to_device_copies_once(copies):
    with copies() as made:
        moved = to_device(TENSORS, torch.device("meta"))
    assert made == ["meta"] and [(t.shape, t.dtype) for t in moved] == [(t.shape, t.dtype) for t in TENSORS]


def test_copies_to_a_gpu_are_pinned_and_do_not_block(monkeypatch):
    asked, empty = [], torch.empty

    def to(tensor, device, non_blocking, copy):
        asked.append((device.type, non_blocking))
        return tensor.clone()

    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory, **k: asked.append(pin_memory) or empty(*a, **k))
    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = to_device(TENSORS, SimpleNamespace(type="cuda"))
    assert all(map(torch.equal, moved, TENSORS)) and asked == [True, ("cuda", True)]


def test_to_host_joins_and_splits():
    given = [torch.arange(6.0).reshape(2, 3), torch.arange(4).half(), torch.ones(2, 2, 2).transpose(0, 2)]
    back = to_host(given)
    for ours, theirs in zip(back, given, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())
    assert len({t.untyped_storage().data_ptr() for t in back}) == 1


def test_target_names_devices_or_why_not():
    assert target(None) is target("cpu") is target(torch.device("cpu", 0)) is None
    assert target("meta") == torch.device("meta")
    with pytest.raises(errors.InvalidArgument, match="device='gpu'"):
        target("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(errors.DeviceUnavailable, match=r"'cuda:0' cannot be used.*CUDA"):
            target("cuda:0")
