"""The diffusers pipeline: what users of diffusers expect, with a tiny autoencoder and CLIP made here."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline

from tests.clip import save_clip
from tests.recorded import RecordedGraphs
from uvit_fast import build_model, load_config
from uvit_fast.data.autoencoders import vae_identity
from uvit_fast.data.encoders import load_clip
from uvit_fast.diffusion.guidance import Guidance
from uvit_fast.kernels.ops import fp8_block
from uvit_fast.model.fp8 import Fp8UViT
from uvit_fast.pipeline import UViTPipeline, make_pipeline
from uvit_fast.provenance import Provenance, read
from uvit_fast.sampling import rounding
from uvit_fast.sampling.captured import GraphSampler

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


def test_an_autoencoder_of_other_latents_is_refused(tmp_path):
    """One with the same encoder is none, in whichever precision."""
    made = latent_pipeline().vae
    known = Provenance(encoders={"vae": vae_identity(made, "sd")})
    pipe = latent_pipeline(known=known)
    pipe.save_pretrained(tmp_path)
    half = UViTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    made.decoder.conv_out.weight.data += 1
    UViTPipeline.from_pretrained(tmp_path, vae=made)
    assert read(tmp_path / "model" / "x.safetensors").encoders == known.encoders and half.vae.dtype == torch.bfloat16
    made.encoder.conv_out.weight.data += 1
    with pytest.raises(ValueError, match="not the one that made the latents which the model learned from, sd"):
        UViTPipeline.from_pretrained(tmp_path, vae=made)


def test_the_network_is_replayed_with_nothing_to_ask_for():
    """From the second evaluation of a shape, the same images bit for bit;
    `enable_cuda_graphs` is for the whole loop.
    """
    pipe = latent_pipeline()

    def draw():
        return pipe(class_labels=[3, 999], generator=seeded(), output_type="latent").images

    pipe.model.cuda_graphs = False
    written = draw()
    del pipe.model.cuda_graphs
    pipe.model.captures.graphs = graphs = RecordedGraphs()
    assert torch.equal(draw(), written) and torch.equal(draw(), written) and graphs.captures == 1


def test_classes_go_by_their_names(tmp_path):
    """Also from a saved folder, whose JSON has no whole numbers for keys."""
    cfg = load_config("configs/digits.yaml", SMALL)
    names = Provenance(("zero", "one", "two, or a pair"))
    make_pipeline(cfg, build_model(cfg).state_dict(), names).save_pretrained(tmp_path)
    pipe = UViTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.get_label_ids(["two, or a pair", "zero"]) == [2, 0] and pipe.get_label_ids("one") == [1]
    a, b, c = (
        pipe(class_labels=y, num_inference_steps=1, generator=seeded(), output_type="pt").images
        for y in ("one", ["one"], 1)
    )
    assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(ValueError, match="none is called 'zerro'; did you mean zero"):
        pipe(class_labels=["zerro"])
    with pytest.raises(ValueError, match=r"class_labels: expected labels from 0 to 2, got \[3\]"):  # of ten rows
        pipe(class_labels=3)
    assert pipe.config.id2label["1"] == "one"


def test_nan_or_infinity_is_an_error_and_no_black_image():
    pipe = latent_pipeline()
    pipe.model.decoder_pred.bias.data[0] = torch.nan
    for output_type in ("pil", "latent"):
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            pipe(class_labels=[3], num_inference_steps=1, output_type=output_type)


def test_diffusers_own_class_loads_a_folder_where_it_is_trusted_and_ours_runs_no_code_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe, folder = latent_pipeline(), tmp_path / "pipe"
    pipe.save_pretrained(folder)
    with pytest.raises(ValueError, match="Pass `trust_remote_code=True`"):
        DiffusionPipeline.from_pretrained(folder)
    said = []
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.logger.warning", said.append)
    again = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert said == []  # as of an argument's type
    again.set_progress_bar_config(disable=True)
    assert type(again) is UViTPipeline
    assert torch.equal(*(p(3, generator=seeded(), output_type="pt").images for p in (pipe, again)))
    for code in [*folder.rglob("uvit_pipeline.py")]:
        code.write_text("raise RuntimeError('this ran')")
    assert UViTPipeline.from_pretrained(folder).config.null_label == 1000
    (folder / "README.md").write_text("mine")
    pipe.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_a_folder_has_a_model_card_and_its_classes_names(tmp_path):
    cfg = load_config("configs/digits.yaml", ["model.embed_dim=32", "model.num_heads=2", "sample.steps=2"])
    names = tuple(f"digit {word}" for word in "zero one two three four five six seven eight nine".split())
    make_pipeline(cfg, build_model(cfg).state_dict(), Provenance(names)).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "# U-ViT, 8 x 8, 10 classes" in card and "0: digit zero, 1: digit one" in card
    assert "library_name: diffusers" in card and "class_labels=['digit zero']" in card
    pipe = UViTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe(which, generator=seeded(), output_type="latent").images for which in ("digit three", 3, ["digit three"])
    ]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    with pytest.raises(ValueError, match="none is called 'digit tree'; did you mean digit three"):
        pipe("digit tree")


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
    how = {"class_labels": 5, "latents": x, "num_inference_steps": 1, "output_type": "latent"}
    plain, guided = (pipe(**how, guidance_scale=s).images for s in (1.0, 1.4))
    stage = pipe.scheduler.sampler(1).stages[0]
    t = torch.tensor([stage.time], dtype=torch.float32)
    with torch.no_grad():
        cond, uncond = (pipe.model(x, t, y=torch.tensor([y])) for y in (5, 1000))
    # one step is linear in eps, so the results differ by the same multiple of (cond - uncond) everywhere
    change, direction = guided - plain, 0.4 * (cond - uncond)
    multiple = (change * direction).sum() / direction.square().sum()
    torch.testing.assert_close(change, multiple * direction, rtol=0, atol=1e-3 * change.abs().max().item())
    update = stage.update
    torch.testing.assert_close(multiple.item(), update.outputs[-1] * update.on_output, rtol=1e-3, atol=0)


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


def test_several_images_a_label_and_the_size_that_the_model_makes():
    pipe = latent_pipeline()
    x = torch.randn(4, 4, 8, 8, generator=seeded())
    both = pipe([3, 5], num_images_per_prompt=2, latents=x, output_type="latent", height=16, width=16).images
    torch.testing.assert_close(both, pipe([3, 3, 5, 5], latents=x, output_type="latent").images)
    cfg = load_config("configs/s2_cifar10.yaml", [*SMALL, "sample.sampler=dpm_fast"])
    pixels = make_pipeline(cfg, build_model(cfg).state_dict())
    pixels.set_progress_bar_config(disable=True)
    assert len(pixels(num_images=2, num_images_per_prompt=3, height=8).images) == 6


def test_a_callback_sees_changes_and_ends_the_loop():
    pipe, seen = latent_pipeline(), []
    x = torch.randn(1, 4, 8, 8, generator=seeded())
    plain = pipe(5, latents=x, num_inference_steps=7, output_type="latent").images

    def look(pipe, i, t, values):
        seen.append((i, t.item(), values["latents"]))

    watched = pipe(5, latents=x, num_inference_steps=7, output_type="latent", callback_on_step_end=look).images
    stages = pipe.scheduler.sampler(7).stages
    assert torch.equal(watched, plain) and torch.equal(seen[-1][2], plain)
    assert [(i, t) for i, t, _ in seen] == [(i, pytest.approx(stage.time)) for i, stage in enumerate(stages)]

    def zero_at_the_end(pipe, i, t, values):
        return {"latents": values["latents"] * 0} if i == 6 else {}

    images = pipe(5, num_inference_steps=7, output_type="latent", callback_on_step_end=zero_at_the_end).images
    assert images.abs().max() == 0

    def stop(pipe, i, t, values):
        pipe._interrupt = i == 2

    def unguided_from_the_fourth(pipe, i, t, values):
        if i == int(pipe.num_timesteps * 0.5):
            pipe._guidance_scale = 1.0

    scales, guided = [], {"latents": x, "num_inference_steps": 7, "output_type": "latent", "guidance_scale": 3.0}
    cut = pipe(5, **guided, callback_on_step_end=unguided_from_the_fourth).images

    class ByHand(Guidance):
        def branches(self, x, t):
            self.scale.fill_(2.0 if len(scales) < 4 else 0.0)
            scales.append(self.scale.item())
            return super().branches(x, t)

    with torch.no_grad():
        by_hand = pipe.scheduler.sampler(7)(ByHand(pipe.model, {"y": torch.tensor([5])}, {"y": 1000}, 2.0), x)
    assert torch.equal(cut, by_hand) and scales == [2.0] * 4 + [0.0] * 3
    assert not torch.equal(cut, pipe(5, **guided).images) and pipe.guidance_scale == 3.0

    third = pipe(5, latents=x, num_inference_steps=7, output_type="latent", callback_on_step_end=stop).images
    assert torch.equal(third, seen[2][2]) and not torch.equal(third, plain)
    assert torch.equal(pipe(5, latents=x, num_inference_steps=7, output_type="latent").images, plain)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe(5, num_inference_steps=7, output_type="latent", callback_on_step_end=stop).images.abs().max() > 0


def test_networks_are_cast_without_a_word_on_parts_that_there_are_not(caplog):
    with caplog.at_level("WARNING", logger="diffusers"):
        latent_pipeline().to(torch.bfloat16)
    assert not caplog.records


def test_text_models_take_prompts_and_keep_their_encoder(tmp_path):
    """The features are CLIP's own, padded as the model was trained; guidance is towards "" by default, as published."""
    folder = save_clip(tmp_path / "clip")
    tokenizer, clip = load_clip(folder)
    small = ("model.context_dim=16", "model.context_tokens=8")
    latent_pipeline("s2_coco", *small, text_encoder=clip, tokenizer=tokenizer).save_pretrained(tmp_path / "pipe")
    pipe = UViTPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 8, 8, generator=seeded()).repeat(2, 1, 1, 1)
    images = pipe(prompt=["a b", "b"], latents=x, output_type="latent").images
    assert images.shape == (2, 4, 8, 8) and not torch.equal(images[0], images[1])
    with torch.no_grad():
        tokens = tokenizer(["a b", "b", ""], padding="max_length", max_length=8, return_tensors="pt").input_ids
        *context, null = clip(tokens).last_hidden_state
        eps_fn = Guidance(pipe.model, {"context": torch.stack(context)}, {"context": null}, 1.0)
        expected = pipe.scheduler.sampler()(eps_fn, x)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(pipe(["a b", "b"], latents=x, output_type="latent").images, images)  # a prompt may come first
    embeds = {"prompt_embeds": torch.stack(context), "negative_prompt_embeds": null[None]}
    torch.testing.assert_close(pipe(**embeds, latents=x, output_type="latent").images, images)
    away = pipe(["a b", "b"], negative_prompt="a", latents=x, output_type="latent").images
    assert not torch.equal(away, images)
    each = pipe(["a b", "b"], negative_prompt=["a", ""], latents=x, output_type="latent").images
    torch.testing.assert_close(each, torch.stack([away[0], images[1]]), rtol=1e-4, atol=1e-4)
    pipe.enable_cuda_graphs()
    pipe._graphs = GraphSampler(pipe.model, graphs=(graphs := RecordedGraphs()))
    for call, expected in (({}, images), ({"negative_prompt": "a"}, away), ({"negative_prompt": ["a", ""]}, each)):
        torch.testing.assert_close(pipe(["a b", "b"], latents=x, output_type="latent", **call).images, expected)
    assert graphs.captures == 1
    pipe._graphs = None
    with pytest.raises(ValueError, match="class_labels: the model takes text; got class_labels"):
        pipe(class_labels=3)
    with pytest.raises(ValueError, match=r"prompt_embeds: expected \(B, 8, 16\), got \(1, 7, 16\)"):
        pipe(prompt_embeds=torch.zeros(1, 7, 16))
    with pytest.raises(ValueError, match=r"prompt: expected at least one, as text, got \[3\]"):
        pipe(prompt=3)
    with pytest.raises(ValueError, match="prompt: expected it or prompt_embeds, got both"):
        pipe("a", prompt_embeds=torch.zeros(1, 8, 16))
    with pytest.raises(ValueError, match="negative_prompt: expected one, or one per prompt, 1, got 2"):
        pipe("a", negative_prompt=["a", "b"])
    with pytest.raises(ValueError, match="prompt: expected at least one, as text, got none"):
        pipe(prompt=[])
    pipe.tokenizer = None
    with pytest.raises(ValueError, match="the pipeline has no tokenizer and text_encoder"):
        pipe(prompt="a")


