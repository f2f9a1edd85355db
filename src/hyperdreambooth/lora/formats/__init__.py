"""LoRA files: every spelling that tools use, written, read back, and read from others."""
