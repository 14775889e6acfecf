"""Copies between host and device: everything that a batch needs in one buffer, and so in one copy each way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from hbkit import errors

__all__ = ["target", "to_device", "to_host"]

ALIGN = 64  # bytes: each tensor begins at a multiple, so that any dtype fits and vector loads stay aligned


def target(device: torch.device | str | int | None) -> torch.device | None:
    """The device to copy to; None where the host's memory will do.

    Raises
    ------
    InvalidArgument
        PyTorch knows no such device.
    DeviceUnavailable
        It is none that can be used here.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except RuntimeError as e:
        raise errors.InvalidArgument(f"device={device!r}", remedy="name one as PyTorch does: cpu, cuda, cuda:1") from e
    if found.type == "cpu":
        return None
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # as torch says that it was built without one
        raise errors.DeviceUnavailable(
            f"device={str(found)!r} cannot be used", remedy=f"leave device out, or mend this: {str(e).splitlines()[0]}"
        ) from e
    return found


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The host's tensors on a device: packed into one buffer, which is copied once; what is returned are views of that.

    To a GPU the buffer is pinned and the copy does not block: PyTorch keeps the buffer until the copy is done.
    """
    sizes = [t.numel() * t.element_size() for t in tensors]
    begins = [0, *accumulate(-(-size // ALIGN) * ALIGN for size in sizes)]
    packed = torch.empty(begins.pop(), dtype=torch.uint8, pin_memory=device.type == "cuda")

    def parts(buffer: Tensor) -> list[Tensor]:
        spans = zip(begins, sizes, tensors, strict=True)
        return [buffer[begin : begin + size].view(t.dtype).view(t.shape) for begin, size, t in spans]

    for part, t in zip(parts(packed), tensors, strict=True):
        part.copy_(t)
    return parts(packed.to(device, non_blocking=True, copy=True))


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Float tensors of one device as float32 in host memory: joined there, copied once, and waited for."""
    joined = torch.cat([t.reshape(-1).float() for t in tensors])
    host = torch.empty(joined.shape, pin_memory=joined.is_cuda)
    host.copy_(joined)
    return [part.view(t.shape) for part, t in zip(host.split([t.numel() for t in tensors]), tensors, strict=True)]
