"""U-ViT as a diffusers pipeline; needs the extra `diffusers`."""

from uvit_fast.runtime.extras import missing

try:
    from diffusers import ModelMixin, SchedulerMixin  # diffusers' loader looks for these where it finds the classes
except ImportError:
    raise missing("a pipeline", "diffusers", "diffusers") from None

from .make import make_pipeline
from .pipeline import UViTModel, UViTPipeline
from .schedulers import UViTScheduler

__all__ = ["ModelMixin", "SchedulerMixin", "UViTModel", "UViTPipeline", "UViTScheduler", "make_pipeline"]

for _each in (UViTModel, UViTPipeline, UViTScheduler):
    _each.__module__ = __name__  # folders record it
