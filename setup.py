"""Calls CMake, and maps the top-level folder kernels/ to the import name sv3d_fast.kernels. Nothing else.

The native libraries are plain C ABI objects (apache-tvm-ffi): no torch and no Python headers are needed to build
them, so one file serves every Python and torch. CMakeLists.txt holds the only list of sources.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
NATIVE = ROOT / "sv3d_fast" / "native"


class BuildNative(build_py):
    """Builds csrc/ into sv3d_fast/native before the Python files are collected."""

    def run(self):
        build = ROOT / "build" / "native"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSV3D_FAST_OUTPUT={NATIVE}",
        ]  # fmt: skip
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build)])
        super().run()


class NativeDistribution(Distribution):
    """Marks the wheel as platform-specific: it carries shared objects that setuptools did not build."""

    def has_ext_modules(self):
        return True


setup(
    cmdclass={"build_py": BuildNative},
    distclass=NativeDistribution,
    package_dir={"sv3d_fast": "sv3d_fast", "sv3d_fast.kernels": "kernels"},
)
