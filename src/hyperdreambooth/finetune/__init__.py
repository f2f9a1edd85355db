"""One person's adapter, trained: the fast finetune after a prediction, and DreamBooth from scratch."""
