"""The sections `data` and `latent`: the training data, and the frozen networks that encode and decode them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from uvit_fast.config.section import FolderOrHub, LocalPath, Section
from uvit_fast.runtime.text import shown

CLIP = "openai/clip-vit-large-patch14"  # whose text features the published text models were trained on
Factor = float | tuple[float, ...]  # for all channels, or one per channel


class LatentConfig(Section):
    """The frozen networks of latent models; the training latents were made with Stable Diffusion's first autoencoder.

    The network sees (latents - shift_factor) * scale_factor.
    """

    autoencoder: FolderOrHub = Field(
        "CompVis/stable-diffusion-v1-4/vae",
        description="AutoencoderKL or AutoencoderDC that makes and decodes latents: a local folder, or "
        "owner/repository[/subfolder] on the hub.",
    )
    scale_factor: Factor | Literal["measured"] | None = Field(
        None,
        description="A number, one per channel, or measured: from the channels' standard deviation and mean, as "
        "`extract` finds them. Default: the data's, else the autoencoder's own.",
    )
    shift_factor: Factor | None = Field(
        None,
        description="A number, or one per channel, subtracted from latents before scaling. Default: the data's, else "
        "the autoencoder's own.",
    )
    text_encoder: FolderOrHub | None = Field(
        None,
        description=f"CLIP of a text model: a local folder, or a hub name. Default: the training data's, else {CLIP}.",
    )

    @field_validator("scale_factor", "shift_factor", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        scale = info.field_name == "scale_factor"
        if value is None or (scale and value == "measured"):
            return value
        items = value if isinstance(value, list | tuple) else [value]
        try:
            numbers = tuple(float(item) for item in items if not isinstance(item, bool))
        except (TypeError, ValueError):
            numbers = ()
        usable = [n for n in numbers if abs(n) < float("inf") and (n > 0 or not scale)]
        if not usable or len(usable) != len(items):
            kind = (
                "a positive number, one per channel in brackets, or measured"
                if scale
                else "a number, or one per channel in brackets"
            )
            raise ValueError(f"expected {kind}, got {shown(value)}")
        return numbers if items is value else numbers[0]

    @model_validator(mode="after")
    def _measured_together(self) -> LatentConfig:
        if self.scale_factor == "measured" and self.shift_factor is not None:
            raise ValueError("shift_factor is measured where scale_factor is; expected none")
        return self


Byte = Annotated[int, Field(ge=0, le=255)]


class DataConfig(Section):
    """The training data."""

    name: Literal["digits", "synthetic", "cifar10", "fashion_mnist", "images", "latents", "text_latents"] = Field(
        description="digits: scikit-learn's. synthetic: random data of the model's shapes. The others read `path`."
    )
    path: LocalPath | None = Field(None, description="Folder of the dataset, if it is read from one.")
    crop: Literal["center", "celeba", "square"] = Field(
        "center", description="For `images` and extraction: ADM's centre crop, CelebA's face, or COCO's centre square."
    )
    background: tuple[Byte, Byte, Byte] = Field(
        (255, 255, 255),
        description="Red, green and blue behind transparent pixels, 0 to 255, for `images` and extraction.",
    )
    flip: bool = Field(False, description="Mirror each image with probability 1/2.")
    unreadable: Literal["refuse", "skip"] = Field(
        "refuse",
        description="At an unreadable image or a latent shard with a wrong checksum: refuse to go on, or warn and "
        "skip it, using others instead.",
    )
    decoder: Literal["auto", "dali", "pillow"] = Field(
        "auto",
        description="What crops `images`: DALI, on all cores, or Pillow, on one core per loader process; auto: DALI "
        "if cores would be idle.",
    )
    num_workers: int = Field(2, ge=0, le=256, description="Loader processes per rank; 0 loads in the training process.")
