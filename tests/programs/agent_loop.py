"""The agent loop on a model, with prefix caching or without, as JSON."""

import json
import sys
from pathlib import Path

from helpers.agents import agent_loop
from helpers.engine import Engine


def main() -> None:
    model, target, caching = sys.argv[1:]
    engine = Engine.start(
        model,
        kv_bytes=1 << 28,
        fastgen={"debug": False},
        enable_prefix_caching=caching == "with",
    )
    free = engine.free_blocks()
    answers = agent_loop(engine, users=3, turns=3)
    assert engine.free_blocks() == free
    Path(target).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
