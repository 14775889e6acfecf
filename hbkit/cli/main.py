"""The group of all commands: each is imported when it is called, so that help is quick."""

from __future__ import annotations

import importlib
from typing import Any

import click

from hbkit.errors import HbkitError

__all__ = ["main"]

COMMANDS = {  # name: (module, what it does)
    "synth": ("hbkit.cli.synth", "Write a synthetic click log whose best possible AUC is known."),
    "convert": ("hbkit.cli.convert", "Convert CSV, TSV, libsvm and other files to Parquet."),
    "inspect": ("hbkit.cli.inspect", "Show what is in a Parquet file, a directory of them, or a snapshot."),
    "snapshot": ("hbkit.cli.snapshot", "List, compare, verify, squash, prune and export the commits of a snapshot."),
    "plan": ("hbkit.cli.plan", "Say how much near memory buys which hit rate, on this data and this disk."),
    "train": ("hbkit.cli.train", "Train a model on Parquet files and save a snapshot."),
    "evaluate": ("hbkit.cli.train", "Evaluate a saved model on Parquet files."),
}


class _Commands(click.Group):
    """Commands by name; an error of hbkit ends the process with one line and status 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HbkitError as e:
            click.echo(f"hbkit: error: {e}", err=True)
            ctx.exit(2)


def _version(ctx: click.Context, option: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        from importlib import metadata

        try:
            click.echo(f"hbkit {metadata.version('hbkit')}")
        except metadata.PackageNotFoundError:
            click.echo("hbkit, from a checkout that is not installed")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def main() -> None:
    """hbkit: recommendation data from Parquet files to trained, servable embeddings."""
