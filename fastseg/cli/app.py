"""The list of subcommands."""

import typer
from typer.core import TyperGroup

from fastseg.cli.bench import bench
from fastseg.cli.crf import crf
from fastseg.cli.info import info
from fastseg.cli.models import models
from fastseg.cli.segment import segment


class _Group(TyperGroup):
    """Lets ``--crf`` stand alone: it means ``--crf=default`` and never takes the next word."""

    def parse_args(self, ctx, args):
        return super().parse_args(ctx, ["--crf=default" if a == "--crf" else a for a in args])


app = typer.Typer(
    cls=_Group,
    name="fastseg",
    help="Semantic segmentation of photographs with fast kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root() -> None:
    """Keeps ``fastseg NAME`` a subcommand however few there are."""


app.command()(segment)
app.command()(models)
app.add_typer(crf, name="crf")
app.command()(bench)
app.command()(info)