def test_captured_loops_give_the_same_images():
    """One capture for other noise and labels; a callback still sees every step."""
    pipe, seen, graphs = latent_pipeline(), [], RecordedGraphs()
    calls = [{"class_labels": [y], "generator": seeded(y), "guidance_interval": (0.2, 0.9)} for y in (3, 5)]
    plain = [pipe(**call, output_type="latent").images for call in calls]
    pipe.enable_cuda_graphs()
    pipe._graphs = GraphSampler(pipe.model, graphs=graphs)
    for call, expected in zip(calls, plain):
        call["generator"].manual_seed(call["class_labels"][0])
        assert torch.equal(pipe(**call, output_type="latent").images, expected)
    assert graphs.captures == 1
    pipe(class_labels=1, callback=lambda *n: seen.append(n), output_type="latent")
    assert len(seen) == 4 and graphs.captures == 1


def test_with_a_generator_a_sample_an_image_depends_on_its_own():
    """The sampler's noise too: Euler-Maruyama draws some at every step."""
    cfg = load_config("configs/s2_cifar10.yaml", SMALL)
    pipe = make_pipeline(cfg, build_model(cfg).state_dict())
    pipe.set_progress_bar_config(disable=True)
    both = pipe(num_images=2, generator=[seeded(1), seeded(2)], output_type="latent").images
    alone = pipe(num_images=1, generator=[seeded(2)], output_type="latent").images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_unconditional_models_take_a_number_of_images():
    cfg = load_config("configs/s2_cifar10.yaml", [*SMALL, "sample.sampler=dpm_fast"])
    pipe = make_pipeline(cfg, build_model(cfg).state_dict())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(num_images=3, generator=seeded()).images
    assert len(images) == 3 and images[0].size == (8, 8)
    with pytest.raises(ValueError, match="no null condition; expected 1"):
        pipe(guidance_scale=1.4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"class_labels": [1000]}, "expected labels from 0 to 999"),  # the null label is no class
        ({}, "class_labels: the model takes classes; expected class_labels"),
        ({"prompt": "a cat"}, "the model takes classes"),
        ({"class_labels": [1], "num_inference_steps": 0}, "expected at least 1, got 0"),
        ({"class_labels": [1], "latents": torch.zeros(1, 4, 4, 4)}, r"expected \(1, 4, 8, 8\), got \(1, 4, 4, 4\)"),
        ({"class_labels": [1], "guidance_scale": 0.4}, "expected at least 1"),
        ({"class_labels": [1], "guidance_interval": (0.6, 0.2)}, "expected 0 <= first <= last <= 1"),
        ({"class_labels": [1], "num_inference_steps": 2.5}, "num_inference_steps: expected a whole number, got 2.5"),
        ({"class_labels": [1], "num_images": 0}, "num_images: expected at least 1, got 0"),
        ({"class_labels": [1, 2], "num_images": 3}, "num_images: expected one image per label or prompt, 2, got 3"),
        ({"class_labels": "cat"}, "expected whole numbers, such as 207,360, since no names are known, got 'cat'"),
        ({"class_labels": [1.5]}, "class_labels: expected a whole number, got 1.5"),
        ({"class_labels": [1, 2], "generator": [seeded()]}, "generator: expected one, or one per sample, 2, got 1"),
        ({"class_labels": [1], "guidance_scale": float("nan")}, "expected at least 1 .no guidance., got nan"),
        ({"class_labels": [1], "output_type": "jpeg"}, "expected pil, np, pt or latent"),
        ({"class_labels": [1], "height": 512}, "height: the model makes images of 16 x 16; expected 16, got 512"),
        ({"class_labels": [1], "negative_prompt": "blurry"}, "negative_prompt: the model takes no text; expected none"),
        ({"class_labels": [1], "num_images_per_prompt": 0}, "num_images_per_prompt: expected at least 1, got 0"),
        (
            {"class_labels": [1], "batch_size": 2},
            "batch_size: the pipeline takes no such argument; expected num_images",
        ),
        ({"class_labels": [1], "num_inference_step": 2}, "did you mean num_inference_steps"),
        ({"class_labels": [1], "precision": "fp16"}, "precision: expected bf16 or fp8, got 'fp16'"),
        (
            {"class_labels": [1], "precision": "fp8"},
            "fp8: its kernels need compute capability 9.0 .*, got no CUDA device",
        ),
        (
            {
                "class_labels": [1],
                "callback_on_step_end": print,
                "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
            },
            "expected .'latents'., got prompt_embeds too",
        ),
    ],
)
def test_bad_input_is_one_clear_error(arguments, words):
    with pytest.raises(ValueError, match=words):
        latent_pipeline()(**arguments)


