"""The offline bundle: gathered here, checked, and installed with no network."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.build import quick_compiler
from helpers.paths import ROOT

NO_NETWORK = ["unshare", "-rn"]


def run(
    command: list[str], cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "FASTGEN_DEVICE": "cpu", **variables}
    # What is installed is tried, not the source that this suite runs on.
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage:"),
        (["--device", "tpu", "x"], "--device tpu"),
        (["--part-size", "64M", "x"], "--part-size 64M"),
        (["--model", "nowhere", "x"], f"no model in {Path.cwd() / 'nowhere'}"),
        (["--all", "x"], "unknown option --all"),
    ],
)
def test_bundle_refuses(arguments: list[str], message: str) -> None:
    refused = run(["bash", str(ROOT / "scripts/offline_bundle.sh"), *arguments])
    assert refused.returncode == 2 and message in refused.stderr


def write_index(directory: Path, name: str, version: str) -> str:
    """The URL of a package index with one empty wheel."""
    wheel = directory / name / f"{name}-{version}-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in files.items():
            archive.writestr(f"{name}-{version}.dist-info/{file}", text)
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    return directory.as_uri()


def test_bundle_installs_without_network(tmp_path: Path) -> None:
    bundle, target = tmp_path / "bundle", tmp_path / "target"
    options = ["--text-only", "--model", "none", "--part-size", "100"]
    # A third of the bundle, which nothing below uses.
    options += ["--without", "triton", "--without", "numba", "--without", "llvmlite", str(bundle)]
    gathered = run(
        ["bash", str(ROOT / "scripts/offline_bundle.sh"), *options],
        # A release that uv has heard of and pip has not.
        UV_EXTRA_INDEX_URL=write_index(tmp_path / "index", "attrs", "999.0"),
        UV_INDEX_STRATEGY="unsafe-best-match",
    )
    assert gathered.returncode == 0, gathered.stderr[-3000:]
    assert "resolving again with attrs!=999.0" in gathered.stdout
    parts = sorted(bundle.glob("fastgen-bundle.tar.*"))
    assert len(parts) > 3
    assert {part.stat().st_size for part in parts[:-1]} == {100 << 20}

    install = ["bash", str(bundle / "offline_install.sh"), target.name]
    isolated = run([*NO_NETWORK, "true"]).returncode == 0
    if not isolated:  # no user namespaces here: pip and uv are at least told not to look
        print("network not cut off: unshare is not permitted")
    install = [*(NO_NETWORK if isolated else []), *install]
    with parts[1].open("r+b") as part:
        part.seek(5000)
        damaged = part.read(1)
        part.seek(5000)
        part.write(bytes([damaged[0] ^ 1]))
    refused = run(install, cwd=target.parent)
    assert refused.returncode == 1 and "damaged" in refused.stderr
    assert parts[1].name in refused.stderr + refused.stdout
    assert not target.exists()
    with parts[1].open("r+b") as part:
        part.seek(5000)
        part.write(damaged)

    installed = run(
        install, target.parent, PIP_FIND_LINKS="", CXX=quick_compiler(tmp_path / "quick-g++")
    )
    assert installed.returncode == 0, installed.stderr[-3000:]
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as b;"
        "from fastgen_vllm.kernels import cpu; import torch, fastgen_vllm.config as c;"
        "print(b['FASTGEN'].name, repr(cpu.problem(64, torch.float32)), c.__file__)"
    )
    used = run([str(target / ".venv/bin/python"), "-c", code], cwd=tmp_path)
    wanted = ["FASTGEN", "''", str(target / "fastgen_vllm/config.py")]
    assert used.stdout.split()[-3:] == wanted, used.stderr[-3000:]
    left_out = [target.glob(f".venv/lib/*/site-packages/{name}") for name in ("triton", "numba")]
    assert not any(map(list, left_out))
    again = run(install, target.parent)
    assert again.returncode == 1 and "exists; name a new directory" in again.stderr
