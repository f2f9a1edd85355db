"""`hdb` and `python -m hyperdreambooth`, which also serves `accelerate launch -m hyperdreambooth train …`."""

import sys


def main() -> None:
    """Runs the command line; an interrupt while its modules are imported is one line, too."""
    try:
        from hyperdreambooth.apps import cli
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
