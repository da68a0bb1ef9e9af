"""The compiled kernels: a plain C library that core/kernel.py opens. Everything else is in pyproject.toml."""

from setuptools import Extension, setup

NATIVE = "src/taciturn/core/native"
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-fno-strict-aliasing"]
SOURCES = [f"{NATIVE}/{name}.c" for name in ("kernels", "pack", "ams")]

# optional: without a compiler the install goes on, and torch does the kernels' work
setup(
    ext_modules=[
        Extension(
            "taciturn.core._native", SOURCES, depends=[f"{NATIVE}/kernels.h"], extra_compile_args=FLAGS, optional=True
        )
    ]
)
