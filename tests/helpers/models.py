"""Models for the suite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from helpers.paths import MODEL


def first_layers(count: int, folder: Path, vocabulary: int | None = None) -> str:
    """The small model's first layers, in a new ``folder``: queries, keys and values of a real
    model at a fraction of its time. With a ``vocabulary`` it knows the first tokens alone, which
    saves most of what vLLM's own sampler takes under Triton's interpreter."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    vocabulary = vocabulary or config["vocab_size"]
    changed = {**config, "num_hidden_layers": count, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(changed))
    weights = load_file(Path(MODEL, "model.safetensors"))
    dropped = tuple(f"model.layers.{i}." for i in range(count, config["num_hidden_layers"]))
    kept = {name: w for name, w in weights.items() if not name.startswith(dropped)}
    assert len(kept) < len(weights)
    embeddings = "model.embed_tokens.weight"  # of the output too
    kept[embeddings] = kept[embeddings][:vocabulary].clone()
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return str(folder)
