"""The one training loop that pre-optimisation, DreamBooth and the fast finetune share."""
