"""A program: ``scripts/gpu/engine.py`` on the pretend device; its arguments are that one's."""

from __future__ import annotations

import gc
import os
import runpy
import sys

from helpers import pretend_device
from helpers.paths import ROOT

from programs.run_on_pretend_gpu import (
    DEVICE,
    load_on_cpu_then_move,
    pretend_cuda_build,
    pretend_driver,
)

if __name__ == "__main__":
    os.environ["NO_C"] = "pretend"  # what V2 and graphs need of them, the pretend device has
    pretend_device.DEVICE = DEVICE
    engine = ROOT / "scripts/gpu/engine.py"
    with pretend_device.pretend_device() as mode:
        pretend_driver(mode)
        pretend_cuda_build(mode)
        load_on_cpu_then_move()
        sys.argv[0] = str(engine)
        gc.freeze()  # vLLM collects garbage time and again, and what is imported stays
        runpy.run_path(str(engine), run_name="__main__")
