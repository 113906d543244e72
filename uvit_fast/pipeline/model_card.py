"""The README of a pipeline's folder: what the model is, and how it is loaded."""

from typing import Any

SCHEDULES = {
    "sd": "Stable Diffusion's 1000 steps",
    "vp": "VP, continuous",
    "flow": "flow matching, the linear path",
    "flow_sit": "flow matching, the linear path, in SiT's terms",
}
PREDICTIONS = {"eps": "the noise", "v": "v", "x0": "the data", "velocity": "the velocity"}
FOLDER = "this/folder"  # what the card calls the place that it lies in
UNLICENSED = (
    "The weights: not known to this folder, so to be written here. The repository of the paper's authors, which links the "
    "published weights, is under the MIT licence."
)
ENCODERS = {"autoencoder": "vae", "text encoder": "text_encoder"}
LOADER = '''"""For `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`; needs the package uvit-fast."""

from uvit_fast.pipeline import UViTModel, UViTPipeline, UViTScheduler
'''


def model_card(pipe: Any) -> str:
    """Return the Markdown of a `UViTPipeline`'s card, with the hub's header: what it is, how it is loaded, its settings and
    the licence of its weights. What the pipeline does not know it asks for.
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
        names = f"\nClasses by label: {shown}{', ...' if len(known) > 20 else ''}. All of them: `id2label` in `model_index.json`.\n"
    others = [name for name, role in ENCODERS.items() if getattr(pipe, role, None) is not None]
    return f"""---
library_name: diffusers
pipeline_tag: {task}
{f"license: {config.license}{chr(10)}" if config.license else ""}tags:
- uvit
- diffusion
---

# U-ViT, {size} x {size}, {facts["conditioned on"]}

A U-ViT ("All are Worth Words: A ViT Backbone for Diffusion Models", arXiv:2209.12152) as a pipeline of diffusers.

## Use

```python
from uvit_fast.pipeline import UViTPipeline  # of the package uvit-fast, with its extra "diffusers"

pipe = UViTPipeline.from_pretrained("{FOLDER}")
image = pipe({call.get(kind, "num_images=1")}).images[0]
```

Without the import: `DiffusionPipeline.from_pretrained("{FOLDER}", trust_remote_code=True)`; the code is one import of the
package. A copy on disk is a checkpoint of the command line too: `uvit-fast sample --checkpoint {FOLDER} --out images`.

## Settings

| | |
|---|---|
{rows}
{names}
## Licence

{f"The weights: {config.license}." if config.license else UNLICENSED}{f" The {' and the '.join(others)} beside them: as published by their authors, under licences of their own." if others else ""}

Not known to this folder, so to be written here: the training data, their licence, and what the model should not be used for.
"""
