"""kvpress is measured in a process of its own. A package of its name stands in for it here, whose
presses keep what is easy to say; where FASTGEN_KVPRESS names a Python that has it, it comes too."""

from __future__ import annotations

import os
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.engine import english
from helpers.paths import TEXTS

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.tools.child import ChildError
from fastgen_vllm.tools.eval import kvpress
from fastgen_vllm.tools.eval.compare import run_eval, side_by_side
from fastgen_vllm.tools.eval.kvpress import Kvpress, KvpressLab, PressVariant
from fastgen_vllm.tools.eval.material import Load
from fastgen_vllm.tools.eval.report import Summary, markdown
from fastgen_vllm.tools.inputs import InputError
from fastgen_vllm.tools.lab import Lab, Variant

STAND_IN = '''
from contextlib import contextmanager
import torch

class Press:
    def __init__(self, ratio, **options):
        self.ratio = ratio if isinstance(ratio, float) else ratio.ratio

    def hook(self, module, inputs, options, output):
        cache = options["past_key_values"].layers[module.layer_idx]
        kept = int(cache.keys.shape[2] * (1 - self.ratio))
        cache.keys, cache.values = cache.keys[:, :, -kept:], cache.values[:, :, -kept:]

    @contextmanager
    def __call__(self, model):
        layers = [layer.self_attn for layer in model.model.layers]
        hooks = [l.register_forward_hook(self.hook, with_kwargs=True) for l in layers]
        yield
        for hook in hooks:
            hook.remove()

class Hiding(Press):
    """Frees nothing, and hides the first keys of head 1 alone."""
    def hook(self, module, inputs, options, output):
        slots = torch.arange(int(options["past_key_values"].layers[0].keys.shape[2] * self.ratio))
        module.masked_key_indices = torch.zeros_like(slots), torch.ones_like(slots), slots

SnapKVPress = TOVAPress = PyramidKVPress = KeyDiffPress = ExpectedAttentionPress = Press
AdaKVPress = CriticalAdaKVPress = Hiding
'''
BUDGET = 0.3


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of its own, which borrows this one's packages and has the stand-in."""
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    (site / "kvpress.py").write_text(STAND_IN)
    metadata = site / "kvpress-0.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 0.0\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def lab(model: str) -> Lab:
    return Lab(model, [Variant("full", FastGenConfig(kv_budget=1.0))], 2048)


@pytest.fixture
def peers(model: str, python: Path, lab: Lab) -> Iterator[KvpressLab]:
    variants = [PressVariant(None, 1.0), *(PressVariant(p, BUDGET) for p in ("SnapKV", "AdaKV"))]
    with KvpressLab(model, Kvpress(python, variants), lab) as peers:
        yield peers


@pytest.mark.engine
def test_it_has_the_face_of_a_lab(lab: Lab, peers: KvpressLab) -> None:
    """The full cache is the lab's own, token by token and again after a fork; what is kept is told
    apart from what is in memory."""
    tokens = lab.tokenizer.encode(english(900, "types"))
    n = len(tokens)
    lab.prefill(tokens)
    peers.prefill(tokens)
    first, answer = peers.logits, []
    assert torch.equal(first[1], first[0]), "the prompt itself is encoded in full"
    for _ in range(4):
        torch.testing.assert_close(peers.logits[0], lab.logits[0], atol=1e-3, rtol=1e-3)
        answer.append(int(lab.logits[0].argmax()))
        lab.decode(answer[-1:])
        peers.decode(answer[-1:] * 3)
    last = peers.logits
    assert not torch.allclose(last[1], last[0], atol=0.01), "a shorter cache answers otherwise"
    peers.fork()
    assert torch.equal(peers.logits, first)
    for token in answer:
        peers.decode([token] * 3)
    assert torch.equal(peers.logits, last)
    kept = int(n * (1 - (1 - BUDGET)))
    assert kept < n / 2
    hidden = int(n * (1 - BUDGET))
    heads = lab.runtime.heads.num_kv_heads
    assert peers.kept_ratio().tolist() == pytest.approx([1, kept / n, 1 - hidden / n / heads])
    assert peers.page_ratio().tolist() == pytest.approx([1, kept / n, 1])
    for i, (head, start) in enumerate([(0, n - kept), (1, n - kept), (0, 0), (1, hidden)]):
        positions = peers.kept_positions(peers.variants[1 + i // 2].name)
        assert all(layer[head] == set(range(start, n)) for layer in positions)


@pytest.mark.engine
def test_eval_beside_kvpress(model: str, python: Path) -> None:
    compared = [Variant("full", FastGenConfig(kv_budget=1.0))]
    compared.append(Variant("tova, budget 0.3", FastGenConfig(method="tova", kv_budget=BUDGET)))
    load = Load((256,), {"continuation": 1, "few_shot": 1})
    wanted = kvpress.of(Path(os.environ.get("FASTGEN_KVPRESS", python)), [BUDGET])
    results = run_eval(model, TEXTS, load, compared, {}, wanted)
    assert results["kvpress"]["version"]
    methods = [v["method"] for v in results["variants"]]
    assert methods == ["full", "tova", *(f"kvpress {press}" for press in kvpress.PRESSES)]
    summary, by_method = Summary(results), {name: i for i, name in enumerate(methods)}
    assert summary.slots[by_method["kvpress TOVA"]] == pytest.approx(BUDGET, abs=0.02)
    assert summary.pages[by_method["kvpress AdaKV"]] == 1.0
    assert all(name in markdown(results) for name in methods)
    if "FASTGEN_KVPRESS" in os.environ:
        kl = results["prompts"][0]["kl"]
        assert kl[by_method["tova"]] == pytest.approx(kl[by_method["kvpress TOVA"]], rel=0.1)


def test_two_full_caches_that_differ() -> None:
    ours, theirs = {"loss": torch.tensor([1.0, 2.0])}, {"loss": torch.tensor([1.0001, 3.0])}
    assert side_by_side([ours, theirs])["loss"].tolist() == [1.0, 2.0, 3.0]
    answered = [{"own": figures["loss"]} for figures in (ours, theirs)]
    assert side_by_side(answered)["own"].tolist() == [1.0, 2.0, 3.0], "it has no loss"
    with pytest.raises(InputError, match=r"differs by \+0.5000"):
        side_by_side([ours, {"loss": torch.tensor([1.5, 3.0])}])


@pytest.mark.engine
def test_a_press_that_fails_shows_its_log(peers: KvpressLab) -> None:
    with pytest.raises(ChildError, match="kvpress failed"):
        peers.prefill([])
