"""Merges FOLDER's JSON into OUT/results.json and prints what to look at: summary.py FOLDER OUT."""

import json
import sys
from pathlib import Path
from typing import Any

folder, out = map(Path, sys.argv[1:])
runs: dict[str, Any] = {}
for path in sorted(folder.glob("*.json")):
    try:
        runs[path.stem] = dict(json.loads(path.read_text()))
    except ValueError:  # an engine was stopped while it wrote
        print(f"{path} is not whole", file=sys.stderr)
if not runs:
    raise SystemExit(f"there is no JSON of an engine in {folder}")


def agreement(stock: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Equal requests, and by how much stock's best token led where the others part."""
    gaps = []
    for a, b, lead in zip(stock["tokens"], full["tokens"], stock["gaps"], strict=True):
        parting = next((i for i in range(len(a)) if a[i] != b[i]), None)
        if parting is not None:
            gaps.append((parting, round(lead[parting], 4)))
    return {"requests": len(stock["tokens"]), "equal": len(stock["tokens"]) - len(gaps), "at": gaps}


def has(*names: str) -> bool:
    return all("kept" in runs.get(name, {}) for name in names)


found: dict[str, Any] = {}
for dtype in ("bf16", "fp32"):
    stock, full = f"small-{dtype}-stock", f"small-{dtype}-full"
    if has(stock, full):
        found[f"{dtype}: recovery 1.0 against stock"] = agreement(runs[stock], runs[full])
for other in ("v1", "replayed"):
    if has("small-bf16-default", f"small-bf16-{other}"):
        tokens = [runs[f"small-bf16-{name}"]["tokens"] for name in ("default", other)]
        equal = sum(a == b for a, b in zip(*tokens, strict=True))
        found[f"bf16: {other}'s answers equal to default's"] = [equal, len(tokens[0])]
for name in ("small-bf16-default", "big-bf16-default"):
    if has(name):
        kept = runs[name]["kept"]
        found[f"{name}: kept"] = [min(kept), sum(kept) / len(kept), max(kept)]
        found[f"{name}: vacated blocks"] = runs[name]["vacated"]
for stock, ours in (
    ("small-bf16-stock", "small-bf16-default"),
    ("big-bf16-stock", "big-bf16-default"),
    ("big-bf16-graphs", "big-bf16-replayed"),
    ("big-bf16-stock", "big-bf16-cuda"),
):
    if has(stock, ours):
        names = ("output_tokens_per_second", "most_running", "mean_running", "decode_step_ms")
        found[f"{ours} over {stock}"] = {
            n: round(runs[ours][n] / runs[stock][n], 3) for n in names if n in runs[ours]
        }
(out / "results.json").write_text(json.dumps({"found": found, "runs": runs}))
print(json.dumps(found, indent=1))
