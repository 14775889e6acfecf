"""The core dataset as PyTorch tensors, and the conversions of columns both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import hbkit
from hbkit import errors
from hbkit_torch import transfer

__all__ = ["Dataset"]

Array = npt.NDArray[Any]
Columns = dict[str, Any]


class Jagged(NamedTuple):
    """A column of lists: the values of all rows end to end, and where each row's list starts and ends.

    Attributes
    ----------
    values : Tensor[n_values]
    row_splits : tuple of int64 tensors, outer to inner, as in `hbkit.Ragged`
        Row i of a column with one level is ``values[row_splits[0][i] : row_splits[0][i + 1]]``.
    """

    values: Any
    row_splits: Any


def as_is(value: Any) -> Any:
    """The value; what `DataLoader` is to do to a batch."""
    return value


def tensor(array: Array) -> torch.Tensor:
    """A tensor that shares the array's memory; a copy only where the array is read-only, which torch can't express."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def from_column(column: Any) -> Any:
    """A column of the core as PyTorch has it: Tensor, `Jagged`, or `hbkit.Strings` as it is.

    Notes
    -----
    Memory is shared where the core's buffer is writable, else copied (torch has no read-only tensors).
    """
    if isinstance(column, np.ndarray):
        return tensor(column)
    if isinstance(column, hbkit.Ragged):
        return Jagged(from_column(column.values), tuple(tensor(splits) for splits in column.row_splits))
    return column


def to_column(column: Any, name: str = "", there: torch.device | None = None) -> Any:
    """A column of a batch as the core has it: from a Tensor, `Jagged`, ``(values, row_splits)``, or as it is.

    Parameters
    ----------
    column : Tensor, Jagged, tuple of (values, row_splits), ndarray, Ragged or Strings
        A sparse Tensor of two dimensions is lists: in each row, its values in their order.
    name : str
        The feature that an error names.
    there : torch.device, optional
        Where the feature's table is: integers there stay there, as contiguous tensors.

    Raises
    ------
    InvalidArgument
        The tensor is neither in host memory nor `there`.
    Unsupported
        The tensor has another sparse layout.
    """
    if isinstance(column, torch.Tensor):
        if column.device == there and column.layout == torch.strided:
            return _keys(column.detach(), name)
        if column.device.type != "cpu":
            raise errors.InvalidArgument(
                f"keys on device {column.device}", feature=name, remedy="its table is elsewhere: pass .cpu()"
            )
        column = column.detach()
        if column.layout == torch.strided:
            return column.numpy()
        if column.layout != torch.sparse_coo or column.ndim != 2:
            raise errors.Unsupported(
                f"keys as {column.layout} of {column.ndim} dimensions", feature=name, remedy="pass hbkit.Ragged"
            )
        column = column.coalesce()
        lengths = torch.bincount(column.indices()[0], minlength=len(column))
        return hbkit.Ragged(column.values().numpy(), (np.concatenate([[0], lengths.cumsum(0).numpy()]),))
    if isinstance(column, tuple) and len(column) == 2:
        values, splits = column
        splits = splits if isinstance(splits, tuple | list) else (splits,)
        if isinstance(values, torch.Tensor) and values.device == there and len(splits) == 1:
            of_rows = splits[0].cpu() if isinstance(splits[0], torch.Tensor) else splits[0]
            return hbkit.Ragged.on_device(to_column(values, name, there), of_rows)
        return hbkit.Ragged(to_column(values, name), tuple(to_column(s, name) for s in splits))
    return column


def _keys(keys: torch.Tensor, name: str) -> torch.Tensor:
    """Integers as a table on their device takes them."""
    if keys.dtype.is_floating_point or keys.dtype.is_complex or keys.dtype == torch.bool:
        raise errors.InvalidArgument(f"keys of type {keys.dtype}", feature=name, remedy="keys are integers: cast them")
    return (keys if keys.dtype == torch.uint64 else keys.to(torch.int64)).contiguous()


def padded(name: str, lists: hbkit.Ragged, pad: Any = 0) -> Array:
    """Lists as one array, as long as the longest of them."""
    return lists.to_padded(pad=pad)


def sparse(name: str, lists: hbkit.Ragged) -> torch.Tensor:
    """Lists as a sparse tensor."""
    found = lists.to_sparse()
    if not isinstance(found.values, np.ndarray):
        raise errors.Unsupported("strings in a sparse tensor", column=name, remedy="hash them: Field(hash_to='int64')")
    indices, shape = tensor(np.ascontiguousarray(found.indices.T)), found.dense_shape.tolist()
    return torch.sparse_coo_tensor(indices, tensor(found.values), shape, is_coalesced=True, check_invariants=False)


