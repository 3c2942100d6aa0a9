"""One function per operation, in several implementations; ``select`` picks one at start-up."""

from fastgen_vllm.kernels.contract import (
    UNBOUNDED,
    DecodeBatch,
    HeadRules,
    HeadState,
    Kernels,
    Look,
    Looks,
    Pages,
    ProfiledQueries,
    PromptBatch,
    PromptKeys,
    Selected,
)
from fastgen_vllm.kernels.select import select

__all__ = [
    "UNBOUNDED",
    "DecodeBatch",
    "HeadRules",
    "HeadState",
    "Kernels",
    "Look",
    "Looks",
    "Pages",
    "ProfiledQueries",
    "PromptBatch",
    "PromptKeys",
    "Selected",
    "select",
]
