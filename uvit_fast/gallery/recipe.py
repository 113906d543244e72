"""What makes a picture, and PNGs that record it."""

import io
import json
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin
from pydantic import Field, ValidationError

from uvit_fast.config.section import Section, wrong_value
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.images import as_picture

KEY = "uvit-fast gallery"  # of the PNG's text
Precision = Literal["fp32", "bf16", "fp8"]


class Recipe(Section):
    """All that decides one picture, apart from the weights and what their config fixes."""

    checkpoint: str = Field(min_length=1, max_length=1000, description="What the session calls the weights.")
    label: int | None = Field(None, ge=0, description="The class, of a class-conditional model.")
    prompt: str | None = Field(None, max_length=10_000, description="Of a text model.")
    seed: int = Field(ge=0, lt=2**63, description="Of the noise, as in `uvit-fast sample --num 1`.")
    to_seed: int | None = Field(None, ge=0, lt=2**63, description="Where a walk through the noise leads.")
    position: float = Field(0.0, ge=0, le=1, description="On that walk: 0 is the noise of seed, 1 that of to_seed.")
    cfg_scale: float = Field(1.0, ge=1, description="Guidance in diffusers' convention, 1 + s; 1: none.")
    steps: int = Field(ge=1, le=10**5, description="Network evaluations.")
    sampler: str = Field(max_length=100, description="As sample.sampler of a config.")
    precision: Precision = Field(description="Of the blocks' products: fp32 on a CPU, bf16 or fp8 on a GPU.")

    def walk(self, to_seed: int | None, num: int) -> list["Recipe"]:
        """Return `num` recipes at equal distances from this one's noise to that of `to_seed`.

        Raises:
            UserError: no such seed.
        """
        if to_seed is None:
            raise UserError("to_seed: expected a number, got none")
        return [checked(self, to_seed=to_seed, position=i / max(1, num - 1)) for i in range(num)]

    @property
    def loop(self) -> tuple:
        """What pictures of one batch have in common."""
        return self.checkpoint, self.cfg_scale, self.steps, self.sampler, self.precision


def checked(recipe: Recipe | None = None, **values: Any) -> Recipe:
    """Return a recipe with `values`, otherwise like `recipe`.

    Raises:
        UserError: an invalid value.
    """
    try:
        return Recipe.model_validate((recipe.model_dump() if recipe else {}) | values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {wrong_value(first)}") from None


def to_png(image: np.ndarray, recipe: Recipe, source: dict[str, Any]) -> bytes:
    """Return a PNG of an image (H, W, C) uint8 with its recipe and its source, as JSON in an iTXt chunk."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt(KEY, json.dumps({"recipe": recipe.model_dump(exclude_none=True), "source": source}))
    return plain_png(image, pnginfo=text)


def plain_png(image: np.ndarray, **options: Any) -> bytes:
    """Return a PNG of an image (H, W, C) uint8."""
    file = io.BytesIO()
    as_picture(image).save(file, "PNG", **options)
    return file.getvalue()


def from_png(data: bytes) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe in a PNG's bytes, and its source; the pixels are not decoded.

    Raises:
        UserError: not a PNG, or not one from `to_png`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            said = picture.info.get(KEY)
        tree = json.loads(said) if isinstance(said, str) else {}
        recipe, source = tree["recipe"], tree["source"]
        if not isinstance(recipe, dict) or not isinstance(source, dict):
            raise TypeError
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, RecursionError, Image.DecompressionBombError):
        raise UserError(
            "picture: expected a PNG that the gallery saved, with its settings inside; got another"
        ) from None
    return checked(**{key: value for key, value in recipe.items() if isinstance(key, str)}), source
