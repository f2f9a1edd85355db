"""Stage 3: a network that reads a photo and writes the LiDB numbers of the person in it (paper, section 4.2).

`encoder` looks at the photo (frozen), `decoder` turns what it saw into numbers, `loss` says how good they
are. `config`, `target`, `data` and `prepare` feed the loop of `train`, `validate` judges people that were
held out, `predictor` is the trained folder on disk.
"""
