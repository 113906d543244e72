"""Images to features and figures: failed images and references told apart, and what makes figures incomparable said."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from uvit_fast.config import UserError
from uvit_fast.evaluation.classifier import ClassifierFeatures, cached_classifier, train_classifier
from uvit_fast.evaluation.evaluate import evaluate, table
from uvit_fast.evaluation.features import extract
from uvit_fast.evaluation.inception import Features
from uvit_fast.evaluation.metrics import frechet_distance, inception_score, moments, precision_recall
from uvit_fast.evaluation.reference import load_reference, reference_from_images
from uvit_fast.evaluation.sources import Images
from uvit_fast.measuring import open_images


class MeanColours:
    """Features that a person can compute: the mean colour, and its square as the spatial ones; two classes by brightness."""

    prefix, identity, pool_dim, device, like = "", "mean-colours", 3, torch.device("cpu"), "tensorflow"
    calls = 0

    def __call__(self, images):
        self.calls += 1
        pool = images.float().mean((1, 2)) / 255  # (B, 3)
        return Features(pool, pool**2)

    def probabilities(self, pool):
        bright = pool.mean(1)
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


def test_a_folder_and_an_npz_give_the_same_features(tmp_path):
    """Also with batches that do not divide them, a compressed .npz, and the overview of `uvit-fast sample` in the folder."""
    images = pictures(23)
    folder = folder_of(images, tmp_path / "folder")
    Image.new("RGB", (100, 50)).save(folder / "grid.png")
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    sources = [open_images(p) for p in (folder, npz_of(tmp_path / "x.npz", arr_0=images), tmp_path / "small.npz")]
    expected = images.reshape(23, -1, 3).mean(1) / 255
    for source in sources:
        first, third = source.read([range(2), range(4, 7)])  # a share of several processes
        assert np.array_equal(first, images[:2]) and np.array_equal(third, images[4:7])
        found = extract(source, MeanColours(), batch=5, progress=False)
        np.testing.assert_allclose(found.pool, expected, rtol=1e-5)
        np.testing.assert_allclose(found.pool_moments.sigma, np.cov(expected, rowvar=False), rtol=1e-5)
        assert found.size == (8, 8) and source.count == 23 and not found.warnings


def test_an_npz_is_read_in_pieces(tmp_path):
    """Taking one batch of many leaves the rest of the file unread."""
    path = npz_of(tmp_path / "x.npz", arr_0=pictures(400))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\0" * 1000 + whole[len(whole) // 2 + 1000 :])  # a broken checksum
    first = next(open_images(path).read([range(10)]))
    np.testing.assert_array_equal(first, pictures(400)[:10])


def test_grey_images_are_taken_as_rgb(tmp_path):
    grey = pictures(6)[..., :1]
    found = extract(open_images(npz_of(tmp_path / "x.npz", arr_0=grey)), MeanColours(), progress=False)
    assert (found.pool == found.pool[:, :1]).all()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((4, 8, 8, 3), np.nan, np.float32), "expected uint8"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"expected uint8 \(N, H, W, 3\), got uint8 \(4, 3, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "got none"),
        (np.zeros((9, 8, 8, 3), np.uint8), "every image is of one colour, as black ones are"),
        (pictures(1), "at least 2 images"),
    ],
)
def test_images_that_cannot_be_measured_are_refused(array, words, tmp_path):
    with pytest.raises(UserError, match=words):
        extract(open_images(npz_of(tmp_path / "x.npz", arr_0=array)), MeanColours(), progress=False)


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


def test_folders_that_hold_no_equal_images_are_refused(tmp_path):
    folder = folder_of(pictures(3), tmp_path / "a")
    Image.new("RGB", (9, 8)).save(folder / "0001.png")
    with pytest.raises(UserError, match="0001.png: expected 8 x 8 pixels as in the folder's first image, got 9 x 8"):
        extract(open_images(folder), MeanColours(), progress=False)
    (folder / "0000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="0000.png: not a readable image"):
        extract(open_images(folder), MeanColours(), progress=False)
    (tmp_path / "b").mkdir()
    for path, words in ((tmp_path / "b", "no images"), (tmp_path / "c", "no such images")):
        with pytest.raises(UserError, match=words):
            open_images(path)


def statistics(features):
    (mu, sigma), (mu_s, sigma_s) = moments(features), moments(features**2)
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
        reference = load_reference(path, lambda like: MeanColours(), tmp_path / "cache", progress=False)
        assert reference.like == ("pytorch-fid" if kind == "pytorch-fid" else "tensorflow")
        results[kind] = evaluate(samples, reference, MeanColours(), progress=False)
    x = torch.from_numpy(fake.reshape(30, -1, 3).mean(1) / 255)
    expected = {
        "fid": frechet_distance(moments(x), moments(features)),
        "sfid": frechet_distance(moments(x**2), moments(features**2)),
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
    """The second time they come from the cache; one changed file makes them anew; as a reference of its own the cache's file works."""
    folder, extractor = folder_of(pictures(12), tmp_path / "real"), MeanColours()

    def load():
        return load_reference(folder, lambda like: extractor, tmp_path / "cache", progress=False)

    first, calls = load(), extractor.calls
    again = load()
    assert calls > 0 and extractor.calls == calls
    for a, b in ((first.pool_moments, again.pool_moments), (first.spatial_moments, again.spatial_moments)):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert torch.equal(first.pool, again.pool) and (again.count, again.size, again.like) == (12, (8, 8), "tensorflow")
    (file,) = (tmp_path / "cache").iterdir()
    assert torch.equal(load_reference(file, lambda like: extractor, tmp_path, progress=False).pool, first.pool)
    Image.fromarray(pictures(1, seed=5)[0]).save(folder / "0003.png")
    assert not torch.equal(load().pool, first.pool) and extractor.calls > calls


