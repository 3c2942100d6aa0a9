"""``fastgen profile``: what each head of a model keeps of one prompt, in pictures."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.policy.choice import Choice
from fastgen_vllm.policy.hybrids import hybrids_of
from fastgen_vllm.reads import wait_for
from fastgen_vllm.tools.inputs import InputError
from fastgen_vllm.tools.lab import Lab, Variant
from fastgen_vllm.tools.models import check_context, load_tokenizer

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

SPARE_COLOURS = ("#e377c2", "#17becf", "#bcbd22", "#8c564b", "#d62728")
MOST_TOKENS = 8
"""The most tokens that are shown as one piece."""


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

    @property
    def kept_share(self) -> torch.Tensor:
        """float32 ``[L, H]``, of the prompt's tokens."""
        return self.choice.kept.float().mean(-1)


def profile(model: str, prompt: str, config: FastGenConfig) -> Profiled:
    """Encode ``prompt`` and let every head choose.

    Raises:
        InputError: the goal keeps everything, or the prompt is too short or too long.
    """
    variant = Variant("profile", config)
    if variant.goal.keeps_everything:
        raise InputError(
            f"There is nothing to show, because {config.description} keeps everything. Lower it."
        )
    tokens = load_tokenizer(model).encode(prompt)
    if len(tokens) < config.min_prompt_tokens:
        raise InputError(
            f"The prompt has {len(tokens)} tokens, and prompts of fewer than "
            f"{config.min_prompt_tokens} are kept whole. Take a longer prompt or a lower "
            "min_prompt_tokens."
        )
    check_context(model, len(tokens), "The prompt")
    lab = Lab(model, [variant], 3 * len(tokens) + 256)
    lab.prefill(tokens)
    choice = lab.choices[variant.name]
    per_layer, hybrids = lab.runtime.heads.num_kv_heads, wait_for(hybrids_of(choice.rules))
    heads = [hybrids[i : i + per_layer] for i in range(0, len(hybrids), per_layer)]
    share = choice.kept.float().mean((0, 1)).tolist()
    pieces = list(whole_characters(lab.tokenizer, tokens))
    return Profiled(
        title=f"{Path(model).name}, {len(tokens)} tokens, {config.description}",
        choice=choice,
        kinds=[[hybrid.kind for hybrid in layer] for layer in heads],
        names=[[hybrid.name for hybrid in layer] for layer in heads],
        pieces=[text for text, _, _ in pieces],
        piece_share=[max(share[first:last]) for _, first, last in pieces],
    )


def whole_characters(tokenizer: Any, tokens: list[int]) -> Iterator[tuple[str, int, int]]:
    """Text and token range of the shortest runs that decode to whole characters.

    A Korean syllable or an emoji can be several tokens. A run ends after ``MOST_TOKENS`` even so,
    because some tokens never make a character; this also bounds what is decoded again and again.
    """
    first = 0
    for last in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[first:last])
        whole = not text.endswith("\ufffd")
        if whole or last - first == MOST_TOKENS or last == len(tokens):
            yield text, first, last
            first = last


def table(found: Profiled) -> Table:
    """For the terminal: a line a layer."""
    kept, recovery = found.kept_share, found.choice.recovery.mean(1)
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

    layers, heads = found.choice.recovery.shape
    figure = plt.figure(figsize=(11, max(6.0, 0.27 * layers + 2.2)), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(max(1.1, 0.16 * heads), 1))
    _draw_heads(figure.add_subplot(grid[:, 0]), found)
    histogram = figure.add_subplot(grid[0, 1])
    histogram.hist(found.choice.recovery.flatten().tolist(), bins=30, color="#6baed6")
    histogram.set_xlabel("recovery: attention that the kept tokens hold")
    histogram.set_ylabel("heads")
    kept = 100 * found.kept_share
    bars = figure.add_subplot(grid[1, 1])
    bars.bar(range(layers), kept.mean(1).tolist(), color="#6baed6")
    bars.axhline(float(kept.mean()), color="black", linewidth=0.8)
    bars.set_xlabel("layer")
    bars.set_ylabel(f"KV kept, % (all: {float(kept.mean()):.0f}%)")
    figure.suptitle(found.title, fontsize=11)
    return figure


