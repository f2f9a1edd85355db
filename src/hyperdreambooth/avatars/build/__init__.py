"""The recipe of the avatars' models: VAE, base, scorers and encoder, stage by stage from seeds."""

STAGES = ("vae", "wide", "decoder", "encoder", "base", "scorers")
"""The stages in order; each needs the ones before it."""
