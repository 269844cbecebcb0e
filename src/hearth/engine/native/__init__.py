"""Compiled C++ kernels for CPUs with AVX512-BF16 (and AMX where there is one); optional everywhere."""

from hearth.engine.native.build import NativeLibrary, library, why_not

__all__ = ["NativeLibrary", "library", "why_not"]
