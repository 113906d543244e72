"""The crops of images, and the flip, with Pillow; `dali.py` has the same crops on all cores."""

import torch
from PIL import Image
from torch import Tensor

from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.errors import UserError


def random_flip(x: Tensor, draws: Draws) -> Tensor:
    """Mirror each image of (B, C, H, W) with probability 1/2."""
    coin = draws.rand(len(x), 1, 1, 1) < 0.5
    return torch.where(coin, x.flip(-1), x)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Take ADM's centre crop: halve with a box filter while twice too large, resize bicubically to the short side,
    crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def misfit(crop: str, size: tuple[int, int]) -> str | None:
    """Return why an image of `size` (width, height) does not suit this crop, a key of CROPS, or None if it does."""
    if crop != "celeba" or size == (178, 218):
        return None
    return (
        f"data.crop=celeba expects CelebA's aligned images of 178 x 218 pixels, got {size[0]} x {size[1]}; "
        "data.crop=center fits images of any size"
    )


def celeba_crop(image: Image.Image, size: int) -> Image.Image:
    """Take CelebA's 128 x 128 pixels about row 121, column 89, resized to size x size.

    Raises:
        UserError: the image does not have CelebA's 178 x 218 pixels; only there is that the face.
    """
    if reason := misfit("celeba", image.size):
        raise UserError(reason)
    row, column = 121, 89
    return image.crop((column - 64, row - 64, column + 64, row + 64)).resize((size, size), Image.Resampling.BILINEAR)


def square_crop(image: Image.Image, size: int) -> Image.Image:
    """Take the centre square, resized with Lanczos: the crop of MS-COCO."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


CROPS = {"center": center_crop, "celeba": celeba_crop, "square": square_crop}