def _draw_heads(axes: Any, found: Profiled) -> None:
    """A cell a head: its policy as colour, the share it keeps as number and as depth of colour."""
    from matplotlib.patches import Patch

    layers, heads = found.choice.recovery.shape
    kinds = Counter(kind for layer in found.kinds for kind in layer)
    spare = cycle(SPARE_COLOURS)
    colours = {kind: COLOURS.get(kind) or next(spare) for kind in [*COLOURS, *kinds]}
    for layer, shares in enumerate(found.kept_share.tolist()):
        for head, share in enumerate(shares):
            _draw_head(axes, head, layer, colours[found.kinds[layer][head]], share)
    axes.set_xlim(-0.5, heads - 0.5)
    axes.set_ylim(layers - 0.5, -0.5)
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    title = "policy (colour), and share of the prompt kept (number, depth of colour)"
    axes.set_title(title, fontsize=10)
    shown = [kind for kind in colours if kind in kinds]
    patches = [Patch(color=colours[kind], label=f"{kind} ({kinds[kind]})") for kind in shown]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.07), fontsize=8)


def _draw_head(axes: Any, head: int, layer: int, colour: str, share: float) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    depth = 0.25 + 0.75 * share
    shade = [1 - depth * (1 - c) for c in to_rgb(colour)]
    axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, facecolor=shade, ec="w"))
    light = "white" if sum(shade) < 1.5 else "black"
    centred = {"ha": "center", "va": "center", "fontsize": 8}
    axes.text(head, layer, f"{share:.0%}", color=light, **centred)


def page(found: Profiled, picture: bytes) -> str:
    """One HTML page with everything in it, the picture as PNG too."""
    heads = "".join(f"<th>KV head {head}</th>" for head in range(len(found.names[0])))
    return PAGE.format(
        title=html.escape(found.title),
        image=base64.b64encode(picture).decode(),
        text="".join(map(_shaded, found.pieces, found.piece_share)),
        heads=heads,
        rows="".join(_row(found, layer) for layer in range(len(found.names))),
    )


def _shaded(piece: str, share: float) -> str:
    colour = "#fff" if share > 0.6 else "#000"
    return (
        f'<span style="background:rgba(33,113,181,{0.85 * share:.2f});color:{colour}" '
        f'title="{share:.0%} of heads">{html.escape(piece).replace(chr(10), "<br>")}</span>'
    )


def _row(found: Profiled, layer: int) -> str:
    cells = zip(
        found.names[layer],
        found.kept_share[layer].tolist(),
        found.choice.recovery[layer].tolist(),
        strict=True,
    )
    return (
        f"<tr><td>{layer}</td>"
        + "".join(
            f"<td>{html.escape(name)}<br>{share:.1%}, recovery {recovery:.3f}</td>"
            for name, share, recovery in cells
        )
        + "</tr>"
    )


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>FastGen profile</title>
<style>
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }} .text {{ line-height: 2 }} .text span {{ padding: 2px 0 }}
table {{ border-collapse: collapse; font-size: 12px }}
td, th {{ border: 1px solid #ccc; padding: 3px 8px }}
</style>
<h1>What each head keeps</h1>
<p>{title}. Each attention head keeps the tokens that it looks at, as far as the
budget or the threshold asks for them; the rest of its KV cache is given back.</p>
<img alt="policies by layer and head" src="data:image/png;base64,{image}">
<h2>The prompt</h2>
<p>The darker a token, the more heads keep it; point at one for the share.</p>
<p class="text">{text}</p>
<h2>Every head</h2>
<table><tr><th>layer</th>{heads}</tr>{rows}</table>
</html>
"""
