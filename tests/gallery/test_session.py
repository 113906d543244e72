"""What the gallery does, without a page."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from tests import autoencoders
from tests.clip import save_clip
from tests.gallery.small import CPU, save_run, session
from tests.recorded import RecordedGraphs
from uvit_fast import sampling
from uvit_fast.diffusion.noise import sample_noise
from uvit_fast.gallery.recipe import KEY, checked, from_png, plain_png
from uvit_fast.gallery.session import FRAMES, MOST, Session, between
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.images import to_uint8


@pytest.fixture
def two(tmp_path):
    return session(tmp_path)


def last(views):
    return list(views)[-1]


def start(of, **values):
    return checked(of.choices(of.names[0]).start, **values)


@pytest.mark.parametrize("sampler", ["dpm_fast", "dpmpp_2m", "euler_maruyama"])
def test_a_picture_is_what_the_sampling_loop_draws(two, tmp_path, sampler):
    """Watching changes nothing, also where earlier outputs or noise on the way are used."""
    views = list(two.draw([start(two, label=3, seed=5, sampler=sampler, cfg_scale=1.7)]))
    assert [view.done for view in views] == [2, 3, 4, 5, 6, 8, 9, 10, 11, 12] and len(views) == FRAMES
    assert views[-1].milliseconds > 0 and views[0].milliseconds is None and not views[-1].replayed
    cfg, run = save_run(tmp_path / "a", f"sample.sampler={sampler}")
    model = sampling.load_for_sampling(cfg, run, CPU)
    (wanted,) = sampling.sample(model, cfg, 1, labels=torch.tensor([3]), seed=5, guidance_scale=0.7)
    assert np.array_equal(views[-1].images, to_uint8(wanted))


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_captured_loops_replay_their_states_too(two, tmp_path, scale):
    """Seeds and classes need no other capture, a number of pictures does."""
    graphs = RecordedGraphs()
    captured = Session({"a": save_run(tmp_path / "a")}, CPU, graphs=graphs)
    for seed, captures in ((1, 1), (2, 1)):
        recipes = captured.recipes(start(two, seed=seed, cfg_scale=scale), [seed, 7])
        plain, views = list(two.draw(recipes)), list(captured.draw(recipes))
        assert [v.done for v in views] == [v.done for v in plain]
        assert all(np.array_equal(a.images, b.images) for a, b in zip(plain, views))
        assert views[-1].replayed and graphs.captures == captures
    captured_alone = last(captured.draw(recipes[:1]))
    assert graphs.captures == 2 and np.array_equal(captured_alone.images, plain[-1].images[:1])


def test_two_classes_have_the_same_noise_and_seeds_count_up(two):
    recipes = two.recipes(start(two, seed=4), [3, 7], num=2)
    assert [(r.label, r.seed) for r in recipes] == [(3, 4), (3, 5), (7, 4), (7, 5)]
    together = last(two.draw(recipes)).images
    assert np.array_equal(together[3], last(two.draw(recipes[3:])).images[0])  # and a batch does not matter


def test_side_by_side_is_of_the_same_noise(two):
    left = two.recipes(start(two, label=3))
    right = [checked(left[0], checkpoint="other", steps=5)]
    views = list(two.side_by_side(left, right))
    assert views[0][1] is None and views[-1][0].done == 12 and views[-1][1].done == 5
    assert np.array_equal(views[-1][1].images, last(two.draw(right)).images)
    assert not np.array_equal(views[-1][0].images, views[-1][1].images)
    with pytest.raises(UserError, match="expected the same seeds"):
        next(two.side_by_side(left, two.recipes(start(two, seed=1))))


def test_checkpoints_of_other_shapes_cannot_share_noise(tmp_path):
    other = save_run(tmp_path / "b", "model.img_size=16")
    both = Session({"a": save_run(tmp_path / "a"), "b": other}, CPU)
    with pytest.raises(UserError, match=r"one shape, got \(1, 8, 8\) and \(1, 16, 16\)"):
        next(both.side_by_side([both.choices("a").start], [both.choices("b").start]))


def test_a_walk_leads_from_one_seeds_picture_to_the_others(two):
    walk = start(two, seed=1).walk(2, 5)
    images = last(two.draw(walk)).images
    for end, seed in ((0, 1), (-1, 2)):
        assert np.array_equal(images[end], last(two.draw([start(two, seed=seed)])).images[0])
    assert len({image.tobytes() for image in images}) == 5
    a, b = sample_noise(1, [0], (4, 32, 32))[0], sample_noise(2, [0], (4, 32, 32))[0]
    middle = between(a, b, 0.5)
    assert middle.norm() == pytest.approx(float(a.norm()), rel=0.02)  # a straight line would have lost 29%
    assert torch.equal(between(a, a, 0.5), a)


def test_a_file_says_what_made_it_and_is_drawn_again(two):
    recipe = start(two, label=7, seed=2**53 + 1, cfg_scale=2.5, steps=9, sampler="dpmpp_2m").walk(6, 4)[1]
    image = last(two.draw([recipe])).images[0]
    data = two.png(image, recipe)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image[..., 0])
    again, notes = two.load(data)
    assert again == recipe and notes == []
    assert np.array_equal(last(two.draw([again])).images[0], image)
    _, source = from_png(data)
    assert source["class"] == "7" and source["device"] == "cpu" and len(source["weights"]) == 16
    assert str(two._sources["a"].path.parent).encode() not in data  # nothing of where it lay


def test_what_differs_from_what_made_a_file_is_said(two, tmp_path):
    data = two.png(np.zeros((8, 8, 1), np.uint8), start(two))
    renamed = Session({"new": (two._sources["a"].cfg, tmp_path / "a")}, CPU)
    recipe, notes = renamed.load(data)
    assert recipe.checkpoint == "new" and not notes  # known by its weights
    others = Session({"a": save_run(tmp_path / "others", "sample.spacing=time")}, CPU)
    recipe, notes = others.load(data)
    assert len(notes) == 2 and "other weights" in notes[0] and "spacing None, here time" in notes[1]
    gpu = two.png(np.zeros((8, 8, 1), np.uint8), start(two, precision="fp8"))
    recipe, notes = two.load(gpu)
    assert recipe.precision == "fp32" and notes == ["made in fp8, drawn here in fp32"]
    away = Session({"strange": save_run(tmp_path / "strange")}, CPU)
    with pytest.raises(UserError, match="made by a, which is not here; expected one of strange"):
        away.load(data)


def hidden(text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, text)
    return plain_png(np.zeros((8, 8, 1), np.uint8), pnginfo=info)


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", plain_png(np.zeros((8, 8, 1), np.uint8)), hidden("["), hidden("[]"),
     hidden('{"recipe": 1, "source": {}}'),
     hidden("[" * 100_000)],
    ids=["empty", "gif", "another's", "no JSON", "a list", "no recipe", "deep"],
)  # fmt: skip
def test_what_the_gallery_did_not_save_is_one_line(data, two):
    with pytest.raises(UserError, match="^picture: expected a PNG that the gallery saved"):
        two.load(data)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"label": 99}, "labels from 0 to 9, got 99"),
        ({"steps": 10**9}, "steps: .*100000.*got 1000000000"),
        ({"cfg_scale": 0.5}, "cfg_scale: .*1.*got 0.5"),
        ({"sampler": "heun"}, "sampler: a takes dpm_fast, .*, got heun"),
        ({"prompt": "a cat"}, "prompt: a takes none"),
        ({"folder": "/etc"}, "folder"),
    ],
)
def test_a_file_cannot_ask_for_what_is_not_offered(two, values, said):
    tree = {"recipe": start(two).model_dump(exclude_none=True) | values, "source": {}}
    with pytest.raises(UserError, match=said) as error:
        two.load(hidden(json.dumps(tree)))
    assert "\n" not in str(error.value)


def test_what_a_checkpoint_offers(two, tmp_path):
    choices = two.choices("a")
    assert choices.classes == [(str(i), i) for i in range(10)] and choices.guided and not choices.text
    assert choices.samplers == ["dpm_fast", "dpmpp_fast", "dpmpp_2m", "euler_maruyama"]  # heun is for flows
    assert choices.precisions == ["fp32"]  # no GPU: neither bf16 nor fp8
    flow = Session({"f": save_run(tmp_path / "f", "diffusion.schedule=flow", "sample.sampler=heun")}, CPU)
    assert {"euler", "heun"} < set(flow.choices("f").samplers)
    never = ["model.num_classes=0", "train.p_uncond=0", "sample.guidance_scale=0"]
    without = Session({"n": save_run(tmp_path / "n", *never)}, CPU)
    assert not without.choices("n").classes and not without.choices("n").guided
    assert last(without.draw([without.choices("n").start])).images.shape == (1, 8, 8, 1)
    with pytest.raises(UserError, match=f"expected 1 to {MOST} at a time, got 100"):
        two.recipes(start(two), list(range(10)), num=10)
    for value, words in ((None, "expected a valid integer, got None"), (True, "expected a number, got true$")):
        with pytest.raises(UserError, match=f"^seed: {words}"):  # of a field that was cleared, of a crafted request
            checked(start(two), seed=value)
    with pytest.raises(UserError, match="classes: expected one or more, got none"):
        two.recipes(start(two), [])


def test_a_prompt_becomes_decoded_latents(tmp_path):
    text = ["model.num_classes=0", "model.context_dim=16", "model.context_tokens=8", "model.in_chans=4"]
    vae = autoencoders.saved(autoencoders.kl(), tmp_path / "vae")
    run = save_run(tmp_path / "text", *text, f"latent.autoencoder={vae}", "latent.scale_factor=0.5")
    of = Session({"t": run}, CPU, clip=save_clip(tmp_path / "clip"))
    assert of.choices("t").text and not of.choices("t").classes
    recipe = start(of, prompt="a b", seed=2)
    views = list(of.draw([recipe]))
    assert {view.images.shape for view in views} == {(1, 16, 16, 3)}  # each state is decoded
    other = last(of.draw([checked(recipe, prompt="b")]))
    assert not np.array_equal(other.images, views[-1].images)
    again, notes = of.load(of.png(views[-1].images[0], recipe))
    assert again == recipe and not notes
    with pytest.raises(UserError, match="class: t has none"):
        last(of.draw([checked(recipe, label=3)]))


def test_plans_of_cached_layers_are_followed_and_named_in_files(two, tmp_path):
    cached = ["sample.sampler=dpmpp_2m", "sample.cache=outer:3", "model.depth=4"]
    cfg, run = save_run(tmp_path / "cached", *cached)
    of = Session({"c": (cfg, run)}, CPU)
    (wanted,) = sampling.sample(sampling.load_for_sampling(cfg, run, CPU), cfg, 1, labels=torch.tensor([0]))
    view = last(of.draw([start(of)]))
    assert np.array_equal(view.images, to_uint8(wanted))
    assert from_png(of.png(view.images[0], start(of)))[1]["cache"] == "outer:3"


def test_who_looks_away_ends_the_loop_and_the_next_is_served(two):
    last(two.draw([start(two)]))
    rows = []
    two._sources["a"].networks["fp32"].register_forward_hook(lambda *_: rows.append(1))
    views = two.draw([start(two, steps=500)])  # shown every 50 evaluations
    next(views)
    views.close()
    assert last(two.draw([start(two)])).done == 12 and len(rows) < 500


def test_samples_that_are_not_finite_are_one_line(two):
    with torch.no_grad():
        last(two.draw([start(two)]))
        next(two._sources["a"].networks["fp32"].parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="the pictures hold NaN or infinity"):
        last(two.draw([start(two)]))


def test_two_at_once_are_drawn_one_after_the_other(two):
    views = itertools.zip_longest(two.draw([start(two, seed=1)]), two.draw([start(two, seed=2)]))
    a, b = list(views)[-1]
    assert np.array_equal(a.images, last(two.draw([start(two, seed=1)])).images)
    assert np.array_equal(b.images, last(two.draw([start(two, seed=2)])).images)