def keyed_jagged(names: Sequence[str], into: str, columns: Columns) -> Columns:
    """Columns of numbers or lists, side by side, as one column, a `torchrec.KeyedJaggedTensor`."""
    from torchrec import KeyedJaggedTensor

    parts = []
    for name in names:
        match named(columns, name):
            case np.ndarray(ndim=1) as values:
                parts.append((values, np.ones(len(values), np.int64)))
            case np.ndarray(ndim=2) as values:
                parts.append((values.reshape(-1), np.full(len(values), values.shape[1])))
            case hbkit.Ragged(ragged_rank=1, values=np.ndarray() as values) as lists:
                parts.append((values, lists.lengths()))
            case other:
                raise errors.InvalidArgument(
                    f"column is {other!r:.80}", column=name, remedy="give numbers, or lists of them of rank 1"
                )
    values, lengths = (part[0] if len(part) == 1 else np.concatenate(part) for part in zip(*parts, strict=True))
    made = KeyedJaggedTensor(keys=list(names), values=tensor(values), lengths=tensor(lengths))
    return {**{name: column for name, column in columns.items() if name not in names}, into: made}


def moved(batch: hbkit.data.Batch, device: torch.device) -> hbkit.data.Batch:
    """The batch with its tensors on a device, by one copy; strings stay, sparse tensors come by themselves."""
    tensors: list[torch.Tensor] = []
    each(batch, tensors.append)
    copies = iter(transfer.to_device(tensors, device))
    return each(batch, lambda _: next(copies), lambda t: t.to(device))


def each(value: Any, fn: Callable[[torch.Tensor], Any], sparse: Callable[[torch.Tensor], Any] = as_is) -> Any:
    """The same structure of columns with ``fn(t)`` for each tensor, ``sparse(t)`` for one that is sparse."""
    if isinstance(value, torch.Tensor):
        return (fn if value.layout == torch.strided else sparse)(value)
    if isinstance(value, Jagged):
        return Jagged(each(value.values, fn), tuple(fn(splits) for splits in value.row_splits))
    if isinstance(value, hbkit.data.Batch):
        columns = {name: each(column, fn, sparse) for name, column in value.items()}
        return hbkit.data.Batch(columns, value.n_rows, value.cursor)
    if type(value).__name__ == "KeyedJaggedTensor":
        return type(value)(keys=value.keys(), values=fn(value.values()), lengths=fn(value.lengths()))
    return value


def named(columns: Mapping[str, Any], name: str) -> Any:
    """A column of a batch, or an error that names it."""
    if name not in columns:
        raise errors.UnknownColumn(
            "a column is not in the batch", column=name, remedy=f"the batch has {', '.join(columns)}"
        )
    return columns[name]


def lists_by(convert: Callable[[str, hbkit.Ragged], Any], names: Sequence[str] | None, columns: Columns) -> Columns:
    """The columns with those of lists, or the named ones of them, converted."""
    chosen = columns if names is None else {name: named(columns, name) for name in names}
    found = {name: convert(name, column) for name, column in chosen.items() if isinstance(column, hbkit.Ragged)}
    return {**columns, **found}


