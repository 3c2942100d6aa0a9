"""Where the ``fastgen`` command begins: its packages are not among a server's."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = ("matplotlib", "rich", "typer")


def main() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"The fastgen command needs {', '.join(missing)}, which serving does not. "
            "Install them, from this project's folder: pip install --no-build-isolation '.[tools]'"
        )
    from fastgen_vllm.tools.cli import app

    app()


if __name__ == "__main__":
    main()
