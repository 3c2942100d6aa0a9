"""Methods, one a file: FastGen, and others of the literature to compare it with at an equal share
of the KV cache, as their papers define them."""

from fastgen_vllm.policy.methods.adakv import ADAKV
from fastgen_vllm.policy.methods.fastgen import FASTGEN
from fastgen_vllm.policy.methods.h2o import H2O
from fastgen_vllm.policy.methods.method import Method
from fastgen_vllm.policy.methods.peaks import PEAKS
from fastgen_vllm.policy.methods.pyramidkv import PYRAMIDKV
from fastgen_vllm.policy.methods.random_keys import RANDOM
from fastgen_vllm.policy.methods.snapkv import SNAPKV
from fastgen_vllm.policy.methods.streaming import STREAMING

METHODS: dict[str, Method] = {
    method.name: method
    for method in (FASTGEN, PEAKS, STREAMING, H2O, SNAPKV, PYRAMIDKV, ADAKV, RANDOM)
}
"""Every method by its name in the settings."""

__all__ = ["METHODS", "Method"]
