"""`hdb`, `python -m hyperdreambooth …`, and so `accelerate launch -m hyperdreambooth train …`."""

import sys


def main() -> None:
    """The entry point; an interrupt while the commands are still being imported is one line too."""
    try:
        from hyperdreambooth.apps import cli
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