class Dataset(hbkit.data.Dataset, IterableDataset[hbkit.data.Batch]):
    """`hbkit.data.Dataset` whose iteration yields tensors: the core's batches, their columns as PyTorch has them.

    ``map`` and ``filter`` run before the conversion, on the core's columns, so the same function serves every
    framework.

    It is an `IterableDataset`: ``DataLoader(ds, batch_size=None, num_workers=2)`` deals the batches to its workers and
    gives each once, in the order of one process. `loader` makes one that also keeps this dataset's ``state_dict``.
    """

    _forms: tuple[Callable[[Columns], Columns], ...] = ()

    def _with(self, **changes: Any) -> Self:
        out = super()._with(**changes)
        out._forms = self._forms
        return out

    def _in_form(self, form: Callable[[Columns], Columns]) -> Self:
        out = self._with()
        out._forms = (*self._forms, form)
        return out

    def to_dense(self, names: Sequence[str] | None = None, pad: Any = 0) -> Self:
        """Columns of lists (all, or those named) as Tensors [n, L], filled with `pad` to the batch's longest list.

        `pipeline` and what else takes the core's batches still sees lists. For one L in all batches, use
        ``Field(pad_to=...)``.
        """
        return self._in_form(partial(lists_by, partial(padded, pad=pad), names))

    def to_sparse(self, names: Sequence[str] | None = None) -> Self:
        """Columns of lists (all, or those named) as sparse COO Tensors [n, L], L the batch's longest list."""
        return self._in_form(partial(lists_by, sparse, names))

    def to_keyed_jagged(self, names: Sequence[str], into: str = "features") -> Self:
        """Columns of numbers or lists as one `torchrec.KeyedJaggedTensor`, the column `into`.

        The values of one column are shared, those of several are copied side by side.

        Raises
        ------
        Unsupported
            TorchRec is not installed.
        InvalidArgument, UnknownColumn
            When iterated: a column is strings or nested lists, or is not there.
        """
        if find_spec("torchrec") is None:
            raise errors.Unsupported("keyed jagged tensors without TorchRec", remedy="pip install torchrec")
        if not names:
            raise errors.InvalidArgument("no columns for a keyed jagged tensor", remedy="name at least one")
        return self._in_form(partial(keyed_jagged, tuple(names), into))

    def __iter__(self) -> Iterator[hbkit.data.Batch]:
        """Batches of Tensors and `Jagged` columns; in a worker of a DataLoader, those that are the worker's."""
        worker = get_worker_info()
        for batch in self.batches((worker.id, worker.num_workers) if worker else (0, 1)):
            columns: Columns = dict(batch)
            for form in self._forms:
                columns = form(columns)
            columns = {name: from_column(column) for name, column in columns.items()}
            yield hbkit.data.Batch(columns, batch.n_rows, batch.cursor)

    def loader(
        self, num_workers: int = 0, device: torch.device | str | int | None = None, **options: Any
    ) -> DataLoader[Any]:
        """A `DataLoader` over this dataset: what a training loop takes batches from.

        It gives the batch, a dict; of a ``supervised`` dataset ``(columns, label)`` or ``(columns, label, weight)``.
        Labels named as a sequence are float32[B, n_labels]. Where batches are padded there always is a weight, 0 in
        padded rows.

        Parameters
        ----------
        num_workers : int
            Processes that read; each batch comes once, in order. ``ds.state_dict()`` follows what was taken.
            ``ds.stats()`` counts in the workers, not here.
        device : optional
            Where the tensors are to be: one pinned buffer and one copy a batch, which does not block. Without it they
            stay in the host's memory, pinned where there is a GPU, so that ``.to(device, non_blocking=True)`` is quick.
        **options
            Of `DataLoader`, such as ``prefetch_factor`` or ``multiprocessing_context="spawn"``: processes must be
            started so where files are those of a service; then the functions given to ``map`` must be importable.

        Raises
        ------
        InvalidArgument, DeviceUnavailable
            There is no such device.
        """
        return _Loader(self, transfer.target(device), num_workers, options)

    def _example(self, batch: hbkit.data.Batch) -> Any:
        if self.label is None:
            return batch
        names = self._plan.labels
        labels = [named(batch, name) for name in names]
        label = labels[0] if isinstance(self.label, str) else torch.stack(labels, 1).float()
        weight = None if self.weight is None else named(batch, self.weight)
        if self._plan.remainder == "pad":
            real = (torch.arange(len(label), device=label.device) < batch.n_rows).float()
            weight = real if weight is None else weight * real
        columns = {name: column for name, column in batch.items() if name not in {*names, self.weight}}
        rest = hbkit.data.Batch(columns, batch.n_rows, batch.cursor)
        return (rest, label) if weight is None else (rest, label, weight)


class _Loader(DataLoader[Any]):
    def __init__(self, ds: Dataset, device: torch.device | None, num_workers: int, options: dict[str, Any]) -> None:
        pinned = device is None and torch.cuda.is_available()
        options = {"pin_memory": pinned, **options}
        super().__init__(ds, batch_size=None, collate_fn=as_is, num_workers=num_workers, **options)
        self._ds, self._device = ds, device

    def __iter__(self) -> Any:
        batches = super().__iter__()
        if self.num_workers:
            self._ds._begin()  # as the workers do, with the copies that they were given
        return self._taken(batches)

    def _taken(self, batches: Iterator[hbkit.data.Batch]) -> Iterator[Any]:
        for batch in batches:
            self._ds._delivered = batch.cursor
            yield self._ds._example(batch if self._device is None else moved(batch, self._device))
