"""Lines in device memory as the store uses them: batches on their way, memory that frameworks share, and failures."""

import numpy as np
import pytest

from hbkit import errors


def test_lines_in_the_simulator(in_simulator):
    in_simulator(__file__)


def test_lines_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__)


@pytest.fixture
def device(device, lane):
    if lane == "cpu":
        pytest.skip("lane cpu: lines in host memory are tested in tests/ext")
    return device


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
        DeviceLines(device, 2**30, 128, 16)
    device.sync()  # nothing else is the worse for it


def test_what_32_bits_do_not_count_is_refused(device):
    from hbkit.cuda import lines

    with pytest.raises(errors.InvalidArgument, match="2147483648 lines"):
        lines.DeviceLines(device, 2**31, 1, 16)
    with pytest.raises(errors.InvalidArgument, match=r"fewer than 2\*\*30"):
        lines.check_counts(1, 2**30)


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
@pytest.mark.parametrize("on_host", [False, True])
def test_lines_come_and_go_in_pinned_memory(device, dtype, on_host):
    from hbkit.cuda.lines import DeviceLines

    send = np.asarray if on_host else device.send
    rng = np.random.default_rng(0)
    lines = DeviceLines(device, 20, 7, 6, 4, dtype)
    want = rng.integers(-8, 8, (20, 7)).astype(np.float32)  # which bfloat16 holds
    lines.scatter(np.arange(20), want)
    for n in (0, 1, 5, 6, 6):
        slots = rng.permutation(20)[: 2 * n]
        slots[rng.random(2 * n) < 0.2] = -1  # left out
        for some in (slots[:n], slots[n:]):
            near = lines.incoming(n)
            assert near.shape == (n, 7)
            near[:] = data = rng.integers(-8, 8, (n, 7))
            lines.land(send(some))
            want[some[some >= 0]] = data[some >= 0]

        asked = rng.permutation(20)
        first = lines.depart(send(asked[:n]))
        second = lines.depart(send(asked[6:12]))  # on its way meanwhile
        assert np.array_equal(first(), want[asked[:n]]) and np.array_equal(second(), want[asked[6:12]])
        assert np.array_equal(lines.leave(send(asked[:n])), want[asked[:n]])

        old, new = rng.permutation(20).reshape(2, 10)
        lines.move(send(old), send(new))
        want[new] = want[old]
        out = np.empty((20, 7), np.float32)
        lines.gather(np.arange(20), out)
        assert np.array_equal(out, want)


@pytest.mark.parametrize("dim", [3, 8])
@pytest.mark.parametrize("on_host", [False, True])
def test_rows_of_an_array_are_taken_as_those_of_lines(device, dim, on_host):
    from hbkit._ext.segment import pool
    from hbkit.cuda.lines import DeviceLines

    send = np.asarray if on_host else device.send
    rng, lines = np.random.default_rng(0), DeviceLines(device, 4, 2 * dim, 2, dim, "bfloat16")
    source = rng.standard_normal((9, dim)).astype(np.float32)
    slots, index = rng.integers(-1, 9, 12), rng.integers(0, 12, 30)
    for picked, want in ((None, slots), (index, slots[index])):
        out = device.empty((len(want), dim), np.float32)
        lines.gather_from(send(source), send(slots), out, None if picked is None else send(picked))
        assert np.array_equal(device.fetch(out), np.where(want[:, None] >= 0, source[want], np.float32(0)))

    target, positions = device.send(source), rng.permutation(9)[:6]
    values = rng.standard_normal((6, dim)).astype(np.float32)
    positions[2] = -1
    lines.scatter_into(target, send(positions), send(values))
    source[positions[positions >= 0]] = values[positions >= 0]
    assert np.array_equal(device.fetch(target), source)

    splits, weight = np.array([0, 4, 4, 11, 20]), rng.standard_normal(20).astype(np.float32)
    scale, index = rng.standard_normal(4).astype(np.float32), rng.integers(0, 9, 20)
    for w, s in ((None, None), (weight, scale)):
        out, want = device.empty((4, dim), np.float32), np.empty((4, dim), np.float32)
        given = [None if a is None else send(a) for a in (w, s)]
        lines.pool_from(send(source), send(index), send(splits), out, *given)
        pool(source, index, splits, want, w, s)
        assert np.array_equal(device.fetch(out), want)


def test_lines_take_the_memory_that_they_say(device, monkeypatch):
    from hbkit.cuda.lines import DeviceLines

    for dim, width, dtype in ((4, 7, "float32"), (3, 9, "bfloat16"), (8, 8, "float16")):
        taken = []

        def empty(shape, dtype, taken=taken, make=device.empty):
            taken.append(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            return make(shape, dtype)

        with monkeypatch.context() as m:
            m.setattr(device, "empty", empty)
            lines = DeviceLines(device, 20, width, 6, dim, dtype)
        a_count = 4  # of `Finite`
        assert sum(taken) - a_count == DeviceLines.nbytes_of(20, width, 6, dim, dtype) > lines.nbytes
