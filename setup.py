"""Builds the native kernels: csrc/cpu where torch and a C++ compiler are at hand, csrc/cuda where
a CUDA build of torch and nvcc are.

Without them the package installs all the same: plain PyTorch serves a CPU, Triton a GPU.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

CUDA = "fastgen_vllm._cuda"


def say(text: str) -> None:
    print(f"fastgen-vllm: {text}", file=sys.stderr)


def nvcc() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    found = Path(CUDA_HOME or "", "bin", "nvcc")
    return str(found) if found.exists() else shutil.which("nvcc")


def native_kernels() -> dict:
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        say(
            "torch is not importable here, so the native kernels are not built; "
            "install with --no-build-isolation into an environment that has torch"
        )
        return {}
    extensions = []
    if sys.platform == "linux" and platform.machine() == "x86_64":
        cpu = CppExtension(
            "fastgen_vllm._cpu",
            sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc/cpu").iterdir()),
            extra_compile_args=["-O3", "-fno-strict-aliasing", "-fopenmp", "-Wno-psabi"],
            extra_link_args=["-fopenmp"],
        )
        extensions.append(cpu)
    else:
        say("native CPU kernels exist for x86-64 Linux only")
    if torch.version.cuda is not None:
        if nvcc():
            sources = sorted(str(path) for path in Path("csrc/cuda").iterdir())
            extensions.append(Extension(CUDA, [], depends=sources))
        else:
            say("no nvcc, so the CUDA C++ kernels are not built; Triton's serve the GPU")

    class BuildIfPossible(BuildExtension):
        def build_extensions(self) -> None:
            every = self.extensions
            for extension in every:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                except Exception as error:
                    extension.optional = True  # nothing to copy or to check afterwards
                    say(f"{extension.name} was not built: {error}")
            self.extensions = every

        def build_extension(self, extension: Extension) -> None:
            if extension.name != CUDA:
                super().build_extension(extension)
                return
            target = Path(self.get_ext_fullpath(CUDA))
            target.parent.mkdir(parents=True, exist_ok=True)
            build = ["bash", "csrc/cuda/build.sh", str(target)]
            subprocess.run(build, check=True, env={**os.environ, "NVCC": str(nvcc())})

    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildIfPossible}}


setup(**native_kernels())
