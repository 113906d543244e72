"""Are the sampled digits digits, and are they new? Two figures for the demo, where Inception features mean little."""

import numpy as np

from uvit_fast.runtime.extras import missing


def class_accuracy(samples: np.ndarray, asked: np.ndarray, real: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of samples that a classifier fitted on the real digits assigns to the requested class.

    Args:
        samples: (M, ...) in the value range of `real`; the classifier never trains on them.
        asked: (M,) the requested classes.
        real: (N, ...) real digits.
        labels: (N,) their classes.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise missing("the digits' classifier", "scikit-learn", "digits") from None

    classifier = SVC(gamma="scale").fit(real.reshape(len(real), -1), labels)
    return float((classifier.predict(samples.reshape(len(samples), -1)) == asked).mean())


def nearest_train_ratio(samples: np.ndarray, real: np.ndarray, labels: np.ndarray) -> float:
    """Return the median distance of a sample to its nearest real digit, over that of a real digit to its nearest in its
    own class.

    Euclidean over pixels. 0: the samples are copies of the training set; real digits have about 1.
    """
    samples, real = samples.reshape(len(samples), -1), real.reshape(len(real), -1)
    to_train = _distances(samples, real).min(axis=1)  # (M,)
    within = []
    for label in np.unique(labels):
        d = _distances(real[labels == label], real[labels == label])
        np.fill_diagonal(d, np.inf)
        within.append(d.min(axis=1))
    return float(np.median(to_train) / np.median(np.concatenate(within)))


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)  # (A, B)
    return np.sqrt(np.maximum(squared, 0))
