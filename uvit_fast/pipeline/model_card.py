"""The README of a pipeline's folder: what the model is, and how to load it."""

from typing import Any

SCHEDULES = {
    "sd": "Stable Diffusion's 1000 steps",
    "vp": "VP, continuous",
    "flow": "flow matching, the linear path",
    "flow_sit": "flow matching, the linear path, in SiT's terms",
}
PREDICTIONS = {"eps": "the noise", "v": "v", "x0": "the data", "velocity": "the velocity"}
FOLDER = "this/folder"  # the card's placeholder for the folder's own path
UNLICENSED = (
    "Weights: please fill in, this folder does not know. The repository of the paper's authors, which links the "
    "published weights, is under the MIT licence."
)
ENCODERS = {"autoencoder": "vae", "text encoder": "text_encoder"}


def model_card(pipe: Any) -> str:
    """Return a `UViTPipeline`'s card in Markdown, with the hub's header: what the model is, how to load it, its
    settings and the licence of its weights. It asks for whatever the pipeline does not know.
    """
    net, config, scheduler = pipe.model, pipe.config, pipe.scheduler
    size, known = pipe.image_size, pipe.class_names
    classes = net.num_classes - (config.null_label is not None)
    call = {
        "text": 'prompt="a green train"',
        "classes": f"class_labels=[{known[0]!r}]" if known else "class_labels=[0]",
    }
    kind = "text" if net.context_dim else "classes" if net.num_classes else "nothing"
    task = "text-to-image" if kind == "text" else "unconditional-image-generation"
    sampler = type(scheduler).__name__
    if sampler == "UViTScheduler":
        sampler = f"`{scheduler.config.sampler}`, {scheduler.config.steps} network evaluations"
    facts = {
        "images": f"{size} x {size}"
        + (f", from latents of {net.in_chans} x {net.img_size} x {net.img_size}" if pipe.latent else ""),
        "conditioned on": f"{classes} classes" if kind == "classes" else "text (CLIP)" if kind == "text" else kind,
        "network": f"{len(net.blocks)} blocks, D = {net.embed_dim}, patches of {net.patch_size}, "
        f"{sum(p.numel() for p in net.parameters()) / 1e6:,.1f} M parameters",
        "noise schedule": SCHEDULES.get(config.schedule, "not known"),
        "predicts": PREDICTIONS.get(config.prediction, "not known"),
        "sampler": sampler,
        "guidance scale": f"{config.guidance_scale:g} (1: none)",
    }
    if pipe.latent:
        facts["latents, for the network"] = f"(latents - {config.shift_factor}) * {config.scale_factor}"
    if config.null_label is not None:
        facts["label that means none"] = config.null_label
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    names = ""
    if known:
        shown = ", ".join(f"{label}: {name}" for label, name in list(enumerate(known))[:20])
        more = ", ..." if len(known) > 20 else ""
        names = f"\nClasses by label: {shown}{more}. All of them: `id2label` in `model_index.json`.\n"
    others = [name for name, role in ENCODERS.items() if getattr(pipe, role, None) is not None]
    licence = f"Weights: {config.license}." if config.license else UNLICENSED
    if others:
        licence += (
            f" The {' and the '.join(others)} beside them: as published by their authors, under their own licences."
        )
    return f"""---
library_name: diffusers
pipeline_tag: {task}
{f"license: {config.license}{chr(10)}" if config.license else ""}tags:
- uvit
- diffusion
---

# U-ViT, {size} x {size}, {facts["conditioned on"]}

A U-ViT ("All are Worth Words: A ViT Backbone for Diffusion Models", arXiv:2209.12152) as a diffusers pipeline.

## Use

```python
from uvit_fast.pipeline import UViTPipeline  # of the package uvit-fast, with its extra "diffusers"

pipe = UViTPipeline.from_pretrained("{FOLDER}")
image = pipe({call.get(kind, "num_images=1")}).images[0]
```

Without the import: `DiffusionPipeline.from_pretrained("{FOLDER}", trust_remote_code=True)`; the code is one import of
the package. A copy on disk is also a checkpoint for the command line: `uvit-fast sample --checkpoint {FOLDER} --out
images`.

## Settings

| | |
|---|---|
{rows}
{names}
## Licence

{licence}

Please fill in, this folder does not know: the training data, their licence, and what the model should not be used for.
"""
