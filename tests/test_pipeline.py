"""The diffusers pipeline: what users of diffusers expect, with a tiny autoencoder and CLIP made here."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

from uvit_fast import build_model, load_config
from uvit_fast.pipeline import UViTPipeline, make_pipeline

SMALL = ["model.embed_dim=32", "model.depth=2", "model.num_heads=2", "model.img_size=8", "sample.steps=4"]


def latent_pipeline(name="h2_256", *overrides, **components):
    cfg = load_config(f"configs/{name}.yaml", [*SMALL, *overrides])
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    pipe = make_pipeline(cfg, build_model(cfg).state_dict(), vae=vae, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_save_and_load_round_trip_gives_the_same_images(tmp_path):
    pipe = latent_pipeline()
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "model" / "diffusion_pytorch_model.safetensors").is_file()
    again = UViTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    a, b = (p(class_labels=[3, 999], generator=seeded(), output_type="pt").images for p in (pipe, again))
    assert a.shape == (2, 3, 16, 16) and torch.equal(a, b)
    assert again.config.null_label == 1000 and again.scheduler.config.sampler == "dpmpp_fast"


def test_output_types_are_views_of_the_same_images():
    pipe = latent_pipeline()
    out = {t: pipe(class_labels=5, generator=seeded(), output_type=t).images for t in ("latent", "pt", "np", "pil")}
    assert out["latent"].shape == (1, 4, 8, 8)
    np.testing.assert_array_equal(out["np"], out["pt"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(out["pil"][0]), (out["np"][0] * 255).round().astype(np.uint8))


def test_guidance_scale_is_one_plus_the_papers(monkeypatch):
    """guidance_scale 1 runs the conditional branch alone; 1.4 is cond + 0.4 (cond - uncond)."""
    pipe = latent_pipeline()
    x = torch.randn(1, 4, 8, 8, generator=seeded())
    plain, guided = (pipe(class_labels=5, latents=x, num_inference_steps=1, guidance_scale=s, output_type="latent").images
                     for s in (1.0, 1.4))  # fmt: skip
    stage = pipe.scheduler.sampler(1).stages[0]
    t = torch.tensor([stage.time], dtype=torch.float32)
    with torch.no_grad():
        cond, uncond = (pipe.model(x, t, y=torch.tensor([y])) for y in (5, 1000))
    # one step is linear in eps, so the results differ by the same multiple of (cond - uncond) everywhere
    change, direction = guided - plain, 0.4 * (cond - uncond)
    multiple = (change * direction).sum() / direction.square().sum()
    torch.testing.assert_close(change, multiple * direction, rtol=0, atol=1e-3 * change.abs().max().item())
    update = stage.update
    torch.testing.assert_close(multiple.item(), update.outputs[-1] * update.on_eps, rtol=1e-3, atol=0)


def test_seeds_latents_steps_and_callbacks():
    pipe = latent_pipeline()
    seen = []
    a = pipe(
        class_labels=1, generator=seeded(1), num_inference_steps=7, callback=lambda *n: seen.append(n), output_type="pt"
    )
    b = pipe(class_labels=1, generator=seeded(1), num_inference_steps=7, output_type="pt", return_dict=False)
    assert torch.equal(a.images, b[0]) and seen == [(i, 7) for i in range(1, 8)]
    assert not torch.equal(
        a.images, pipe(class_labels=1, generator=seeded(2), num_inference_steps=7, output_type="pt").images
    )


def test_text_models_take_prompts():
    class Words:
        """A tokenizer: one number a letter, padded."""

        def __call__(self, prompts, max_length, **_):
            rows = [[ord(c) % 50 for c in p[:max_length]] + [0] * (max_length - len(p)) for p in prompts]
            return type("Tokens", (), {"input_ids": torch.tensor(rows)})

    clip = CLIPTextModel(CLIPTextConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                        num_attention_heads=2, max_position_embeddings=77)).eval()  # fmt: skip
    pipe = latent_pipeline("s2_coco", "model.context_dim=16", text_encoder=clip)
    pipe.tokenizer = Words()
    x = torch.randn(1, 4, 8, 8, generator=seeded()).repeat(2, 1, 1, 1)
    images = pipe(prompt=["a cat", "a dog"], latents=x, output_type="latent").images
    assert images.shape == (2, 4, 8, 8) and not torch.equal(images[0], images[1])
    with pytest.raises(ValueError, match="class_labels: the model takes text; got class_labels"):
        pipe(class_labels=3)


def test_unconditional_models_take_a_number_of_images():
    cfg = load_config("configs/s2_cifar10.yaml", [*SMALL, "sample.sampler=dpm_fast"])
    pipe = make_pipeline(cfg, build_model(cfg).state_dict())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(num_images=3, generator=seeded()).images
    assert len(images) == 3 and images[0].size == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"class_labels": [1000]}, "expected labels from 0 to 999"),  # the null label is no class
        ({}, "class_labels: the model takes classes; expected class_labels"),
        ({"prompt": "a cat"}, "the model takes classes"),
        ({"class_labels": [1], "num_inference_steps": 0}, "expected at least 1, got 0"),
        ({"class_labels": [1], "latents": torch.zeros(1, 4, 4, 4)}, r"expected \(1, 4, 8, 8\), got \(1, 4, 4, 4\)"),
        ({"class_labels": [1], "guidance_scale": 0.4}, "expected at least 1"),
        ({"class_labels": [1], "output_type": "jpeg"}, "expected pil, np, pt or latent"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, words):
    with pytest.raises(ValueError, match=words):
        latent_pipeline()(**arguments)
