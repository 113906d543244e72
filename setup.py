"""Package definition. `kernels/` is installed as `uvit_fast.kernels`; no top-level `kernels` is ever importable:
Hugging Face ships a package of that name, which transformers probes for. `configs/` is installed as
`uvit_fast/configs`, where `--config` finds them by name."""

from setuptools import find_packages, setup

setup(
    name="uvit-fast",
    version="0.2.0",
    description="U-ViT for diffusion: the published model, fused kernels, DeepSpeed training, captured sampling",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"uvit_fast.kernels": "kernels", "uvit_fast.configs": "configs"},
    packages=[
        *find_packages(include=["uvit_fast", "uvit_fast.*"]),
        "uvit_fast.kernels",
        *(f"uvit_fast.kernels.{name}" for name in find_packages("kernels")),
        "uvit_fast.configs",
    ],
    package_data={
        "uvit_fast.kernels": ["runtime/tables/*.json", "tools/contracts/*.json"],
        "uvit_fast.configs": ["*.yaml", "ablations/*.yaml"],
    },
    install_requires=[
        "torch>=2.11",  # the model
        "triton>=3.6,<3.10; platform_system == 'Linux'",  # the kernels
        "deepspeed>=0.19,<0.20",  # the training engine
        "numpy",  # samples and datasets outside torch
        "einops",  # shapes that can be read
        "pydantic>=2.10",  # the config schema
        "PyYAML",  # the config files
        "pillow",  # images in and out
        "simplejpeg",  # JPEGs with the warnings of their decoder
        "safetensors",  # EMA weights
        "psutil",  # the launcher of a rank, the loader processes of a trainer
        "tqdm",  # progress
        "tensorboard",  # training curves
    ],
    extras_require={
        "digits": ["scikit-learn"],  # the demo's dataset and its classifier
        "diffusers": ["diffusers>=0.42", "transformers>=5", "accelerate"],  # VAE, CLIP, pipeline
        "dali": ["nvidia-dali-cuda130; platform_system == 'Linux'"],  # images cropped on all cores
        "flash-attn": ["flash-attn>=2.8"],  # another attention backend
        "xformers": ["xformers"],  # another attention backend
        "wandb": ["wandb"],  # training curves elsewhere
        "plot": ["matplotlib"],  # pictures of runs, analyses, benchmarks
        "gallery": ["gradio>=6"],  # the page of `uvit-fast gallery`
        "docs": ["mkdocs-material", "mkdocstrings[python]", "ruff"],  # the documentation as a site
        "test": [
            "pytest",
            "pytest-benchmark",
            "ruff",
            "mypy",
            "scikit-learn",
            "scikit-image",  # photographs
            "nvidia-dali-cuda130; platform_system == 'Linux'",
            "diffusers",
            "transformers",
            "accelerate",
            "matplotlib",
        ],
    },
    entry_points={"console_scripts": ["uvit-fast=uvit_fast.cli:main"]},
)
