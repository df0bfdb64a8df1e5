"""Packaging: where the folders install, the C++ kernels, and what vLLM finds at start-up.

Static metadata (name, version, dependencies) lives in pyproject.toml; here is only what needs code.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = ROOT / "vllm_sparq" / "csrc"

# The top level holds four folders that install as one package.
PACKAGE_FOLDERS = {
    "vllm_sparq": "vllm_sparq",
    "vllm_sparq.attention_backends": "attention_backends",
    "vllm_sparq.scheduler": "scheduler",
    "vllm_sparq.benchmarks": "benchmarks",
}

# One library per instruction set; vllm_sparq/ops/native.py picks one at import. gcc 12 does not know -march=znver4, so
# those of x86 are spelled out. Never -ffast-math: linking with it would switch denormals off for the whole process.
COMMON_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd"]
AVX512_VNNI = [*AVX512, "-mavx512vnni"]
AVX512_BF16 = [*AVX512_VNNI, "-mavx512bf16"]
INSTRUCTION_SETS = {
    "x86_64": {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_vnni": AVX512_VNNI,
        "avx512_bf16": AVX512_BF16,
        "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": {
        "neon": ["-march=armv8-a"],
    },
}
"""Architecture -> instruction set -> the compiler's options."""

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def target() -> str:
    """The architecture that the compiler makes code for, so that `CXX=aarch64-linux-gnu-g++` is all that Arm takes."""
    if COMPILER is None:
        return platform.machine()
    said = subprocess.run([*shlex.split(COMPILER), "-dumpmachine"], capture_output=True, text=True, check=True)
    return said.stdout.partition("-")[0]


class BuildKernels(build_ext):
    """Compiles vllm_sparq/csrc once per instruction set; without a compiler it installs the pure-torch reference."""

    def finalize_options(self) -> None:
        """The libraries are compiled side by side: each takes a core a minute or two."""
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        if COMPILER is None:
            self.warn(
                "no C++ compiler found: vllm-sparq installs without its CPU kernels and will run the pure-torch "
                "reference on CPU, hundreds of times slower. Install g++ and reinstall."
            )
            return
        include = f"-I{SOURCES.relative_to(ROOT)}"
        more = shlex.split(os.environ.get("CXXFLAGS", ""))  # `make sanitize` uses it
        flags = [*COMMON_FLAGS, *INSTRUCTION_SETS[target()][ext.name.rsplit("sparq_", 1)[1]], *more]
        command = [*shlex.split(COMPILER), *flags, include, "-shared", *ext.sources, "-o", str(library)]
        subprocess.run(command, check=True)

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the folder is not in the repository, since all it holds is built."""
        (SOURCES.parent / "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def get_ext_filename(self, fullname: str) -> str:
        """A plain shared library: it uses neither Python's nor torch's ABI, so one file serves all of them."""
        return str(Path(*fullname.split("."))) + ".so"


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for a platform, but for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def kernel_libraries() -> list[Extension]:
    sources = sorted(str(path.relative_to(ROOT)) for path in SOURCES.rglob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in SOURCES.rglob("*.h"))
    known = INSTRUCTION_SETS.get(target(), {})  # another architecture gets none, and runs the reference
    only = os.environ.get("VLLM_SPARQ_BUILD_ISA")  # for a run that needs no other, as of `make sanitize`
    if only and only not in known:
        raise SystemExit(
            f"VLLM_SPARQ_BUILD_ISA={only!r} is not an instruction set of {target()}: use one of {[*known]}"
        )
    names = [f"vllm_sparq.lib.libsparq_{isa}" for isa in known if not only or isa == only]
    # optional: without a compiler there is no library to put in place, and that is not an error
    return [Extension(name, sources, depends=headers, optional=True) for name in names]


def packages() -> list[str]:
    """Every folder with an ``__init__.py``, by the name that it installs under."""
    found = []
    for package, folder in PACKAGE_FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            found.append(".".join([package, *path.parent.relative_to(ROOT / folder).parts]))
    return sorted(found)


if target() != platform.machine():
    os.environ["_PYTHON_HOST_PLATFORM"] = f"linux-{target()}"  # of sysconfig: names the build folder and the wheel

setup(
    packages=packages(),
    package_dir=PACKAGE_FOLDERS,
    ext_modules=kernel_libraries(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel},
)
