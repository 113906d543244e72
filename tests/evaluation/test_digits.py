"""The demo's two figures say what they claim, for samples whose answer is known."""

import numpy as np
from sklearn.datasets import load_digits

from uvit_fast.evaluation.digits import class_accuracy, nearest_train_ratio

REAL, LABELS = load_digits(return_X_y=True)


def test_class_accuracy_of_real_wrong_and_meaningless_samples():
    rng = np.random.default_rng(0)
    held_out = rng.permutation(len(REAL))[:300]
    rest = np.setdiff1d(np.arange(len(REAL)), held_out)
    args = (REAL[rest], LABELS[rest])
    assert class_accuracy(REAL[held_out], LABELS[held_out], *args) > 0.97
    assert class_accuracy(REAL[held_out], (LABELS[held_out] + 1) % 10, *args) < 0.02
    assert class_accuracy(rng.uniform(0, 16, (300, 64)), LABELS[held_out], *args) < 0.3


def test_nearest_train_ratio_tells_copies_from_new_digits():
    copies = REAL[:200] + np.random.default_rng(0).normal(0, 0.1, (200, 64))
    assert nearest_train_ratio(copies, REAL, LABELS) < 0.1
    held_out = np.arange(200)
    assert 0.8 < nearest_train_ratio(REAL[held_out], REAL[200:], LABELS[200:]) < 1.2
