"""``fastgen bench``: stock vLLM and FastGen side by side on the same prompts and KV bytes."""
