"""Sample from published weights: `python examples/published_weights.py imagenet256_uvit_huge.pth`.

The README of the published code links the checkpoints. The autoencoder comes from the hub;
`load(checkpoint, overrides=("latent.autoencoder=FOLDER",))` takes it from a folder.
"""

import sys

import torch

from uvit_fast import load_config
from uvit_fast.data.autoencoders import load_autoencoder
from uvit_fast.model.weights import read_weights
from uvit_fast.pipeline import UViTPipeline, make_pipeline
from uvit_fast.runtime.errors import in_one_line

GOLDEN_RETRIEVER, OTTER = 207, 360


def load(checkpoint: str, config: str = "h2_256", overrides: tuple[str, ...] = ()) -> UViTPipeline:
    """Return the pipeline of a published `.pth`; `pipe.save_pretrained(folder)` saves it as a diffusers folder."""
    cfg = load_config(config, overrides)
    pipe = make_pipeline(cfg, read_weights(checkpoint), vae=load_autoencoder(cfg.latent.autoencoder))
    return pipe.to("cuda", torch.bfloat16) if torch.cuda.is_available() else pipe


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with in_one_line():
        pipe = load(sys.argv[1])
        seed = torch.Generator().manual_seed(0)
        # guidance_scale counts as in diffusers: 1.4 is the paper's s = 0.4
        images = pipe(class_labels=[GOLDEN_RETRIEVER, OTTER], guidance_scale=1.4, generator=seed).images
        for name, image in zip(("golden_retriever", "otter"), images):
            image.save(f"{name}.png")
            print(f"wrote {name}.png")
