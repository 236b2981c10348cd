"""The list of subcommands."""

import typer

from fastseg.cli.info import info
from fastseg.cli.segment import segment

app = typer.Typer(
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
app.command()(info)
