"""``fastgen eval``: what answers are worth at each share of the KV cache, beside other methods."""
