"""Builds vi_simsiam._C (csrc/): the CPU backend, and the CUDA backend if nvcc is found.

torch is not needed. VI_SIMSIAM_NO_EXTENSION=1 and VI_SIMSIAM_NO_CUDA=1 leave the backends out;
TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX" chooses the GPUs. A part that cannot be built is left out with
one line that gives the reason, and the package works without it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

_DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX"
_LINUX, _WINDOWS = sys.platform == "linux", sys.platform == "win32"
_CUDART = "cudart_static.lib" if _WINDOWS else "libcudart_static.a"
_HOST = "/MD" if _WINDOWS else "-fPIC,-fvisibility=hidden"


def architectures(supported: str, wanted: str = "") -> dict[str, list[str]]:
    """Return nvcc's flags for each architecture of TORCH_CUDA_ARCH_LIST that nvcc supports.

    Args:
        supported: the output of nvcc --list-gpu-code.
        wanted: the value of TORCH_CUDA_ARCH_LIST; "9.0+PTX" adds PTX, which later GPUs compile.

    Raises:
        ValueError: nvcc supports none of them.
    """
    flags, wanted = {}, wanted or _DEFAULT_ARCHITECTURES
    for name in filter(None, re.split(r"[;,\s]+", wanted)):
        number = name.removesuffix("+PTX").replace(".", "")
        if f"sm_{number.rstrip('af')}" in supported.split():
            codes = ["sm", "compute"] if name.endswith("+PTX") else ["sm"]
            flags[name] = [f"-gencode=arch=compute_{number},code={code}_{number}" for code in codes]
    if not flags:
        raise ValueError(f"nvcc has none of {wanted}, only {' '.join(supported.split())}")
    return flags


def _output(*command: str | Path) -> str:
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    return subprocess.run(command, check=True, text=True, stdout=pipe, stderr=merged).stdout


class _BuildExtension(build_ext):  # type: ignore[misc]
    def build_extension(self, ext: Extension) -> None:
        self.force = True  # nvcc and the switches have no date to compare
        try:
            header = Path(sysconfig.get_paths()["include"], "Python.h")
            compiler = getattr(self.compiler, "compiler_so_cxx", [sys.executable])[0]
            for file, found in ((compiler, shutil.which(compiler)), (header, header.is_file())):
                if not found:
                    raise BaseError(
                        f"{file} not found (a C++ compiler and Python's headers are needed)"
                    )
            try:
                self._add_cuda(ext)
            except (OSError, ValueError, subprocess.CalledProcessError) as error:
                lines = ((getattr(error, "stdout", None) or "").strip() or str(error)).splitlines()
                reason = next((line for line in lines if "error" in line), lines[-1])
                print(f"vi_simsiam: building without the CUDA backend: {reason}", file=sys.stderr)
            super().build_extension(ext)
        except (BaseError, CCompilerError) as error:
            print(f"vi_simsiam: installing without compiled backends: {error}", file=sys.stderr)
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    def _add_cuda(self, ext: Extension) -> None:
        home = os.path.join(os.environ.get("CUDA_HOME", ""), "bin")
        nvcc = shutil.which("nvcc", path=home + os.pathsep + os.environ.get("PATH", ""))
        if nvcc is None:
            raise ValueError("no nvcc in CUDA_HOME or on PATH")
        if os.environ.get("VI_SIMSIAM_NO_CUDA") == "1":
            raise ValueError("VI_SIMSIAM_NO_CUDA is set")
        sources = sorted(Path("csrc").glob("*.cu"))
        self.mkpath(self.build_temp)
        dry_run = _output(nvcc, "--dryrun", sources[0], "-o", "unused")
        folders = re.findall(r'"(?:-L|/LIBPATH:)([^"]+)"', dry_run)
        folder = next((folder for folder in folders if Path(folder, _CUDART).is_file()), None)
        if folder is None:
            raise ValueError(f"{_CUDART} is in none of nvcc's folders: {' '.join(folders)}")
        supported = _output(nvcc, "--list-gpu-code")
        flags = architectures(supported, os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
        options = ["-O3", "-std=c++17", "-DVI_SIMSIAM_CUDA", "--threads=0"]
        options += [flag for group in flags.values() for flag in group]
        _output(nvcc, *options, f"-Xcompiler={_HOST}", "-c", *sources, "-odir", self.build_temp)
        ext.library_dirs.append(folder)
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"] if _LINUX else ["cudart_static"]
        suffix = ".obj" if _WINDOWS else ".o"
        ext.extra_objects += [str(Path(self.build_temp, x.stem + suffix)) for x in sources]
        ext.define_macros.append(("VI_SIMSIAM_CUDA", ",".join(flags)))


if __name__ == "__main__":
    from pybind11.setup_helpers import Pybind11Extension

    cpu_sources = sorted(str(file) for file in Path("csrc").glob("*.cpp"))
    extension = Pybind11Extension("vi_simsiam._C", cpu_sources, cxx_std=17)
    extension.depends = sorted(str(file) for file in Path("csrc").iterdir())
    optimise = ["/O2"] if _WINDOWS else ["-O3", "-ffp-contract=fast", "-pthread"]
    extension.extra_compile_args += optimise
    extension.extra_link_args += ["-pthread", "-Wl,--exclude-libs,ALL"] if _LINUX else []
    extension.optional = True
    folders = {"vi_simsiam.kernels": "kernels", "vi_simsiam.benchmarks": "benchmarks"}
    setup(
        packages=[*find_packages(include=["vi_simsiam", "vi_simsiam.*"]), *folders],
        package_dir=folders,
        ext_modules=[] if os.environ.get("VI_SIMSIAM_NO_EXTENSION") == "1" else [extension],
        cmdclass={"build_ext": _BuildExtension},
    )
