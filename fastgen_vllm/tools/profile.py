"""``fastgen profile``: what each head of a model keeps of one prompt, in pictures."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.policy.choice import Choice
from fastgen_vllm.policy.hybrids import hybrids_of
from fastgen_vllm.tools.lab import Lab, Variant

COLOURS = {
    "special": "#4292c6",
    "special+punctuation": "#08519c",
    "special+local": "#74c476",
    "special+punctuation+local": "#238b45",
    "special+frequent": "#fdae6b",
    "special+punctuation+frequent": "#e6550d",
    "special+frequent+local": "#807dba",
    "special+punctuation+frequent+local": "#54278f",
    "full": "#525252",
}
"""By kind of hybrid, from what keeps little to what keeps all; others are added as they come."""


@dataclass(frozen=True)
class Profiled:
    """One prompt's choice.

    Attributes:
        kinds: ``[L][H]``, the components of each head's policy.
        names: the same, with ratios.
        pieces: the prompt's text in pieces of whole characters.
        piece_share: of each piece, the share of heads that keep it (the most kept of its tokens).
    """

    title: str
    choice: Choice
    kinds: list[list[str]]
    names: list[list[str]]
    pieces: list[str]
    piece_share: list[float]


def profile(model: str, prompt: str, config: FastGenConfig) -> Profiled:
    """Encode ``prompt`` and let every head choose.

    Raises:
        ValueError: the prompt is too short to be compressed, or the goal keeps everything.
    """
    variant = Variant("profile", config)
    if variant.goal.keeps_everything:
        raise ValueError(f"{config.description} keeps everything: nothing to show; lower it")
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model).encode(prompt)
    if len(tokens) < config.min_prompt_tokens:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens; from {config.min_prompt_tokens} on "
            "(fastgen.min_prompt_tokens) it would be compressed"
        )
    lab = Lab(model, [variant], 3 * len(tokens) + 256)
    lab.prefill(tokens)
    choice = lab.choices[variant.name]
    heads = choice.rules.frequent.shape[1]
    hybrids = hybrids_of(choice.rules)
    rows = [hybrids[i : i + heads] for i in range(0, len(hybrids), heads)]
    share = choice.kept.float().mean((0, 1)).tolist()
    pieces = list(_pieces(lab.tokenizer, tokens))
    title = f"{Path(model).name}, {len(tokens)} tokens, {config.description}"
    return Profiled(
        title,
        choice,
        [[hybrid.kind for hybrid in layer] for layer in rows],
        [[hybrid.name for hybrid in layer] for layer in rows],
        [text for text, _, _ in pieces],
        [max(share[first:last]) for _, first, last in pieces],
    )


def _pieces(tokenizer: Any, tokens: list[int]) -> Iterator[tuple[str, int, int]]:
    """Text and token range of the shortest runs that decode to whole characters: a Korean syllable
    can be several tokens."""
    first = 0
    for last in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[first:last])
        if not text.endswith("\ufffd") or last - first == 8 or last == len(tokens):
            yield text, first, last
            first = last


def table(found: Profiled) -> Table:
    """For the terminal: a line a layer."""
    kept = found.choice.kept.float().mean(-1)
    recovery = found.choice.recovery.mean(1)
    rows = Table("layer", "KV kept", "recovery", "heads by policy", title=found.title)
    for layer, kinds in enumerate(found.kinds):
        counts = ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).most_common())
        rows.add_row(
            str(layer), f"{kept[layer].mean():.1%}", f"{float(recovery[layer]):.3f}", counts
        )
    rows.add_section()
    rows.add_row("all", f"{kept.mean():.1%}", f"{float(recovery.mean()):.3f}", "")
    return rows


def picture(found: Profiled) -> Any:
    """A heat map of all heads, the recoveries' histogram, and KV kept per layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch, Rectangle

    layers, heads = found.choice.recovery.shape
    kept = found.choice.kept.float().mean(-1)
    kinds = Counter(kind for layer in found.kinds for kind in layer)
    spare = iter(["#e377c2", "#17becf", "#bcbd22", "#8c564b", "#d62728"] * len(kinds))
    colours = {kind: COLOURS.get(kind) or next(spare) for kind in [*COLOURS, *kinds]}
    figure = plt.figure(figsize=(11, max(6.0, 0.27 * layers + 2.2)), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(max(1.1, 0.16 * heads), 1))
    axes = figure.add_subplot(grid[:, 0])
    for layer in range(layers):
        for head in range(heads):
            share = float(kept[layer, head])
            depth = 0.25 + 0.75 * share
            colour = [1 - depth * (1 - c) for c in to_rgb(colours[found.kinds[layer][head]])]
            axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, facecolor=colour, ec="w"))
            axes.text(
                head,
                layer,
                f"{share:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if sum(colour) < 1.5 else "black",
            )
    axes.set_xlim(-0.5, heads - 0.5)
    axes.set_ylim(layers - 0.5, -0.5)
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.set_title(
        "policy (colour), and share of the prompt kept (number, depth of colour)", fontsize=10
    )
    shown = [kind for kind in colours if kind in kinds]
    patches = [Patch(color=colours[kind], label=f"{kind} ({kinds[kind]})") for kind in shown]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.07), fontsize=8)
    histogram = figure.add_subplot(grid[0, 1])
    histogram.hist(found.choice.recovery.flatten().tolist(), bins=30, color="#6baed6")
    histogram.set_xlabel("recovery: attention that the kept tokens hold")
    histogram.set_ylabel("heads")
    bars = figure.add_subplot(grid[1, 1])
    bars.bar(range(layers), (100 * kept.mean(1)).tolist(), color="#6baed6")
    bars.axhline(100 * float(kept.mean()), color="black", linewidth=0.8)
    bars.set_xlabel("layer")
    bars.set_ylabel(f"KV kept, % (all: {float(kept.mean()):.0%})")
    figure.suptitle(found.title, fontsize=11)
    return figure


