"""``hbkit synth``: synthetic click logs."""

from __future__ import annotations

import click

from hbkit.cli import console

__all__ = ["synth"]


@click.command()
@click.argument("out", type=click.Path())
@click.option("--rows", type=click.IntRange(min=1), required=True, help="Rows to write.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Chooses the rows.")
@click.option(
    "--shape",
    type=click.Choice(["criteo", "taobao"]),
    default="criteo",
    show_default=True,
    help="criteo: 13 dense and 26 key columns. taobao: user, item, category and what the user clicked before.",
)
@click.option("--files", type=click.IntRange(min=1), default=1, show_default=True, help="Files to write.")
@click.option("--row-group-rows", type=click.IntRange(min=1), default=131_072, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace Parquet files that are at OUT.")
def synth(out: str, rows: int, seed: int, shape: str, files: int, row_group_rows: int, overwrite: bool) -> None:
    """Write a synthetic click log as Parquet.

    OUT is a directory, which gets part-00000.parquet and so on, or one file that ends in .parquet.

    Keys follow a Zipf law; labels are drawn from a planted model, so the best AUC and log loss that any model can
    reach are known: they are printed and stand in the files' metadata. The planted model belongs to the shape and
    the seed only chooses the rows, so two seeds give a training and a test set.
    """
    from hbkit.data.synth import synthesize

    with console.progress("synth", rows) as bar:
        made = synthesize(out, rows, seed, shape, files, row_group_rows, overwrite, bar.update)
    console.summary(
        f"Wrote {out}",
        {
            "shape": shape,
            "rows": made.n_rows,
            "files": len(made.paths),
            "size": console.size(made.nbytes),
            "click rate": made.click_rate,
            "Bayes-optimal AUC": made.bayes_auc,
            "Bayes-optimal log loss": made.bayes_log_loss,
            "next": f"hbkit inspect {made.paths[0]}",
        },
    )
