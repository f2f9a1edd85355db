"""Stage 3: a network that predicts the LiDB of a person from a photo (paper, section 4.2)."""