def page(found: Profiled, figure: Any) -> str:
    """One HTML page with everything in it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    image = base64.b64encode(stream.getvalue()).decode()
    text = "".join(
        f'<span style="background:rgba(33,113,181,{0.85 * share:.2f});'
        f'color:{"#fff" if share > 0.6 else "#000"}" title="{share:.0%} of heads">'
        f"{html.escape(piece).replace(chr(10), '<br>')}</span>"
        for piece, share in zip(found.pieces, found.piece_share, strict=True)
    )
    rows = "".join(
        f"<tr><td>{layer}</td>"
        + "".join(
            f"<td>{html.escape(name)}<br>{float(found.choice.kept[layer, head].float().mean()):.1%}"
            f", recovery {float(found.choice.recovery[layer, head]):.3f}</td>"
            for head, name in enumerate(names)
        )
        + "</tr>"
        for layer, names in enumerate(found.names)
    )
    heads = "".join(f"<th>KV head {head}</th>" for head in range(len(found.names[0])))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>FastGen profile</title>
<style>
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }} .text {{ line-height: 2 }} .text span {{ padding: 2px 0 }}
table {{ border-collapse: collapse; font-size: 12px }}
td, th {{ border: 1px solid #ccc; padding: 3px 8px }}
</style>
<h1>What each head keeps</h1>
<p>{html.escape(found.title)}. Each attention head keeps the cheapest set of tokens that holds
enough of its attention; the rest of its KV cache is given back.</p>
<img alt="policies by layer and head" src="data:image/png;base64,{image}">
<h2>The prompt</h2>
<p>The darker a token, the more heads keep it; point at one for the share.</p>
<p class="text">{text}</p>
<h2>Every head</h2>
<table><tr><th>layer</th>{heads}</tr>{rows}</table>
</html>
"""
