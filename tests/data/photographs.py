"""Real photographs that come with scikit-image and scikit-learn, as their files."""

from pathlib import Path

import skimage
import sklearn

SKIMAGE, SKLEARN = (Path(package.__file__).parent for package in (skimage, sklearn))
JPEG = [SKLEARN / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
JPEG += [SKIMAGE / "data" / name for name in ("rocket.jpg", "retina.jpg", "hubble_deep_field.jpg")]
PNG = [SKIMAGE / "data" / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "camera.png")]