def test_statistics_of_other_weights_or_preprocessing_are_refused(tmp_path):
    """The cache's file says which extractor made it, also where the dimensions agree."""

    class OtherWeights(MeanColours):
        identity = "other-weights"

    source = open_images(npz_of(tmp_path / "x.npz", arr_0=pictures(9)))
    reference_from_images(source, OtherWeights(), tmp_path / "cache", progress=False)
    (file,) = (tmp_path / "cache").iterdir()
    statistics = load_reference(file, lambda like: MeanColours(), tmp_path, progress=False)
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
            load_reference(path, lambda like: MeanColours(), tmp_path / "cache", progress=False),
            MeanColours(),
            progress=False,
        )


def test_inception_score_of_images_sorted_by_class_splits_all_classes(tmp_path, monkeypatch):
    """Dark images first, then bright ones: splits of consecutive images would score 1; an order without labels is kept."""
    images = pictures(400)
    images = images[np.argsort(images.mean((1, 2, 3)))]
    labels = np.repeat([0, 1], 200)
    scores = {}
    original = inception_score
    monkeypatch.setattr("uvit_fast.evaluation.evaluate.inception_score", lambda p: original(p, split_size=40))
    for name, arrays in {"sorted": {"arr_1": labels}, "kept": {}}.items():
        source = open_images(npz_of(tmp_path / f"{name}.npz", arr_0=images, **arrays))
        reference = reference_from_images(source, MeanColours(), tmp_path / "cache", progress=False)
        scores[name] = evaluate(source, reference, MeanColours(), progress=False)["metrics"]["is"]
    assert scores["sorted"] - 1 > 3 * (scores["kept"] - 1)


def test_the_classifier_knows_digits_and_its_distance_tells_good_samples_from_bad(tmp_path):
    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    device = torch.device("cpu")
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
    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    device = torch.device("cpu")
    monkeypatch.setattr("uvit_fast.evaluation.classifier.STEPS", 100)
    first, second = (cached_classifier(images, labels, "digits", tmp_path, device) for _ in range(2))
    assert ClassifierFeatures(first, device).identity == ClassifierFeatures(second, device).identity
    with pytest.raises(UserError, match="recognises"):  # labels that say nothing
        train_classifier(images, np.random.default_rng(0).permutation(labels), device)
