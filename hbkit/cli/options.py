"""What was said to ``hbkit train``: its options together, and whether they go together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hbkit.cli.commits import Every
from hbkit.errors import InvalidArgument

__all__ = ["Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line, by its names."""

    data: str | None
    follow: str | None
    label: list[str]
    dense: list[str]
    sparse: list[str]
    sequence: list[str]
    sequence_length: int
    model: str
    backend: str
    dim: int
    batch_size: int
    epochs: int
    optimizer: str
    lr: float
    dense_lr: float
    eval_data: str | None
    group: str | None
    positive_weight: list[float]
    patience: int | None
    log_dir: str | None
    compile: bool
    amp: bool
    save: str | None
    save_every: Every | None
    resume: bool
    publish_every: Every
    idle_exit: float | None
    wire: str
    timeout: float
    seed: int

    def __post_init__(self) -> None:
        """Check what needs no data.

        Raises
        ------
        InvalidArgument
            Options contradict each other, or one that is needed is not there.
        """
        if (self.data is None) == (self.follow is None):
            raise InvalidArgument("neither --data nor --follow, or both", remedy="name the files in one of them")
        if self.save is None and (self.follow is not None or self.save_every is not None or self.resume):
            raise InvalidArgument("no --save", remedy="name the directory of the snapshot")
        if self.follow is not None:
            if self.epochs != 1 or self.eval_data is not None or self.save_every is not None:
                raise InvalidArgument(
                    "--epochs, --eval-data or --save-every with --follow", remedy="leave them out; see --publish-every"
                )
            if self.sequence or self.positive_weight or self.log_dir or self.compile or self.amp:
                raise InvalidArgument(
                    "--sequence, --positive-weight, --log-dir, --compile or --amp with --follow",
                    remedy="leave them out",
                )
        if len(self.label) > 1 and self.model != "mmoe":
            raise InvalidArgument(
                f"{self.model} predicts one label, not {len(self.label)}",
                remedy="use --model mmoe, or name one --label",
            )
        if bool(self.sequence) != (self.model == "din"):
            raise InvalidArgument(
                "din needs a sequence" if self.model == "din" else f"{self.model} takes no sequence",
                remedy="use --model din with --sequence BEHAVIOUR:TARGET, or neither",
            )
        if self.eval_data is None and (self.group is not None or self.patience is not None):
            raise InvalidArgument("--group and --patience need figures to look at", remedy="give --eval-data")
        weights = self.positive_weight
        if len(weights) not in (0, 1, len(self.label)) or not all(0 <= w < math.inf for w in weights):
            raise InvalidArgument(
                f"--positive-weight {','.join(f'{w:g}' for w in weights)} of {len(self.label)} labels",
                remedy="give 0 or more, once or for each label",
            )
        if self.patience is not None and (self.save_every is not None or self.resume):
            raise InvalidArgument(
                "--save-every or --resume with --patience", remedy="--patience commits the best epochs"
            )

    @property
    def kept(self) -> dict[str, Any]:
        """Those that a snapshot keeps, so that it is trained further with the same."""
        names = ("model", "backend", "dim", "optimizer", "lr", "dense_lr", "seed", "batch_size")
        return {name: getattr(self, name) for name in names}
