"""`hdb` and `python -m hyperdreambooth`, which also serves `accelerate launch -m hyperdreambooth train …`."""

import io
import sys


def escape_what_streams_lack() -> None:
    """Has characters that the terminal, pipe or file cannot encode escaped: the work is done by then."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Runs the command line; an interrupt while its modules are imported is one line, too."""
    escape_what_streams_lack()
    try:
        from hyperdreambooth.apps import cli
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
