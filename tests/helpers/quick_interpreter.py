"""Triton's interpreter lists the members of its language anew for each call of a function, up to a
quarter of its time. Here those that it finds first are remembered."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from triton import language
from triton.runtime import interpreter


@cache
def builtins_of(package: Any) -> list[tuple[str, Any]]:
    members = inspect.getmembers(package)
    return [(name, member) for name, member in members if language.core.is_builtin(member)]


def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in builtins_of(package):
        interpreter._patch_attr(package, name, member, builder, scope)


interpreter._patch_builtin = patch_builtin
