"""The compiled part of wsm_ds. All else that describes the package stands in pyproject.toml."""

from setuptools import Extension, setup

# kernel.c includes no Python header and is called through ctypes, so that one wheel serves every Python from 3.10 on.
# optional: without a compiler the installation succeeds, and numpy does the same sums, more slowly.
KERNEL = Extension(
    "wsm_ds.engine._kernel",
    ["wsm_ds/engine/kernel.c"],
    extra_compile_args=["-O3", "-ffp-contract=off"],
    py_limited_api=True,
    optional=True,
)

setup(ext_modules=[KERNEL], options={"bdist_wheel": {"py_limited_api": "cp310"}})
