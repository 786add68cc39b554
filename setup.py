"""wsm_ds: warmup-stable-and-merge for DeepSpeed."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "wsm_ds/__init__.py").read_text()).group(1)
TRAIN = ["torch>=2.4", "deepspeed>=0.16"]
TEST = [*TRAIN, "pytest>=8", "hypothesis>=6", "safetensors>=0.4", "transformers>=4.50", "accelerate>=1.0", "ninja"]
CHECK = ["ruff>=0.17,<0.18", "mypy>=2.4,<3", "types-PyYAML", "types-setuptools"]

setup(
    name="wsm_ds",
    version=VERSION,
    description="Warmup-stable-and-merge for DeepSpeed: merge ZeRO checkpoints instead of decaying the learning rate",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["wsm_ds", "wsm_ds.*"]),
    package_data={"wsm_ds": ["py.typed"]},
    install_requires=["numpy>=1.24", "pydantic>=2", "PyYAML>=6", "tqdm>=4", "xxhash>=3"],
    extras_require={"train": TRAIN, "test": TEST, "check": CHECK},
    # optional: without a compiler the installation succeeds, and numpy does the same sums, more slowly
    ext_modules=[
        Extension(
            "wsm_ds.engine._kernel",
            ["wsm_ds/engine/kernel.c"],
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ],
    entry_points={"console_scripts": ["wsm-ds = wsm_ds.cli:main"]},
)
