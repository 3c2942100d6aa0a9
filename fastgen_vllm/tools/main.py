"""Where the ``fastgen`` command begins: its packages are not among a server's."""

from __future__ import annotations

NEEDED = ("matplotlib", "rich", "typer")


def main() -> None:
    try:
        from fastgen_vllm.tools.cli import app
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise SystemExit(
            f"The fastgen command needs the package {error.name}, which serving does not. "
            "Install it: pip install 'fastgen-vllm[tools]'"
        ) from None
    app()
