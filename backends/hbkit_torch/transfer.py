"""Between host and device: what a batch needs goes in one copy each way; rows of tables on a device stay there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from hbkit import errors
from hbkit.embedding import Collection

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
        return torch.empty(0, device=found).device  # with its number
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # as torch says that it was built without one
        raise errors.DeviceUnavailable(
            f"device={str(found)!r} cannot be used", remedy=f"leave device out, or mend this: {str(e).splitlines()[0]}"
        ) from e


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


def place_of(device: str | None) -> torch.device | None:
    """PyTorch's device of a table's (`hbkit.embedding.Table.device`)."""
    return None if device is None else torch.device("cuda", 0) if device == "cuda" else torch.device(device)


Streams = dict[torch.device, torch.cuda.Stream]


@contextmanager
def in_order(collection: Collection) -> Iterator[Streams]:
    """Order what tables do on their devices with PyTorch's current streams there, both ways; gives those streams.

    Tables work in order with the default streams, which are current within. Where others were, they are given: the
    default ones wait for them, and then they for those.
    """
    streams: Streams = {}
    with ExitStack() as after:
        for place in map(place_of, {collection.device(feature) for feature in collection.features} - {None, "cpu"}):
            current, default = torch.cuda.current_stream(place), torch.cuda.default_stream(place)
            if place is not None and current != default:
                streams[place] = current
                default.wait_stream(current)
                after.callback(current.wait_stream, default)
                after.enter_context(torch.cuda.stream(default))
        yield streams


def empty_on(streams: Streams, only: torch.device | None = None) -> Callable[[tuple[int, ...], str], Tensor | None]:
    """Memory for rows that tables have on a device, there: what `Staged.outputs` takes. On that one alone, if given.

    It is for use on the `streams` that `in_order` gave.
    """

    def empty(shape: tuple[int, ...], device: str) -> Tensor | None:
        place = place_of(device)
        if place is None or only not in (None, place):
            return None
        rows = torch.empty(shape, dtype=torch.float32, device=place)
        if place in streams:
            rows.record_stream(streams[place])
        return rows

    return empty
