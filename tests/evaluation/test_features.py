"""Images to features and figures: failed images and references told apart, and what makes figures incomparable said."""

import os
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.evaluation.test_metrics import statistics_of
from uvit_fast.evaluation import metrics
from uvit_fast.evaluation.classifier import ClassifierFeatures, cached_classifier, train_classifier
from uvit_fast.evaluation.evaluate import evaluate, table
from uvit_fast.evaluation.features import extract
from uvit_fast.evaluation.inception import Features
from uvit_fast.evaluation.metrics import frechet_distance, inception_score, precision_recall
from uvit_fast.evaluation.reference import load_reference, reference_from_images
from uvit_fast.evaluation.sources import Images
from uvit_fast.measuring import open_images
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.progress import Bar


class MeanColours:
    """Features that a person can compute: the mean colour, and its square as the spatial ones; two classes by
    brightness.
    """

    prefix, identity, pool_dim, device, like = "", "mean-colours", 3, torch.device("cpu"), "tensorflow"
    calls = 0

    def __call__(self, images):
        self.calls += 1
        pool = images.float().mean((1, 2)) / 255  # (B, 3)
        return Features(pool, pool**2)

    def probabilities(self, pool):
        bright = torch.sigmoid(40 * (pool.mean(1) - 0.35))
        return torch.stack([bright, 1 - bright], 1)


def pictures(count, size=8, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.uniform(0, 1, (count, 1, 1, 3)) * rng.integers(100, 256, (count, size, size, 3))).astype(np.uint8)


def in_memory(images):
    return Images("x", len(images), lambda parts: (images[part.start : part.stop] for part in parts))


def folder_of(images, folder):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return folder


def npz_of(path, **arrays):
    np.savez(path, **arrays)
    return path


def reference_of(path, folder, extractor=None):
    make = lambda like: extractor or MeanColours()  # noqa: E731
    return load_reference(path, make, open_images, folder / "cache", progress=False)


def test_some_black_images_are_a_warning():
    images = np.concatenate([pictures(90), np.zeros((10, 8, 8, 3), np.uint8)])
    found = extract(in_memory(images), MeanColours(), progress=False)
    assert "10 of 100 images are of one colour" in found.warnings[0]


def test_features_that_are_nan_are_refused():
    class Broken(MeanColours):
        def __call__(self, images):
            return Features(torch.full((len(images), 3), torch.nan), torch.zeros(len(images), 3))

    with pytest.raises(UserError, match="pool features are NaN"):
        extract(in_memory(pictures(4)), Broken(), progress=False)


def statistics(features):
    (mu, sigma), (mu_s, sigma_s) = statistics_of(features), statistics_of(features**2)
    return {"mu": mu.numpy(), "sigma": sigma.numpy()}, {"mu_s": mu_s.numpy(), "sigma_s": sigma_s.numpy()}


def test_every_kind_of_reference_gives_the_same_figures(tmp_path):
    """A folder, images in an .npz, ADM's file; what a file lacks is left out with a warning, not guessed."""
    real, fake = pictures(40, seed=1), pictures(30, seed=2)
    features = torch.from_numpy(real.reshape(40, -1, 3).mean(1) / 255)
    pool, spatial = statistics(features)
    paths = {
        "folder": folder_of(real, tmp_path / "real"),
        "images": npz_of(tmp_path / "images.npz", arr_0=real),
        "adm": npz_of(tmp_path / "adm.npz", arr_0=real, **pool, **spatial),
        "adm without images": npz_of(tmp_path / "adm_stats.npz", **pool, **spatial),
        "pytorch-fid": npz_of(tmp_path / "fid.npz", **pool),
    }
    samples, results = open_images(npz_of(tmp_path / "fake.npz", arr_0=fake)), {}
    for kind, path in paths.items():
        reference = reference_of(path, tmp_path)
        assert reference.like == ("pytorch-fid" if kind == "pytorch-fid" else "tensorflow")
        results[kind] = evaluate(samples, reference, MeanColours(), progress=False)
    x = torch.from_numpy(fake.reshape(30, -1, 3).mean(1) / 255)
    expected = {
        "fid": frechet_distance(statistics_of(x), statistics_of(features)),
        "sfid": frechet_distance(statistics_of(x**2), statistics_of(features**2)),
        "is": inception_score(MeanColours().probabilities(x)),
        **precision_recall(x, features)._asdict(),
    }
    for kind, lacking in {"folder": (), "images": (), "adm": (), "adm without images": ("precision", "recall")}.items():
        metrics = results[kind]["metrics"]
        for name in expected.keys() - lacking:
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4), (kind, name)
        assert ("precision" in metrics) is ("kid" in metrics) is (not lacking)
    assert set(results["pytorch-fid"]["metrics"]) == {"fid", "is"}
    for words in ("no sFID", "no precision", "compares with pytorch-fid's figures"):
        assert any(words in w for w in results["pytorch-fid"]["warnings"])
    assert "30 samples" in table(results["adm"]) and "published figures are of 50,000" in str(
        results["adm"]["warnings"]
    )


