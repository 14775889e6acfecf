"""A plain training loop over staged steps, and the dense half of a saved model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch

import hbkit
from hbkit import errors
from hbkit.embedding import Collection, Resumable, random_arrays, set_random_arrays
from hbkit_torch.data import Array, Dataset
from hbkit_torch.distributed import broadcast, reduce_gradients
from hbkit_torch.nn import EmbeddingCollection
from hbkit_torch.pipeline import Step, pipeline

__all__ = ["Trainer", "seed"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


class Trainer(Resumable):
    """Trains a click model over an embedding collection, predicts with it, and saves and resumes.

    Parameters
    ----------
    model : Module
        Called with dense float32[B, n_dense] and the dict of embeddings; gives logits float32[B], or [B, n_labels] for
        a dataset of a sequence of labels. The caller seeds torch before building it.
    embeddings : EmbeddingCollection or hbkit.embedding.Collection
        Its tables have their own optimizers.
    optimizer : "adagrad", "adam", "adamw" or "sgd"
        Of the model's parameters.
    lr : float
        Learning rate of that optimizer.
    compile : bool
        Whether to compile the model, whole, with ``torch.compile``.
    amp : bool
        Whether the model computes in bfloat16 where that is safe; its parameters, logits and loss stay float32.
    positive_weight : float, or sequence of n_labels, optional
        Factor of the loss of label 1, for classes that are out of balance.

    Raises
    ------
    InvalidArgument
        There is no such optimizer.

    Notes
    -----
    For the same model, tables and data, the results are the same for every ``lookahead``, bit for bit, at a fixed
    number of torch threads; so are those of a training that ``save`` and ``load`` divide, with dropout as well.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        embeddings: EmbeddingCollection | Collection,
        optimizer: str = "adagrad",
        lr: float = 0.01,
        compile: bool = False,
        amp: bool = False,
        positive_weight: float | Sequence[float] | None = None,
    ) -> None:
        if optimizer not in OPTIMIZERS:
            raise errors.InvalidArgument(f"no optimizer {optimizer!r}", remedy=f"one of {', '.join(OPTIMIZERS)}")
        self.model = model
        self.embeddings = embeddings
        self._optimizer_name = optimizer
        self._optimizer = OPTIMIZERS[optimizer](model.parameters(), lr=lr)  # type: ignore[call-arg]  # the base class's
        self._graph: Callable[..., Any] = torch.compile(model, fullgraph=True) if compile else model
        self._amp = amp
        self._positive_weight = None if positive_weight is None else torch.tensor(positive_weight)
        broadcast(model, embeddings)

    def fit(
        self,
        ds: Dataset | hbkit.data.Dataset,
        on_step: Callable[[int, float], None] | None = None,
        lookahead: int = 8,
    ) -> None:
        """Train on one pass of the dataset: binary cross-entropy, the mean over the valid rows by their weight.

        Of several labels, a row's loss is the mean.

        Parameters
        ----------
        ds : Dataset
            Batched, with a label (``supervised``).
        on_step : function of (n_rows, loss), optional
            Called after each step; it may ``save``. Over sharded embeddings, the rows are this rank's own, and the loss
            is that of all ranks.
        lookahead : int, batches
            See `pipeline`.

        Raises
        ------
        InvalidArgument
            The dataset has no label or is not batched.
        """
        _need_label(ds)
        self.model.train()
        with pipeline(ds, self.embeddings, lookahead) as steps:
            for step in steps:
                logits = self._forward(step.dense, step.embeddings)
                heavier = None if self._positive_weight is None else self._positive_weight.to(logits.device)
                losses = torch.nn.functional.binary_cross_entropy_with_logits(
                    logits, step.label, reduction="none", pos_weight=heavier
                )
                losses = losses.mean(1) if losses.ndim == 2 else losses
                total = step.weight.sum().clamp_min(torch.finfo(torch.float32).tiny)  # a batch may weigh nothing
                loss = (losses * step.weight).sum() / total
                self._optimizer.zero_grad()
                loss.backward()
                loss = self._reduced(loss.detach(), step)
                self._optimizer.step()
                step.apply()
                self.cursor = step.cursor
                if on_step is not None:
                    on_step(step.n_rows, loss.item())

    def _reduced(self, loss: torch.Tensor, step: Step) -> torch.Tensor:
        """The loss of all ranks, whose gradients and moments of batches each gets."""
        if step.transport is None:
            return loss
        moving = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        carried = [torch.nn.Parameter(torch.empty_like(value)) for value in (loss, *moving)]
        for carrier, value in zip(carried, (loss, *moving), strict=True):
            carrier.grad = value
        reduce_gradients([*self.model.parameters(), *carried], step)
        loss, *means = (torch.as_tensor(carrier.grad) for carrier in carried)
        for buffer, mean in zip(moving, means, strict=True):
            buffer.copy_(mean)
        return loss

    def _forward(self, dense: torch.Tensor, embeddings: Any) -> torch.Tensor:
        with torch.autocast(dense.device.type, torch.bfloat16, enabled=self._amp):
            logits: torch.Tensor = self._graph(dense, embeddings)
        return logits.float()

    def predict(self, ds: Dataset | hbkit.data.Dataset, lookahead: int = 8) -> Iterator[tuple[Array, Array, Array]]:
        """Predictions over one pass of the dataset; creates no rows.

        Yields
        ------
        label, probability, weight : float32[n]
            Of the valid rows of each batch, in the dataset's order. Labels that the dataset names as a sequence, and
            their probabilities, are float32[n, n_labels].

        Raises
        ------
        InvalidArgument
            The dataset has no label or is not batched.
        """
        _need_label(ds)
        steps = pipeline(ds, self.embeddings, lookahead, train=False)

        def predictions() -> Iterator[tuple[Array, Array, Array]]:
            for step in steps:
                self.model.eval()
                with torch.no_grad():  # not across the yield, where it would be the caller's too
                    probability = torch.sigmoid(self._forward(step.dense, step.embeddings))
                n = step.n_rows
                yield step.label[:n].numpy(), probability[:n].numpy(), step.weight[:n].numpy()

        return predictions()

    def dense_state(self) -> bytes:
        """The model's parameters and its optimizer's state, as a safetensors file. The tables are not in it."""
        state = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self._optimizer.state[parameter].items():
                if value is not None:
                    state[f"{self._optimizer_name}/{name}/{key}"] = torch.as_tensor(value)
        return safetensors.torch.save({name: value.contiguous() for name, value in state.items()})

    @staticmethod
    def random_state() -> bytes:
        """The generators of torch (on every device in use), Python and NumPy, as a safetensors file."""
        states = {name: torch.from_numpy(array) for name, array in random_arrays().items()}
        states["torch"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            states |= {f"cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        return safetensors.torch.save(states)

    @staticmethod
    def load_random_state(state: bytes) -> None:
        """Set the generators to what ``random_state`` gave.

        Raises
        ------
        Corrupt
            The bytes are not what it gave.
        """
        try:
            states = safetensors.torch.load(state)
            set_random_arrays({name: tensor.numpy() for name, tensor in states.items()})
            torch.set_rng_state(states["torch"])
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as e:
            raise errors.Corrupt(f"the random state is broken: {e}", remedy="load another commit") from e
        for name, device in states.items():
            if name.startswith("cuda/"):
                torch.cuda.set_rng_state(device, int(name[5:]))

    def load_dense_state(self, state: bytes) -> None:
        """Load what ``dense_state`` gave. The state of an optimizer of another name is left out: this one starts anew.

        Raises
        ------
        Corrupt
            The bytes are not a safetensors file.
        SchemaMismatch
            The parameters are not those of this model.
        """
        try:
            tensors = safetensors.torch.load(state)
        except safetensors.SafetensorError as e:
            raise errors.Corrupt(f"the dense state is no safetensors file: {e}", remedy="load another commit") from e
        saved = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        own = self.model.state_dict()
        for name in sorted(own.keys() | saved.keys()):  # all before the first is loaded
            here, there = (list(d[name].shape) if name in d else "none" for d in (own, saved))
            if here != there:
                raise errors.SchemaMismatch(
                    f"parameter {name!r} has shape {here} in the model and {there} in the dense state",
                    remedy="build the model as it was when it was saved",
                )
        self.model.load_state_dict(saved)
        for name, parameter in self.model.named_parameters():
            start = f"{self._optimizer_name}/{name}/"
            state_of = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
            if state_of:
                self._optimizer.state[parameter] = state_of


def _need_label(ds: Dataset | hbkit.data.Dataset) -> None:
    if ds.label is None:
        raise errors.InvalidArgument("the dataset has no label", remedy="call .supervised(label) on it")


def seed(seed: int) -> None:
    """Seed the framework's generator: models built next start from equal parameters for equal seeds."""
    torch.manual_seed(seed)
