"""The agent loop on the small model's first layers, with prefix caching or without, as JSON."""

import json
import shutil
import sys
from pathlib import Path

from helpers.agents import agent_loop
from helpers.engine import Engine
from helpers.paths import MODEL
from safetensors.torch import load_file, save_file

LAYERS = 5


def main() -> None:
    folder, target, caching = sys.argv[1:]
    cut = cut_model(Path(folder))
    engine = Engine.start(
        kv_bytes=1 << 28,
        fastgen={"debug": False},
        model=str(cut),
        enable_prefix_caching=caching == "with",
    )
    free = engine.free_blocks()
    answers = agent_loop(engine, users=6, turns=5)
    assert engine.free_blocks() == free
    Path(target).write_text(json.dumps(answers))


def cut_model(folder: Path) -> Path:
    """The model without its later layers, which is quick and hangs on its prompt all the same."""
    cut = folder / "model"
    if not cut.exists():
        shutil.copytree(MODEL, cut, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        weights = load_file(Path(MODEL, "model.safetensors"))
        first = {f"model.layers.{i}." for i in range(LAYERS)}
        kept = {
            name: tensor
            for name, tensor in weights.items()
            if "layers." not in name or any(name.startswith(layer) for layer in first)
        }
        save_file(kept, cut / "model.safetensors", {"format": "pt"})
        config = json.loads(Path(MODEL, "config.json").read_text())
        config["num_hidden_layers"] = LAYERS
        (cut / "config.json").write_text(json.dumps(config))
    return cut


if __name__ == "__main__":
    main()
