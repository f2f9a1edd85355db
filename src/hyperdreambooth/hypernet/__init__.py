"""Stage 3: a network that predicts the LiDB of a person from a photo (paper, section 4.2).

`encoder` turns the photo into features (frozen), `decoder` turns features into numbers, and `loss` has the
terms of the loss. `config`, `target`, `data` and `setup` prepare the loop of `train`, `validate` evaluates on
held-out people, and `predictor` is the trained hypernetwork and its folder.
"""