def test_the_statistics_of_a_folder_are_computed_once(tmp_path):
    """The second time they come from the cache; contents that change make them anew, and neither names nor times; as a
    reference of its own the cache's file works."""
    folder, extractor = folder_of(pictures(12), tmp_path / "real"), MeanColours()

    def load():
        return reference_of(folder, tmp_path, extractor)

    first, calls = load(), extractor.calls
    again = load()
    assert calls > 0 and extractor.calls == calls
    for a, b in ((first.pool_statistics, again.pool_statistics), (first.spatial_statistics, again.spatial_statistics)):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert torch.equal(first.pool, again.pool) and (again.count, again.size, again.like) == (12, (8, 8), "tensorflow")
    (file,) = (tmp_path / "cache").iterdir()
    assert torch.equal(reference_of(file, tmp_path, extractor).pool, first.pool)
    other = npz_of(tmp_path / "x.npz", arr_0=pictures(12))
    times, pool = other.stat(), reference_of(other, tmp_path, extractor).pool
    npz_of(other, arr_0=pictures(12, seed=5))
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert other.stat().st_size == times.st_size  # another file by its contents alone
    assert not torch.equal(reference_of(other, tmp_path, extractor).pool, pool)
    folder.rename(tmp_path / "elsewhere").joinpath("0003.png").rename(tmp_path / "elsewhere" / "0003b.png")
    folder, calls = tmp_path / "elsewhere", extractor.calls
    assert torch.equal(load().pool, first.pool) and extractor.calls == calls
    Image.fromarray(pictures(1, seed=5)[0]).save(folder / "0003b.png")
    assert not torch.equal(load().pool, first.pool) and extractor.calls > calls
    file.write_bytes(file.read_bytes()[:-100])  # a broken one is made anew
    Image.fromarray(pictures(12)[3]).save(folder / "0003b.png")
    assert torch.equal(load().pool, first.pool) and load().size == (8, 8)


def test_a_cache_that_cannot_be_written_costs_the_cache_only(tmp_path):
    (tmp_path / "cache").touch()
    reference = reference_of(folder_of(pictures(12), tmp_path / "real"), tmp_path)
    assert reference.count == 12 and "cannot keep the statistics" in reference.warnings[0]


def test_statistics_of_other_weights_or_preprocessing_are_refused(tmp_path):
    """The cache's file says which extractor made it, also where the dimensions agree."""

    class OtherWeights(MeanColours):
        identity = "other-weights"

    source = open_images(npz_of(tmp_path / "x.npz", arr_0=pictures(9)))
    reference_from_images(source, OtherWeights(), tmp_path / "cache", progress=False)
    (file,) = (tmp_path / "cache").iterdir()
    statistics = reference_of(file, tmp_path)
    with pytest.raises(UserError, match="expected statistics of mean-colours, got other-weights"):
        evaluate(source, statistics, MeanColours(), progress=False)


