"""The recipe of the avatars' models: VAE, base, scorers and encoders, stage by stage from seeds."""

STAGES = ("vae", "wide", "encoder", "base", "shapes", "decoder", "scorers", "unlabelled")
"""The stages in order; each needs some of those before it."""
