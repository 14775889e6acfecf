"""Lines in device memory, and sums over segments: the kernels as the rooms above call them.

What is given and asked for is NumPy's, or is in device memory already (anything with ``__cuda_array_interface__``, such
as a CUDA tensor of PyTorch): then it is read and written there, and nothing moves or waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from hbkit._ext.segment import expand, retained
from hbkit._ext.slabs import n_state
from hbkit.cuda import rules
from hbkit.cuda.arith import fours, shift_of
from hbkit.cuda.buffers import Buffer, buffer_nbytes
from hbkit.cuda.device import COOPERATING, Device
from hbkit.cuda.finite import Finite
from hbkit.cuda.rows import AT_ONCE, GATHER, POOL, SCATTER
from hbkit.cuda.sums import BLOCK_SUMS, SEGMENT_SUM, n_partials
from hbkit.errors import InvalidArgument, Unsupported

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]
Part: TypeAlias = tuple[str, Any, int, int, int]  # columns of lines: dtype, array, first column, to or from, how many


class Slice(NamedTuple):
    """Columns of a row with the rule that steps them, and where their state begins in the line's."""

    code: int
    kernel: str
    column: int
    n_columns: int
    state: int

    @property
    def counts(self) -> bool:
        """Whether each line counts its updates or decays."""
        return self.code in (rules.ADAGRAD_DECAY, rules.ROW_STEP_ADAM)


# By the codes of _ext/kernels.h; SGD with momentum is "momentum".
KERNELS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "rowwise_adam", "ftrl", "adagrad", "adam")
N_BUFFERS = 6  # for what NumPy has; for lines that come; for lines that go: two of each


def on_device(array: Any) -> bool:
    """Whether an array is in device memory."""
    return hasattr(array, "__cuda_array_interface__") or hasattr(
        array, "copy_to_host"
    )  # the simulator's have the latter


def row_words(dim: int, dtype: str) -> int:
    """Floats that a row takes."""
    return dim if dtype == "float32" else (dim + 1) // 2


