"""Builds the native CPU kernels of csrc/cpu where torch and a C++ compiler are at hand.

Without them the package installs all the same and runs its plain-PyTorch kernels.
"""

import platform
import sys
from pathlib import Path

from setuptools import setup


def native_kernels() -> dict:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print(
            "fastgen-vllm: torch is not importable here, so the native CPU kernels are not built; "
            "install with --no-build-isolation into an environment that has torch",
            file=sys.stderr,
        )
        return {}
    if sys.platform != "linux" or platform.machine() != "x86_64":
        print("fastgen-vllm: native CPU kernels exist for x86-64 Linux only", file=sys.stderr)
        return {}
    extension = CppExtension(
        "fastgen_vllm._cpu",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc/cpu").iterdir()),
        extra_compile_args=["-O3", "-fno-strict-aliasing", "-fopenmp", "-Wno-psabi"],
        extra_link_args=["-fopenmp"],
        optional=True,
    )

    class BuildIfPossible(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                print(f"fastgen-vllm: native CPU kernels not built: {error}", file=sys.stderr)

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildIfPossible}}


setup(**native_kernels())
