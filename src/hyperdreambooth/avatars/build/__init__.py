"""The recipe of the avatars' models: VAE, base, scorers and encoders, stage by stage from seeds."""

STAGES = ("vae", "wide", "decoder", "encoder", "base", "shapes", "scorers", "unlabelled")
"""The stages in order; each needs some of those before it."""