def test_precision_and_recall_take_ten_thousand_references(monkeypatch, tmp_path):
    monkeypatch.setattr("uvit_fast.evaluation.reference.NEIGHBOURS", 7)
    source = open_images(npz_of(tmp_path / "x.npz", arr_0=pictures(20)))
    reference = reference_from_images(source, MeanColours(), tmp_path / "cache", progress=False)
    assert reference.pool.shape == (7, 3) and reference.count == 20


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mean": np.zeros(3)}, "expected mu and sigma, or images arr_0, got mean"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"expected mu \(D,\) and sigma \(D, D\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "NaN or infinity"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "a matrix that is not symmetric"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "statistics that no images have: .* eigenvalues from -"),
        ({"mu": np.array(["a", "b", "c"]), "sigma": np.eye(3)}, "mu: expected real numbers, got <U1"),
        ({"mu": np.array([1, 2, None]), "sigma": np.eye(3)}, "mu: not readable as an array of numbers"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "size": np.zeros(0)}, "expected count, size, like"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "pool": np.ones((4, 2))}, r"expected pool \(M, 3\), got \(4, 2\)"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "expected statistics of 3 dimensions, got 2048"),
        ({"arr_0": pictures(9, size=16)}, "images of 8 x 8 pixels, but .* has 16 x 16"),
    ],
)
def test_references_of_another_kind_are_refused(arrays, words, tmp_path):
    path = npz_of(tmp_path / "x.npz", **arrays)
    samples = in_memory(pictures(9))
    with pytest.raises(UserError, match=words):
        evaluate(
            samples,
            reference_of(path, tmp_path),
            MeanColours(),
            progress=False,
        )


def bright_last(monkeypatch, images, split):
    """Figures of pictures from dark to bright, against themselves, with splits of a few of them."""
    images = images[np.argsort(images.mean((1, 2, 3)))]
    for name in ("inception_score", "adm_inception_score"):
        original = getattr(metrics, name)
        monkeypatch.setattr(f"uvit_fast.evaluation.evaluate.{name}", lambda p, f=original: f(p, split))
    monkeypatch.setattr("uvit_fast.evaluation.evaluate.SPLIT", split)
    return images


@pytest.mark.parametrize(
    ("count", "words"), [(400, "their order moves the score"), (410, "the last 10 would be a split"), (40, None)]
)
def test_inception_score_is_adms_or_a_sentence_says_why_not(count, words, tmp_path, monkeypatch):
    """Images from dark to bright, whose splits of 40 would be of one class each. Labels are not asked."""
    images = bright_last(monkeypatch, pictures(count), 40)
    shuffled = images[np.random.default_rng(0).permutation(count)]
    results = []
    for name, x in (("sorted", images), ("mixed", shuffled)):
        source = open_images(npz_of(tmp_path / f"{name}.npz", arr_0=x, arr_1=np.array([name, None])))
        reference = reference_from_images(source, MeanColours(), tmp_path / "cache", progress=False)
        results.append(evaluate(source, reference, MeanColours(), progress=False))
    first, second = (result["metrics"]["is"] for result in results)
    assert first == pytest.approx(second, rel=0.02) and first > 1.05
    said = [w for w in results[0]["warnings"] if "Inception score" in w]
    assert (len(said) == 1 and words in said[0] and "ADM's evaluator" in said[0]) if words else not said


@pytest.mark.parametrize(
    ("samples", "real", "words"),
    [
        ("a/x.png", "b/x.jpg", "a: 0% of the files are compressed with loss, as JPEG is, of .*b 100%"),
        ("a/x.webp", "b/x.png", "a: 100% of the files are compressed with loss"),
        ("a/x.bmp", "b/x.png", None),
        ("a/x.jpg", "b/x.jpeg", None),
        (
            "a/x.jpg",
            "statistics_256.npz",
            r"does not say what size .* \(its name has 256\); the samples have 8 x 8 pixels",
        ),
        ("a/x.png", "statistics.npz", "does not say what size its images had; the samples have 8 x 8 pixels"),
        ("a/grey.png", "b/x.png", "a: 100% of the images are without colour, of .*b 0%"),
    ],
)
def test_what_makes_samples_and_reference_incomparable_is_said(samples, real, words, tmp_path):
    """How they are stored, the size of others' statistics, colour: each a warning with its consequence."""
    images = pictures(20)

    def make(name):
        path = tmp_path / name
        if path.suffix == ".npz":
            return npz_of(path, **statistics(torch.rand(20, 3))[0])
        path.parent.mkdir()
        for i, image in enumerate(images):
            mode = "L" if path.stem == "grey" else "RGB"
            Image.fromarray(image).convert(mode).save(path.with_name(f"{i}{path.suffix}"))
        return path.parent

    result = evaluate(open_images(make(samples)), reference_of(make(real), tmp_path), MeanColours(), progress=False)
    found = [w for w in result["warnings"] if "does not say" in w or "with loss" in w or "without colour" in w]
    assert len(found) == bool(words) and all(re.search(words, w) and "distances" in w for w in found)


