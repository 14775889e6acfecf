"""``hbkit snapshot``: what is in a snapshot, and how it is kept."""

from __future__ import annotations

import click

from hbkit.cli import console

__all__ = ["show_log", "snapshot"]

_FORMATS = ("parquet", "npy", "arrow", "dense")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def snapshot() -> None:
    """Look into a snapshot, keep it, take rows out of it.

    PATH is a directory, or a URI such as s3://bucket/model. A commit is named by its id, as in c00000003, or "latest".
    """


@snapshot.command()
@click.argument("path", type=click.Path())
def log(path: str) -> None:
    """List the commits, oldest first."""
    show_log(path)


def show_log(path: str) -> None:
    """Print the commits of a snapshot as a table."""
    from hbkit.snapshot import log as read

    commits = read(path)
    tables = list(dict.fromkeys(name for commit in commits for name in commit.tables))
    console.table(
        f"Snapshot {path}: {console.count(len(commits))} commits, oldest first",
        ("commit", "parent", "step", "size", *(f"rows of {name}" for name in tables)),
        [
            (c.id, c.parent or "-", c.step, console.size(c.nbytes), *(c.tables.get(name, "-") for name in tables))
            for c in commits
        ],
    )


@snapshot.command()
@click.argument("path", type=click.Path())
@click.argument("a")
@click.argument("b", default="latest")
def diff(path: str, a: str, b: str) -> None:
    """Count the rows of each table that commit B adds to commit A, changes and erases."""
    from hbkit.snapshot import diff as compare

    console.table(
        f"Snapshot {path}: from {a} to {b}",
        ("table", "added", "changed", "erased"),
        [(name, len(d.added), len(d.changed), len(d.erased)) for name, d in compare(path, a, b).items()],
    )


@snapshot.command()
@click.argument("path", type=click.Path())
def verify(path: str) -> None:
    """Check every byte of every commit; ends with status 2 at the first thing found wrong."""
    from hbkit.snapshot import verify as check

    commits = check(path)
    nbytes = console.size(sum(c.nbytes for c in commits))
    console.note(f"{console.count(len(commits))} commits, {nbytes}: all sound, the newest is {commits[-1].id}")


@snapshot.command()
@click.argument("path", type=click.Path())
@click.option("--commit", default="latest", show_default=True, help="Of which commit.")
def squash(path: str, commit: str) -> None:
    """Make a commit that holds in full what another holds as a chain of deltas."""
    from hbkit.snapshot import log as read
    from hbkit.snapshot import squash as make

    before = {c.id for c in read(path)}
    made = make(path, commit)
    console.note(f"{made} holds all rows already" if made in before else f"{made} holds all rows")


@snapshot.command()
@click.argument("path", type=click.Path())
@click.option("--keep", type=click.IntRange(min=1), default=3, show_default=True, help="How many commits to keep.")
def prune(path: str, keep: int) -> None:
    """Remove all but the newest commits, and those that they build on."""
    from hbkit.snapshot import log as read
    from hbkit.snapshot import prune as remove

    gone, kept = remove(path, keep), read(path)
    console.note(f"Removed {', '.join(gone) or 'nothing'}")
    if len(kept) > keep:
        console.note(f"Kept {len(kept)} commits, since the newest {keep} build on them: squash first to let go of them")


@snapshot.command()
@click.argument("path", type=click.Path())
@click.option("--table", help="Which table; may be left out where there is one.")
@click.option("--commit", default="latest", show_default=True, help="Of which commit.")
@click.option(
    "--format", "kind", type=click.Choice(_FORMATS), default="parquet", show_default=True, help="What to write."
)
@click.option("--output", "-o", required=True, type=click.Path(), help="File; for npy and dense, a directory.")
def export(path: str, table: str | None, commit: str, kind: str, output: str) -> None:
    """Write the rows of a table to files that other tools read, in the order of their keys.

    parquet and arrow (a stream in a file) have the columns key, freq, last_step, row and state; npy has a file for each
    of them. dense has weights.npy, float32[rows, dim], and vocabulary.npy, the key of each row.
    """
    from hbkit.snapshot import interop

    saved = interop.saved(path, table, commit)
    write = {
        "parquet": interop.export_parquet,
        "npy": interop.export_npy,
        "arrow": interop.export_ipc,
        "dense": interop.export_dense_npy,
    }
    n = write[kind](saved, output)
    console.note(f"{console.count(n)} rows of {saved.name} in {output}")
