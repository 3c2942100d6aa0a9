"""Models for the suite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from helpers.paths import MODEL


def first_layers(count: int, folder: Path) -> str:
    """The small model's first layers, in a new ``folder``: queries, keys and values of a real
    model at a fraction of its time."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}))
    weights = load_file(Path(MODEL, "model.safetensors"))
    dropped = tuple(f"model.layers.{i}." for i in range(count, config["num_hidden_layers"]))
    kept = {name: w for name, w in weights.items() if not name.startswith(dropped)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return str(folder)
