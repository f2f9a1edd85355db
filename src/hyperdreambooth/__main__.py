"""`python -m hyperdreambooth …`, and so `accelerate launch -m hyperdreambooth train …`."""

from hyperdreambooth.apps.cli import main

if __name__ == "__main__":
    main()
