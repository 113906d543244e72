"""U-ViT as a pipeline of diffusers; needs the extra `diffusers`."""

from diffusers import ModelMixin, SchedulerMixin  # where diffusers' loader finds the classes, it looks for these

from .make import make_pipeline
from .pipeline import UViTModel, UViTPipeline
from .schedulers import UViTScheduler

__all__ = ["ModelMixin", "SchedulerMixin", "UViTModel", "UViTPipeline", "UViTScheduler", "make_pipeline"]

for _each in (UViTModel, UViTPipeline, UViTScheduler):
    _each.__module__ = __name__  # which folders keep
