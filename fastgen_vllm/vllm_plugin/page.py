"""A live page at ``/fastgen`` on vLLM's API server, where the setting ``page`` asks for it.

The page itself holds nothing. Its data comes from ``/v1/fastgen``, which vLLM guards by its API key
where one is set. They are request ids, and positions and shares of what requests kept, never text.
"""

from __future__ import annotations

import itertools
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fastgen_vllm.vllm_plugin import wrap
from fastgen_vllm.vllm_plugin.settings import is_fastgen

HISTORY, REQUESTS = 600, 100
"""Accounts, which come about once a second while an engine is busy, and requests, that are kept."""

SERVER = secrets.token_hex(4)
"""Tells this process from another API server's: their numbers differ."""
_numbers = itertools.count()

history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
requests: deque[dict[str, Any]] = deque(maxlen=REQUESTS)
FIGURES = ("engine", "kv_held_bytes", "kv_saved_bytes", "running", "waiting")


def add(account: dict[str, Any]) -> None:
    """Remember an account of ``runtime.traffic``."""
    figures = {name: account[name] for name in FIGURES}
    history.append({"n": next(_numbers), "time": time.time(), **figures})
    requests.extend({"n": next(_numbers), **shown} for shown in account["shown"])


def before_serving(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Wraps ``OutputProcessor.__init__``. By then a process that goes on to serve HTTP has imported
    vLLM's module for it, and no other process has to."""
    original(*args, **kwargs)
    launcher: Any = sys.modules.get("vllm.entrypoints.launchers.app")
    if launcher and not hasattr(launcher.attach_endpoint_plugins, "__wrapped__"):
        wrap(launcher, "attach_endpoint_plugins", attach_endpoint_plugins)


def attach_endpoint_plugins(original: Callable[..., None], app: Any, *args: Any) -> None:
    """Wraps what adds the routes of vLLM's plugins to its API server."""
    original(app, *args)
    if _asked_for(app.state.args):
        add_routes(app)


def _asked_for(args: Any) -> bool:
    """Whether the arguments of ``vllm serve`` ask for the page."""
    settings = (getattr(args, "additional_config", None) or {}).get("fastgen", {})
    in_config = getattr(getattr(args, "attention_config", None), "backend", None)
    backend = getattr(args, "attention_backend", None) or in_config
    return is_fastgen(backend) and bool(settings.get("page"))


def add_routes(app: Any) -> None:
    from fastapi.responses import HTMLResponse

    text = files("fastgen_vllm.vllm_plugin").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/fastgen", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text)

    @app.get("/v1/fastgen")
    async def state(since: int = -1) -> dict[str, Any]:
        """What this process was told after the number ``since``."""
        return {
            "server": SERVER,
            "time": time.time(),
            "history": [each for each in history if each["n"] > since],
            "requests": [each for each in requests if each["n"] > since],
        }
