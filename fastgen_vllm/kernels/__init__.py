"""One function per operation, in several implementations; ``select`` picks one at start-up."""

from fastgen_vllm.kernels.select import Kernels, native, select

__all__ = ["Kernels", "native", "select"]