def test_fp8_is_derived_once_and_anew_where_the_weights_have_changed(monkeypatch):
    derived = []

    def derive(net):
        derived.append(net)
        return Fp8UViT(net, fp8_block.REFERENCE)

    monkeypatch.setattr("uvit_fast.pipeline.pipeline.Fp8UViT", derive)
    pipe = latent_pipeline("h2_256", "model.embed_dim=64", "model.num_heads=1").to(torch.bfloat16)

    def call(**how):
        return pipe(class_labels=[1], generator=seeded(), output_type="latent", **how).images

    wide, first, again = call(), call(precision="fp8"), call(precision="fp8")
    assert torch.equal(first, again) and len(derived) == 1
    assert 0 < (first - wide).norm() < 0.2 * wide.norm()
    with torch.no_grad():
        pipe.model.norm.weight.mul_(2)
    assert not torch.equal(call(precision="fp8"), first) and len(derived) == 2


def test_fp8_is_the_same_after_a_first_call_that_was_interrupted_and_with_any_scheduler(monkeypatch):
    monkeypatch.setattr("uvit_fast.pipeline.pipeline.Fp8UViT", lambda net: Fp8UViT(net, fp8_block.REFERENCE))
    monkeypatch.setattr(rounding, "IMAGES", 2)

    def weights(break_off=False, scheduler=None):
        pipe = latent_pipeline("h2_256", "model.embed_dim=64", "model.num_heads=1").to(torch.bfloat16)
        if scheduler:
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        if break_off:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Fp8UViT, "forward", Mock(side_effect=KeyboardInterrupt))
                pipe._network("fp8")
        return [layers.fc2.weight.float() for layers in pipe._network("fp8").layers[1:]]

    once = weights()
    assert all(map(torch.equal, once, weights(break_off=True)))
    assert all(map(torch.equal, once, weights(scheduler=DDIMScheduler)))
