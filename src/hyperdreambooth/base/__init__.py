"""The frozen text-to-image pipeline: loading, encoding, noising, loss. It knows no adapter."""
