"""Methods, one a file: FastGen's own two, by peaks and by a ladder, and others of the literature to
compare them with at an equal share of the KV cache, as their papers define them."""

from fastgen_vllm.policy.methods.adakv import ADAKV
from fastgen_vllm.policy.methods.criticalkv import CRITICALKV
from fastgen_vllm.policy.methods.defensivekv import DEFENSIVEKV
from fastgen_vllm.policy.methods.expected_attention import EXPECTED_ATTENTION
from fastgen_vllm.policy.methods.h2o import H2O
from fastgen_vllm.policy.methods.keydiff import KEYDIFF
from fastgen_vllm.policy.methods.ladder import LADDER, PAPER_PROFILING
from fastgen_vllm.policy.methods.method import Method
from fastgen_vllm.policy.methods.peaks import PEAKS
from fastgen_vllm.policy.methods.pyramidkv import PYRAMIDKV
from fastgen_vllm.policy.methods.random_keys import RANDOM
from fastgen_vllm.policy.methods.snapkv import SNAPKV
from fastgen_vllm.policy.methods.streaming import STREAMING
from fastgen_vllm.policy.methods.tova import TOVA

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(PEAKS, STREAMING, H2O, SNAPKV, PYRAMIDKV, ADAKV, TOVA),
        *(CRITICALKV, DEFENSIVEKV, EXPECTED_ATTENTION, KEYDIFF, RANDOM),
    )
}
"""Every method by its name in the settings; where a ladder or a recovery is asked for, FastGen's is
``LADDER``."""

EVAL_ONLY = frozenset(name for name, method in METHODS.items() if method.needs_model)
"""Those that only ``fastgen eval`` can run."""

__all__ = ["EVAL_ONLY", "LADDER", "METHODS", "PAPER_PROFILING", "PEAKS", "Method"]
