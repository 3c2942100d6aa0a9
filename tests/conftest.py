"""Engines and texts shared by the suite."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# With several workers (pytest -n) each has cores of its own: on shared ones they slow each other
# several times over. Torch learns how many threads to take when it is first imported.
worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker is not None:
    cores, count = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker[2:]) % len(cores) :: count])

# The engine runs inside the test process, so that tests can look at its tables.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Triton kernels run on CPU tensors; Triton reads this when it is first imported.
os.environ["TRITON_INTERPRET"] = "1"
# What tests start as programs find the helpers too.
TESTS = str(Path(__file__).parent)
sys.path.insert(0, TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))

import helpers.quick_interpreter  # noqa: E402, F401
import pytest  # noqa: E402
from helpers.engine import Engine  # noqa: E402
from helpers.models import first_layers  # noqa: E402
from helpers.paths import MODEL  # noqa: E402


@pytest.fixture(scope="session")
def whole_model() -> str:
    assert Path(MODEL, "config.json").exists(), "run scripts/setup.sh: the small model is missing"
    return MODEL


@pytest.fixture(scope="session")
def model(whole_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six of its thirty layers: most of what is shown does not hang on how many there are."""
    return first_layers(6, tmp_path_factory.mktemp("models") / "six-layers")


@pytest.fixture(scope="session")
def engine(model: str) -> Engine:
    """FastGen, float32, ample memory, prompts in chunks of at most 256 tokens, debug mode."""
    return Engine.start(model, 1 << 28, {"recovery": 0.9, "decode_window": 32})


SLOW = ("test_serve.py", "test_runners.py", "test_offline.py", "test_native_build.py")
"""After them come the other tests that are marked ``engine`` and do not take the suite's own."""


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``-n 2 --dist worksteal`` each worker begins with a half of what is collected, and then
    takes over the end of the other's. So the suite's engine is started in one of them, and a server
    in the other; what is quick comes after both."""
    own = [item for item in items if "engine" in getattr(item, "fixturenames", ())]
    slow = [item for item in items if item not in own and _is_slow(item)]
    slow.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))
    quick = [item for item in items if item not in {*own, *slow}]
    rest = max(0, len(items) // 2 - len(own))
    items[:] = [*own, *quick[:rest], *slow, *quick[rest:]]


def _is_slow(item: pytest.Item) -> bool:
    return bool(item.path.name in SLOW or item.get_closest_marker("engine"))