@pytest.mark.parametrize(
    ("suffix", "options", "share"),
    [("tif", {}, 0), ("tif", {"compression": "jpeg"}, 1), ("jp2", {}, 0), ("jp2", {"irreversible": True}, 1)],
)
def test_formats_that_store_with_loss_or_without_are_told_apart(suffix, options, share, tmp_path):
    Image.fromarray(pictures(1)[0]).resize((32, 32)).save(tmp_path / f"x.{suffix}", **options)
    assert open_images(tmp_path).lossy == share


def test_the_classifier_knows_digits_and_its_distance_tells_good_samples_from_bad(tmp_path):
    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    device = "cpu"
    model, accuracy = train_classifier(images, labels, device)
    assert accuracy > 0.95
    extractor = ClassifierFeatures(model, device)
    rng = np.random.default_rng(0)
    images = images[rng.permutation(len(images))]  # the dataset is sorted by writer
    seen, unseen = images[:1000], images[1000:]
    noisy = np.clip(unseen + rng.normal(0, 60, unseen.shape), 0, 255).astype(np.uint8)

    reference = reference_from_images(in_memory(seen), extractor, tmp_path, progress=False)
    good, bad = (evaluate(in_memory(x), reference, extractor, progress=False)["metrics"] for x in (unseen, noisy))
    assert set(good) == {f"digits-{n}" for n in ("fid", "sfid", "is", "precision", "recall", "kid", "kid_std")}
    assert good["digits-fid"] < bad["digits-fid"] / 3 and good["digits-precision"] > bad["digits-precision"]
    assert 6 < good["digits-is"] <= 10
    with pytest.raises(UserError, match="classifier's images are 8 x 8, got 16 x 16"):
        extractor(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))


def test_a_cached_classifier_is_the_same_one(tmp_path, monkeypatch):
    """Of the same images and labels: with others, or a broken file, it is trained anew."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    images = replace(in_memory(pixels), identity=lambda: "digits")
    device = "cpu"
    monkeypatch.setattr("uvit_fast.evaluation.classifier.STEPS", 100)

    def identity(labels=labels):
        return ClassifierFeatures(cached_classifier(images, labels, tmp_path, device), device).identity

    first = identity()
    assert first == identity() != identity((labels + 1) % 10)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:2000])
    monkeypatch.setattr("uvit_fast.evaluation.classifier.STEPS", 101)
    assert identity() != first
    with pytest.raises(UserError, match="recognises"):  # labels that say nothing
        train_classifier(pixels, np.random.default_rng(0).permutation(labels), device)


def test_a_classifier_of_large_images_is_trained_in_fewer_and_no_slower_steps(monkeypatch, tmp_path, capsys):
    """What follows the first convolution has the size of 32 x 32 pixels; every pixel counts; of many images some are
    taken, of all classes. A bar says how long it takes."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], 100)
    pixels = rng.integers(0, 100, (200, 70, 50, 1)).astype(np.uint8) + (100 * labels[:, None, None, None]).astype(
        np.uint8
    )
    images = replace(in_memory(pixels), identity=lambda: "large")
    for name, value in {"STEPS": 40, "TRAINED_ON": 60, "Bar": lambda *items, delay, **how: Bar(*items, **how)}.items():
        monkeypatch.setattr(f"uvit_fast.evaluation.classifier.{name}", value)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model = cached_classifier(images, labels, tmp_path, "cpu")
    said = capsys.readouterr()
    assert "20/20" in said.err and "a classifier of 50 images" in said.err and "on 50 images" in said.out
    with torch.inference_mode():
        assert model.shallow[0](torch.zeros(1, 1, 70, 50)).shape == (1, 32, 24, 17)
        black = torch.zeros(1, 70, 50, 1, dtype=torch.uint8)
        for corner in ((0, 0), (69, 49), (69, 0), (34, 27)):
            white = black.clone()
            white[0, *corner] = 255
            assert not torch.equal(model(white).spatial, model(black).spatial)
