"""Lines in device memory as the store uses them: batches on their way, memory that frameworks share, and failures."""

import os

import numpy as np
import pytest

from hbkit import errors

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


@pytest.mark.skipif(SIMULATED, reason="this is the simulator")
def test_lines_in_the_simulator(in_simulator):
    in_simulator(__file__)


@pytest.fixture(autouse=True)
def _with_a_device(lane):
    if lane == "cpu":
        pytest.skip("lane cpu: lines in host memory are tested in tests/ext")


@pytest.mark.parametrize("batch_lines", [1, 3, 100])
def test_batches_do_not_overtake_each_other(device, batch_lines):
    from hbkit.cuda.lines import DeviceLines

    rng = np.random.default_rng(0)
    lines = DeviceLines(device, 20, 6, batch_lines, 4)
    want = np.zeros((20, 6), np.float32)
    lines.scatter(np.arange(20), want)
    for _ in range(4):
        slots, data = rng.permutation(20)[:13], rng.standard_normal((13, 6)).astype(np.float32)
        lines.scatter(slots, data)
        want[slots] = data
        out, asked = np.empty((25, 6), np.float32), rng.integers(-1, 20, 25)
        lines.gather(asked, out)
        assert np.array_equal(out, np.where(asked[:, None] >= 0, want[asked], np.float32(0)))


def test_a_batch_too_large_for_the_device_is_a_budget_error(device, lane):
    if lane == "cudasim":
        pytest.skip("lane cudasim: its memory is the host's")
    from hbkit.cuda.lines import DeviceLines

    with pytest.raises(errors.BudgetExceeded, match="cache_budget"):
        DeviceLines(device, 2**40, 128, 16)
    device.sync()  # nothing else is the worse for it


def test_torch_reads_and_writes_the_same_memory(device, lane):
    if lane == "cudasim":
        pytest.skip("lane cudasim: PyTorch has no simulated memory")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch was built without CUDA")
    from hbkit.cuda.device import Device
    from hbkit.cuda.lines import DeviceLines

    rng = np.random.default_rng(0)
    data = rng.standard_normal((50, 8)).astype(np.float32)
    before = torch.cuda.memory_allocated()
    shared = Device(allocate=lambda n: torch.empty(n, dtype=torch.uint8, device="cuda"))
    lines = DeviceLines(shared, 50, 8, 16)
    assert torch.cuda.memory_allocated() - before >= lines.nbytes  # from PyTorch's own pool
    lines.scatter(np.arange(50), data)
    view = torch.as_tensor(lines.lines, device="cuda")  # no copy
    assert view.data_ptr() == lines.lines.__cuda_array_interface__["data"][0]
    assert np.array_equal(view.cpu().numpy(), data)
    again = torch.from_dlpack(torch.utils.dlpack.to_dlpack(view))
    assert again.data_ptr() == view.data_ptr()

    slots = torch.tensor([3, -1, 49], device="cuda")
    out = torch.full((3, 8), float("nan"), device="cuda")
    lines.gather(slots, out)  # written where it is, in the order of the default stream
    assert torch.equal(out[0], view[3]) and torch.equal(out[2], view[49]) and not out[1].any()

    twin = DeviceLines(device, 50, 8, 16)
    twin.scatter(np.arange(50), data)
    grads, hyper = torch.randn(3, 8, device="cuda"), np.array([0.1] + [0] * 11, np.float32)
    lines.apply(0, slots, grads, hyper)
    twin.apply(0, slots.cpu().numpy(), grads.cpu().numpy(), hyper)
    found = np.empty((50, 8), np.float32)
    twin.gather(np.arange(50), found)
    assert np.array_equal(view.cpu().numpy(), found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_lines", [1, 3, 100])
def test_lines_come_and_go_in_pinned_memory(device, batch_lines, dtype):
    from hbkit.cuda.lines import DeviceLines

    rng = np.random.default_rng(0)
    lines = DeviceLines(device, 20, 7, batch_lines, 4, dtype)
    want = rng.integers(-8, 8, (20, 7)).astype(np.float32)  # which bfloat16 holds
    lines.scatter(np.arange(20), want)
    for n in (0, 1, 13, 20):
        slots, data = rng.permutation(20)[:n], rng.integers(-8, 8, (n, 7)).astype(np.float32)
        far, seen = device.send(slots), []

        def fill(part, near, data=data, seen=seen):
            near[:] = data[part]
            seen.append(part)

        lines.bring(far, fill)
        want[slots] = data
        assert [p.start for p in seen] == list(range(0, n, batch_lines)) and (not n or seen[-1].stop == n)

        asked, found = rng.permutation(20)[:n], []
        lines.take_out(device.send(asked), lambda part, near, found=found: found.append((part, near.copy())))
        assert [p.start for p, _ in found] == list(range(0, n, batch_lines))  # in order
        assert all(near.shape == (part.stop - part.start, 7) for part, near in found)
        assert np.array_equal(np.concatenate([want[:0], *(near for _, near in found)]), want[asked])

        both = rng.permutation(20)[: n // 2 * 2]
        lines.move(device.send(both[: n // 2]), device.send(both[n // 2 :]))
        want[both[n // 2 :]] = want[both[: n // 2]]
        out = np.empty((20, 7), np.float32)
        lines.gather(np.arange(20), out)
        assert np.array_equal(out, want)


def test_a_failing_fill_or_drain_leaves_the_lines_usable(device):
    from hbkit.cuda.lines import DeviceLines

    lines, want = DeviceLines(device, 20, 6, 4), np.arange(120, dtype=np.float32).reshape(20, 6)
    lines.scatter(np.arange(20), want)
    slots, drained = device.send(np.arange(20)), []

    def fill(part, near):
        if part.start:
            raise errors.StorageError("test", remedy="none")
        near[:] = -1

    def drain(part, near):
        if drained:
            raise errors.StorageError("test", remedy="none")
        drained.append(near.copy())

    with pytest.raises(errors.StorageError):
        lines.bring(slots, fill)
    want[:4] = -1
    with pytest.raises(errors.StorageError):
        lines.take_out(slots, drain)
    assert np.array_equal(drained, [want[:4]])
    out = np.empty((20, 6), np.float32)
    lines.gather(np.arange(20), out)  # nothing more is drained
    assert np.array_equal(out, want) and len(drained) == 1
