"""``hbkit convert``: other formats to Parquet."""

from __future__ import annotations

from contextlib import AbstractContextManager

import click

from hbkit.cli import console

__all__ = ["convert"]

FORMATS = (
    *("auto", "csv", "tsv", "libsvm", "libffm", "slot", "sequence"),
    *("criteo", "aliccp", "movielens", "tfrecord", "parquet"),
)


def _names(ctx: click.Context, option: click.Parameter, given: tuple[str, ...]) -> list[str]:
    return [name for names in given for name in names.split(",") if name]


def _lists(ctx: click.Context, option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    lists = {}
    for text in given:
        name, colon, sep = text.partition(":")
        if not (name and colon and sep):
            raise click.BadParameter(f"{text!r} is not COLUMN:SEPARATOR, as in genres:'|'")
        lists[name] = sep
    return lists


@click.command()
@click.argument("inputs", metavar="IN...", nargs=-1, required=True, type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--format", "format", type=click.Choice(FORMATS), default="auto", show_default=True)
@click.option("--sep", help="What separates CSV columns; without it, what the first lines agree on.")
@click.option("--header/--no-header", default=None, help="Whether line 1 of a CSV holds names; else it is guessed.")
@click.option("--label", metavar="COL", help="Rename this column to label and let it hold no nulls.")
@click.option("--positive", type=float, metavar="X", help="A label of X or more becomes 1, any other 0.")
@click.option("--list", "lists", metavar="COL:SEP", multiple=True, callback=_lists, help="A multi-valued CSV column.")
@click.option("--scalar", "scalars", metavar="COLS", multiple=True, callback=_names, help="Lists of at most one value.")
@click.option("--unsorted", is_flag=True, help="Take libsvm indices in any order.")
@click.option("--split", metavar="A:B[:C]", help="Write train and test, or train, valid and test, in this proportion.")
@click.option("--split-by", type=click.Choice(["random", "order"]), default="random", show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of the random split.")
@click.option("--row-group-rows", type=click.IntRange(min=1), default=131_072, show_default=True)
@click.option("--compression", type=click.Choice(["zstd", "snappy", "none"]), default="zstd", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace Parquet files that are at OUT.")
def convert(
    inputs: tuple[str, ...],
    out: str,
    format: str,
    sep: str | None,
    header: bool | None,
    label: str | None,
    positive: float | None,
    lists: dict[str, str],
    scalars: list[str],
    unsorted: bool,
    split: str | None,
    split_by: str,
    seed: int,
    row_group_rows: int,
    compression: str,
    overwrite: bool,
) -> None:
    """Convert files to Parquet.

    IN are files of one format, gzip or not, or a MovieLens-1M directory. OUT is one file that ends in .parquet, or
    a directory, which gets part-00000.parquet, or with --split train.parquet, valid.parquet and test.parquet.

    \b
    csv, tsv    delimited text; types are those that hold every cell of the whole file, empty cells are nulls
    libsvm      label [qid:n] index:value ...      to lists `index` and `value`
    libffm      label field:index:value ...        to lists `field`, `index` and `value`
    slot        key:slot ... or slot:key ...       to a list column for each slot
    sequence    user item item ...                 to `user` and a list `items`
    criteo      raw Criteo logs: label, i1..i13, c1..c26 between tabs
    aliccp      id,click,buy,slot:key,...          to `id`, `click`, `buy` and a list column for each slot
    movielens   MovieLens-1M: a rating of 4 or 5 is a click, those of 3 are left out
    tfrecord    tf.train.Example (or lists of them), to a scalar or list column for each feature
    parquet     to other row groups, scalars, or a split
    """
    from hbkit.data.convert import Progress
    from hbkit.data.convert import convert as run

    def progress(description: str, nbytes: int) -> AbstractContextManager[Progress]:
        return console.progress(description, nbytes, unit="bytes")

    done = run(
        inputs, out, format=format, sep=sep, header=header, label=label, positive=positive, lists=lists,
        scalars=scalars, unsorted=unsorted, split=split, split_by=split_by, seed=seed, row_group_rows=row_group_rows,
        compression=compression, overwrite=overwrite, progress=progress,
    )  # fmt: skip
    nbytes = sum(file.nbytes for file in done.files)
    console.table("", ("file", "rows", "bytes"), [(file.path, file.n_rows, file.nbytes) for file in done.files])
    names = done.schema.names
    console.summary(
        f"Converted to {out}",
        {
            "format": done.format,
            "rows": done.n_rows,
            "columns": ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else ""),
            "before": console.size(done.nbytes),
            "after": console.size(nbytes),
            "ratio": f"{done.nbytes / nbytes:.2f}",
            "next": f"hbkit inspect {done.files[0].path}",
        },
    )
