"""The ``fastseg`` command. One file per subcommand; ``app.py`` lists them."""

import sys


def main() -> None:
    """Runs the command line; a user's mistake becomes one sentence and exit status 1."""
    try:
        from fastseg.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        if sys.argv[1:2] != ["info"]:  # the one command that must work in every installation
            sys.exit("fastseg: the command line needs `pip install 'fastseg-kernels[cli]'`")
        from fastseg.cli.info import info

        return info(json="--json" in sys.argv)
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"fastseg: {sentence(error)}")


def sentence(error: Exception) -> str:
    """What went wrong, in words: an ``OSError`` without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    return str(error)
