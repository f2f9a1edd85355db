"""Is it the person, and did the prompt come true? Judged by models that took no part in any training."""