def stride_of(dim: int, width: int, dtype: str) -> int:
    """Floats that a line takes: where rows are read four columns at a time, lines begin at multiples of four."""
    words = row_words(dim, dtype)
    stride = words + width - dim
    return stride if dim % 4 or words % 4 else -(-stride // 4) * 4


def check_counts(*counts: int) -> None:
    """Kernels count rows and positions by 32 bits, and a launch goes on from one by as many as it has threads."""
    if max(counts) >= 2**30:
        raise InvalidArgument(f"{max(counts)} rows or positions in one call", remedy="give fewer than 2**30 at once")


class DeviceLines:
    """Lines ``[row | state]`` in device memory, addressed by slot; as `hbkit._ext.slabs.Slabs`.

    Parameters
    ----------
    device : Device
    n_lines, width : int
        Lines, and floats a line as `gather` and `scatter` see it.
    batch_lines : int
        Lines that come from the host or go there at once, which bounds the memory beside the lines: of each buffer
        there are two, and one is filled while the other is on its way.
    dim : int, optional
        Floats of the row, all of them when left out.
    row_dtype : "float32", "float16" or "bfloat16"
        How rows are held; state is float32.
    """

    def __init__(
        self,
        device: Device,
        n_lines: int,
        width: int,
        batch_lines: int,
        dim: int | None = None,
        row_dtype: str = "float32",
    ) -> None:
        if n_lines >= 2**31:
            raise InvalidArgument(f"{n_lines} lines", device=device.name, remedy="give a smaller cache_budget")
        self._device, self._width, self._batch, self._dtype = device, width, batch_lines, row_dtype
        self._dim = width if dim is None else dim
        self._stride = stride_of(self._dim, width, row_dtype)
        self._at = row_words(self._dim, row_dtype)  # float of a line where its state begins
        self._lines = device.empty((n_lines, self._stride), np.float32)
        self._rows = self._lines if row_dtype == "float32" else self._lines.view(np.uint16)
        nbytes = buffer_nbytes(batch_lines, width)
        self._buffers, self._coming, self._leaving = ([Buffer(device, nbytes) for _ in range(2)] for _ in range(3))
        self._kept: dict[str, Any] = {}
        self._hyper: tuple[Float32s, Any, list[Any]] | None = None
        self._finite = Finite(device)
        self.nbytes = n_lines * self._stride * 4

    @staticmethod
    def nbytes_of(n_lines: int, width: int, batch_lines: int, dim: int, row_dtype: str) -> int:
        """Bytes of device memory that so many lines take with their buffers."""
        return 4 * n_lines * stride_of(dim, width, row_dtype) + N_BUFFERS * buffer_nbytes(batch_lines, width)

    @property
    def lines(self) -> Any:
        """float32[n_lines, stride] in device memory: the lines themselves, rows first. Not a copy."""
        return self._lines

    def gather(self, slots: Any, out: Any, index: Any = None) -> None:
        """``out[i]`` = the first ``out.shape[1]`` floats of line ``slots[i]``; zeros where the slot is -1.

        With `index`, of line ``slots[index[i]]``. An `out` in device memory is written there.
        """
        parts = self._parts(out.shape[1])
        if on_device(out):
            index = self._device.none(np.int64) if index is None else self._ints(index)
            self._gather(self._ints(slots), index, self._floats(out), parts)
        elif index is None or len(index) <= len(slots):
            self._to_host(slots if index is None else slots[index], out, parts)
        else:
            found = retained((len(slots), out.shape[1]))
            self._to_host(slots, found, parts)
            expand(found, index, out)

    def scatter(self, slots: Int64s, lines: Float32s) -> None:
        """Write whole lines into distinct slots; narrow rows round to the nearest value."""
        self._from_host(slots, lines, self._parts(lines.shape[1]))

    def gather_from(self, source: Any, slots: Any, out: Any, index: Any = None) -> None:
        """`gather` of the rows of ``source[m, w]``, all in device memory, to ``out[n, w]``."""
        index = self._device.none(np.int64) if index is None else self._ints(index)
        source, out = self._floats(source), self._floats(out)
        self._gather(self._ints(slots), index, out, [("float32", source, 0, 0, out.shape[1])])

    def scatter_into(self, target: Any, positions: Any, values: Any) -> None:
        """``target[positions[i]] = values[i]``, all in device memory; positions are distinct, and -1 is left out."""
        target, values = self._floats(target), self._floats(values)
        self._scatter(self._ints(positions), values, [("float32", target, 0, 0, values.shape[1])])

    def pool_from(
        self, source: Any, index: Any, splits: Any, out: Any, weight: Any = None, row_scale: Any = None
    ) -> None:
        """`pool` of the rows of ``source[u, dim]``, all in device memory: p takes ``source[index[p]]``."""
        none = self._device.none
        weight, row_scale = (none(np.float32) if a is None else self._floats(a) for a in (weight, row_scale))
        rows, at, out = self._floats(source), self._ints(index), self._floats(out)
        self._pool(at, none(np.int64), self._ints(splits), weight, row_scale, out, ("float32", rows))

    def incoming(self, n: int) -> Float32s:
        """Where to write n <= batch_lines whole lines that `land` is to send: float32[n, width] in pinned memory.

        One of two buffers in turn; waits until what was sent from it before has come. `incoming`, `land` and `leave`
        have buffers of their own: a thread may use them beside one that uses what else there is.
        """
        self._coming.reverse()
        buffer = self._coming[0]
        buffer.begin()
        near, far = buffer.place((n, self._width), np.float32)
        self._sent = near, far
        return near

    def land(self, slots: Any) -> None:
        """The lines that were written where `incoming` said last go to ``slots[n]``, distinct; those of -1 go nowhere.

        Does not wait; what is launched later comes after it.
        """
        buffer, (near, far) = self._coming[0], self._sent
        buffer.copy([(far, near)])
        self._scatter(buffer.slots(slots), far, self._parts(self._width))
        buffer.end()

    def depart(self, slots: Any) -> Callable[[], Float32s]:
        """Begin to send n <= batch_lines whole lines to the host; what is given waits for them: float32[n, width].

        They come in pinned memory, one of two buffers in turn: with the next but one `depart` they are gone.
        """
        self._leaving.reverse()
        buffer = self._leaving[0]
        buffer.begin()
        found: list[Float32s] = []
        slots = buffer.slots(slots)
        launch = partial(self._gather, slots, self._device.none(np.int64), parts=self._parts(self._width))
        buffer.ask((slots.shape[0], self._width), launch, found.append)

        def wait() -> Float32s:
            buffer.begin()
            near: Float32s = found[0]
            return near

        return wait

    def leave(self, slots: Any) -> Float32s:
        """`depart`, and wait."""
        return self.depart(slots)()

    def move(self, old: Any, new: Any) -> None:
        """Lines at slots ``old[n]`` to slots ``new[n]``, distinct, disjoint and in device memory; does not wait."""
        old, new = self._device.array(old), self._device.array(new)
        none, whole = self._device.none(np.int64), self._words(self._stride)
        for buffer, part in self._batches(len(old)):
            _, far = buffer.place((part.stop - part.start, self._stride), np.float32)
            self._gather(old[part], none, far, whole)
            self._scatter(new[part], far, whole)
            buffer.end()

    def pool(self, slots: Any, index: Any, splits: Any, out: Any, weight: Any = None, row_scale: Any = None) -> None:
        """``out[b]`` = ``row_scale[b]`` * sum of ``weight[p]`` * row ``slots[index[p]]`` over p of list b, in order.

        Arguments are all in device memory, or all NumPy's.
        """
        ints, floats, none = self._ints, self._floats, self._device.none
        weight = none(np.float32) if weight is None else weight
        row_scale = none(np.float32) if row_scale is None else row_scale
        if on_device(out):
            self._pool(ints(slots), ints(index), ints(splits), floats(weight), floats(row_scale), floats(out))
            return
        n, first = len(splits) - 1, 0
        while first < n:  # as many lists as have a batch's values, but at least one
            last = int(np.searchsorted(splits, splits[first] + self._batch, "right")) - 1
            lists = slice(first, max(first + 1, min(last, first + self._batch)))
            values = slice(splits[lists.start], splits[lists.stop])
            far = self._device.empty(out[lists].shape, np.float32)
            self._pool(
                ints(slots[index[values]]),
                none(np.int64),
                ints(splits[lists.start : lists.stop + 1] - splits[lists.start]),
                floats(weight[values]) if isinstance(weight, np.ndarray) else weight,
                floats(row_scale[lists]) if isinstance(row_scale, np.ndarray) else row_scale,
                far,
            )
            out[lists] = self._device.fetch(far)
            first = lists.stop

    def apply(
        self,
        rule: Any,
        slots: Any,
        grads: Any,
        hyper: Float32s,
        keys: Any = None,
        seed: int = 0,
        step: int = 0,
        bad: str = "apply",
    ) -> int:
        """One optimizer step on distinct slots; -1 is skipped. As `hbkit._ext.slabs.Slabs.apply`.

        Gradients in device memory are used there. Slices of a row must not overlap.

        Raises
        ------
        Unsupported
            Gradients in device memory were to be looked at first (`bad`).
        """
        if not isinstance(grads, np.ndarray) and not on_device(grads):
            grads = grads.sum()
        found = self._slices(rule, hyper, grads.shape, len(slots))
        keys = slots if keys is None else keys
        if on_device(grads):
            if bad != "apply":
                raise Unsupported(
                    f"bad={bad!r} for gradients in device memory",
                    device=self._device.name,
                    remedy="look at them there, or give NumPy's",
                )
            self._apply(found, self._ints(slots), self._floats(grads), hyper, self._ints(keys), seed, step)
            return 0
        left_out = 0
        if bad == "skip":
            skipped = (slots >= 0) & ~np.isfinite(grads).all(axis=1)
            slots, left_out = np.where(skipped, -1, slots), int(np.count_nonzero(skipped))
        for buffer, part in self._batches(len(slots)):
            near = (slots[part], grads[part]) if self._dtype == "float32" else (slots[part], grads[part], keys[part])
            far = buffer.send(*near)
            self._apply(found, far[0], far[1], hyper, far[-1] if len(far) == 3 else far[0], seed, step)
            buffer.end()
        self._settle()
        return left_out

    def apply_segments(
        self,
        rule: Any,
        slots: Any,
        values: Any,
        order: Any,
        starts: Any,
        hyper: Float32s,
        keys: Any = None,
        seed: int = 0,
        step: int = 0,
        picked: Any = None,
        scale: Any = None,
    ) -> None:
        """One optimizer step by gradients that are summed on the way, all in device memory; does not wait.

        The gradient of ``slots[s]`` is the sum of ``scale[p] * values[picked[p]]`` over p in
        ``order[starts[s]:starts[s + 1]]``, in the order of the C kernels.

        Parameters
        ----------
        rule : int, or sequence of (rule, column, n_columns, state)
        slots : int64[n], distinct; -1 is skipped
        values : float32[m, dim]
        order : int64[k]
        starts : int64[n + 1]
        keys : int64[n], optional
            For the rounding of narrow rows.
        picked : int64[k], optional
        scale : float32[k], optional
        """
        found = self._slices(rule, hyper, (len(slots), values.shape[1]), len(slots))
        if len(order) == 0:
            raise InvalidArgument("sums of no positions", remedy="give at least one gradient")
        check_counts(len(slots), len(values), len(order))
        ints, sums = self._ints, _sums_of(self._device, values, order, starts, picked, scale)
        self._apply(found, ints(slots), sums, hyper, ints(slots if keys is None else keys), seed, step)

    def sums(self, values: Any, order: Any, starts: Any, out: Any, picked: Any = None, scale: Any = None) -> None:
        """The sums that `apply_segments` takes as gradients, into ``out[n, dim]``: see `sum_segments`."""
        sum_segments(self._device, values, order, starts, out, picked, scale)

    def look(self, values: Any, scale: Any = None) -> Any:
        """Look for NaN and infinities in float32 arrays in device memory: int32[1] there, 0 where there is none."""
        return self._finite.look(values, scale)

    def skip_bad(self, slots: Any, sums: Any) -> tuple[Any, int]:
        """Slots with -1 where a row of sums is not finite, until the next call, and how many were not -1; one wait."""
        return self._finite.skip_bad(slots, sums)

    # --- launches ---------------------------------------------------------------------------------------------

    def _batches(self, n: int) -> Iterator[tuple[Buffer, slice]]:
        """Parts of n lines, each with a buffer that is free."""
        for first in range(0, n, self._batch):
            self._buffers.reverse()  # the one used longer ago comes first
            self._buffers[1].begin()
            yield self._buffers[1], slice(first, min(n, first + self._batch))

    def _settle(self) -> None:
        """Return once all is done and handed over."""
        for buffer in self._buffers:
            buffer.begin()
        self._device.sync()

    def _ints(self, array: Any) -> Any:
        return self._device.array(array, np.int64)

    def _floats(self, array: Any) -> Any:
        return self._device.array(array, np.float32)

    def _words(self, n: int) -> list[Part]:
        """The first n words of lines as they lie in memory."""
        return [("float32", self._lines, 0, 0, n)]

    def _parts(self, width: int) -> list[Part]:
        """The first `width` floats of lines."""
        if self._dtype == "float32":
            return self._words(width)
        parts: list[Part] = [(self._dtype, self._rows, 0, 0, min(width, self._dim))]
        if width > self._dim:
            parts.append(("float32", self._lines, self._at, self._dim, width - self._dim))
        return parts

    def _gather(self, slots: Any, index: Any, out: Any, parts: list[Part]) -> None:
        check_counts(out.shape[0])
        for dtype, source, first, to, width in parts:
            kernel = GATHER[dtype, fours(source.shape[1], out.shape[1], first, to, width, arrays=(source, out))]
            shift, n_groups = shift_of(width), -(-out.shape[0] // AT_ONCE)
            self._device.launch(kernel, n_groups << shift, source, slots, index, out, first, to, width, shift)

    def _scatter(self, slots: Any, values: Any, parts: list[Part]) -> None:
        for dtype, target, to, first, width in parts:
            vec = fours(target.shape[1], values.shape[1], first, to, width, arrays=(target, values))
            kernel = SCATTER[dtype, vec]
            shift = shift_of(width)
            self._device.launch(kernel, values.shape[0] << shift, target, slots, values, first, to, width, shift)

    def _to_host(self, slots: Int64s, out: npt.NDArray[Any], parts: list[Part]) -> None:
        for buffer, part in self._batches(len(slots)):
            (some,) = buffer.send(slots[part])
            launch = partial(self._gather, some, self._device.none(np.int64), parts=parts)
            buffer.ask(out[part].shape, launch, partial(np.copyto, out[part]))
        self._settle()

    def _from_host(self, slots: Int64s, values: npt.NDArray[Any], parts: list[Part]) -> None:
        for buffer, part in self._batches(len(slots)):
            some, far = buffer.send(slots[part], values[part])
            self._scatter(some, far, parts)
            buffer.end()
        self._settle()

    def _pool(
        self, slots: Any, index: Any, splits: Any, weight: Any, row_scale: Any, out: Any, given: Any = None
    ) -> None:
        """Of the lines' rows, or those `given` by dtype and array."""
        n, dim = out.shape
        check_counts(n, slots.shape[0], index.shape[0])
        dtype, rows = given or (self._dtype, self._rows)
        stride = rows.shape[1] if dtype == "float32" else self._stride
        shift, kernel = shift_of(dim), POOL[dtype, fours(dim, stride, arrays=(rows, out))]
        self._device.launch(kernel, n << shift, rows, slots, index, splits, weight, row_scale, out, shift)

    def _slices(self, rule: Any, hyper: Float32s, shape: tuple[int, ...], n: int) -> list[Slice]:
        """What steps the columns of a row, as `hbkit._ext.slabs.Slabs.apply` takes it."""
        dim, packed = shape[1], np.atleast_2d(hyper)
        parts = [(rule, 0, dim, 0)] if isinstance(rule, (int, np.integer)) else list(rule)
        n_left = self._width - (dim if self._dtype == "float32" else self._dim)
        fits = shape[0] == n and n_left >= 0 and (self._dtype == "float32" or dim == self._dim)
        slices = []
        if fits and len(packed) == len(parts):
            for (code, column, count, state), own in zip(parts, packed, strict=True):
                momentum = own.size > 1 and bool(own[1])
                fits &= 0 <= column < column + count <= dim and state >= 0
                fits &= state + n_state(code, count, momentum) <= n_left
                kernel = "momentum" if code == 0 and momentum else KERNELS[code]
                slices.append(Slice(int(code), kernel, column, count, state))
        if not slices or not fits:
            raise InvalidArgument(
                f"grads of shape {shape} and {len(packed)} hyper-parameters do not fit {n} slots, {len(parts)} slices "
                f"or a line of {self._width}",
                remedy="the rule needs its state beside the row",
            )
        return slices

    def _apply(
        self, slices: list[Slice], slots: Any, grads: Any, hyper: Float32s, keys: Any, seed: int, step: int
    ) -> None:
        device, none, nothing = self._device, self._device.none(np.int64), self._device.none(np.float32, 2)
        sums = grads if isinstance(grads, _Sums) else _Sums(grads, none, device.none(np.float32), none, none)
        dim, n, partials = sums.values.shape[1], slots.shape[0], nothing
        packed, far = self._hyper_of(hyper)
        if sums.order.size:
            shift, vec = shift_of(dim), fours(dim, arrays=(sums.values,))
            partials = self._room("partials", n_partials(sums.order.size), dim)
            device.launch(BLOCK_SUMS[vec], partials.shape[0] << shift, *sums, partials, shift)
            by_norm = packed[:, rules.CLIP_NORM].any()
            if by_norm or any(s.kernel in rules.BY_ROW for s in slices):  # gradients are needed twice
                values = self._room("sums", n, dim)
                device.launch(SEGMENT_SUM[vec], n << shift, *sums, partials, values, shift)
                sums, partials = _Sums(values, none, device.none(np.float32), none, none), nothing
        for s, row, of_all in zip(slices, packed, far, strict=True):
            at = s.state + (dim if self._dtype == "float32" else self._at)
            place, own = (at, s.column, s.column + s.n_columns), of_all
            if row[rules.CLIP_NORM] > 0 or s.counts:
                own = self._room("own", n, rules.N_HYPER)
                values = sums.values if row[rules.CLIP_NORM] > 0 else nothing
                device.launch(rules.own, n * COOPERATING, self._lines, slots, values, of_all, s.code, *place, own)
            by_row, values = s.kernel in rules.BY_ROW, sums.values
            if by_row and row[rules.WEIGHT_DECAY :].any():
                values = self._changed(s, slots, values, own, bool(row[rules.WEIGHT_DECAY]))
            vec = fours(dim, *place, self._stride, arrays=(values,))
            kernel = rules.RULES[s.kernel, self._dtype, vec]
            after = keys, of_all if by_row else own, seed - 2**64 if seed >= 2**63 else seed, step, *place
            if by_row:
                device.launch(kernel, n * COOPERATING, self._rows, self._lines, slots, values, *after)
            else:
                shift = shift_of(s.n_columns)
                device.launch(kernel, n << shift, self._rows, self._lines, slots, *sums, partials, *after, shift)

    def _changed(self, s: Slice, slots: Any, values: Any, hyper: Any, decays: bool) -> Any:
        """The gradients of a slice, clipped and with the decay of rows."""
        n, dim = values.shape
        rows, out = self._device.none(np.float32, 2), self._room("changed", n, dim)
        if decays:
            rows = self._room("rows", n, dim)
            self._gather(
                slots, self._device.none(np.int64), rows, [(self._dtype, self._rows, s.column, s.column, s.n_columns)]
            )
        shift = shift_of(s.n_columns)
        end = s.column + s.n_columns
        self._device.launch(rules.change, n << shift, rows, slots, values, hyper, s.column, end, shift, out)
        return out

    def _hyper_of(self, hyper: Float32s) -> tuple[Float32s, list[Any]]:
        """Hyper-parameters, a row for each slice; and the rows in device memory, written where they have changed."""
        given = np.atleast_2d(hyper)
        packed = np.zeros((len(given), rules.N_HYPER), np.float32)
        packed[:, : given.shape[1]] = given
        packed[:, rules.FACTOR] = 1
        if self._hyper is None or len(self._hyper[0]) != len(packed):
            far = self._device.send(packed)
            self._hyper = packed, far, [far[k : k + 1] for k in range(len(packed))]
        elif not np.array_equal(self._hyper[0], packed):
            self._device.write(self._hyper[1], packed)
            self._hyper = packed, *self._hyper[1:]
        return packed, self._hyper[2]

    def _room(self, name: str, n: int, dim: int) -> Any:
        """float32[n, dim] in device memory that is kept for the next time."""
        if name not in self._kept or self._kept[name].size < n * dim:
            self._kept[name] = self._device.empty((n * dim,), np.float32)
        return self._kept[name][: n * dim].reshape(n, dim)


def _sums_of(device: Device, values: Any, order: Any, starts: Any, picked: Any, scale: Any) -> _Sums:
    """Gradients by segment, of arrays that are in device memory or go there."""
    return _Sums(
        device.array(values, np.float32),
        device.none(np.int64) if picked is None else device.array(picked, np.int64),
        device.none(np.float32) if scale is None else device.array(scale, np.float32),
        device.array(order, np.int64),
        device.array(starts, np.int64),
    )


class _Sums(NamedTuple):
    """Gradients by segment, in device memory; `order` is empty where they are summed already."""

    values: Any
    picked: Any
    scale: Any
    order: Any
    starts: Any


def segment_sum(
    device: Device,
    values: Float32s,
    segment: Int64s,
    n_segments: int,
    rows: Int64s | None = None,
    scale: Float32s | None = None,
) -> Float32s:
    """Sum per segment on the device: float32[n_segments, dim], bit for bit `hbkit._ext.segment.segment_sum`.

    Parameters
    ----------
    device : Device
    values : float32[m, dim]
    segment : int64[n], in [0, n_segments)
    rows : int64[n], in [0, m), or None (position p takes values[p])
    scale : float32[n] or None (all 1)
    """
    n, dim = len(segment), values.shape[1]
    if any(a is not None and len(a) != n for a in (rows, scale)) or (
        n and (segment.min() < 0 or segment.max() >= n_segments)
    ):
        raise InvalidArgument("segments, rows or scales do not fit", remedy="this is a precondition of the sums")
    if n == 0:
        return np.zeros((n_segments, dim), np.float32)
    order = np.argsort(segment, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(segment, minlength=n_segments))]).astype(np.int64)
    out = device.empty((n_segments, dim), np.float32)
    sum_segments(device, values, order, starts, out, rows, scale)
    return device.fetch(out)


def sum_segments(
    device: Device, values: Any, order: Any, starts: Any, out: Any, rows: Any = None, scale: Any = None
) -> None:
    """``out[s]`` = sum of ``scale[p] * values[rows[p]]`` over p in ``order[starts[s]:starts[s + 1]]``; does not wait.

    Arrays are in device memory, or are copied there; `out` is there. There is at least one position.
    """
    sums, out = _sums_of(device, values, order, starts, rows, scale), device.array(out, np.float32)
    n, dim = out.shape
    check_counts(n, len(values), len(order))
    shift, vec = shift_of(dim), fours(dim, arrays=(sums.values, out))
    partials = device.empty((n_partials(sums.order.size), dim), np.float32)
    device.launch(BLOCK_SUMS[vec], partials.shape[0] << shift, *sums, partials, shift)
    device.launch(SEGMENT_SUM[vec], n << shift, *sums, partials, out, shift)
