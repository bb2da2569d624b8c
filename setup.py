"""Package definition. `kernels/` is installed as `simnpo.kernels`: `kernels` alone is Hugging Face's package."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

REPORTS = ["rich>=13", "matplotlib>=3.8", "jinja2>=3.1"]
EVALUATION = ["rouge-score>=0.1.2", "scipy>=1.11"]

setup(
    name="simnpo",
    version="0.1.0",
    description="SimNPO and NPO unlearning with a loss that never materialises the logits",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # find_namespace_packages follows the link simnpo/kernels -> ../kernels
    packages=find_namespace_packages(
        include=["simnpo", "simnpo.*"], exclude=["simnpo.benchmarks.results*", "*.__pycache__*"]
    ),
    package_data={"simnpo": ["py.typed", "**/*.jsonl", "**/*.jinja"]},
    install_requires=[
        "torch>=2.8",
        "numpy>=1.26",
        "packaging>=23",
        # `make test-oldest` runs the integrations with the oldest of these
        "transformers>=4.51.3",
        "accelerate>=1.6",
        "peft>=0.17",
        "safetensors>=0.4",
        *REPORTS,
        *EVALUATION,
    ],
    extras_require={
        # torch's CUDA builds bring their own triton; this is for machines where they do not
        "triton": ["triton>=3.4; sys_platform == 'linux'"],
        "flash": ["flash-attn>=2.6"],
        "gguf": ["gguf>=0.10"],
        # WMDP and MMLU
        "harness": ["lm-eval>=0.4.9"],
        # benchmarks straight from the Hugging Face hub
        "hub": ["datasets>=3"],
        # the trainers and quantisers of other packages that tests/integrations runs
        "trainers": ["trl>=1.16", "datasets>=3", "bitsandbytes>=0.50; sys_platform == 'linux'"],
        "test": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "build>=1",
            "deepspeed>=0.19; sys_platform == 'linux'",
            "gguf>=0.10",
            "triton>=3.4; sys_platform == 'linux'",
        ],
        "lint": ["ruff>=0.9", "pyright[nodejs]>=1.1.390"],
    },
    entry_points={"console_scripts": ["simnpo = simnpo.cli:main"]},
)
