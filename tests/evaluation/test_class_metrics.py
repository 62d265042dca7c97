"""Class metrics: their values by hand, double loops, the law of NDB, and which class a file was made for."""

import math

import numpy as np
import pytest
from scipy.special import log_softmax

from tonefield.evaluation.class_metrics import (
    am_score,
    bootstrap_interval,
    class_scores,
    confidence,
    log_inception_score,
    log_modified_inception_score,
    number_of_different_bins,
    proportions_differ,
    share_interval,
    wanted_class,
)
from tonefield.evaluation.sets import Sample


def one_hot(labels, classes, certainty=1e3):
    logits = np.zeros((len(labels), classes))
    logits[np.arange(len(labels)), labels] = certainty
    return log_softmax(logits, axis=1)


def random_posteriors(n, classes, seed=0, scale=3.0):
    return log_softmax(scale * np.random.default_rng(seed).normal(size=(n, classes)), axis=1)


@pytest.mark.parametrize("classes", [2, 10, 35])
def test_scores_of_sure_and_unsure_classifiers(classes):
    sure, unsure = one_hot(np.arange(3 * classes) % classes, classes), np.full((7, classes), -math.log(classes))
    assert math.exp(log_inception_score(sure)) == pytest.approx(classes, rel=1e-12)
    assert am_score(sure, sure) == pytest.approx(0, abs=1e-12)
    assert log_inception_score(unsure) == pytest.approx(0, abs=1e-12)
    assert log_modified_inception_score(unsure) == pytest.approx(0, abs=1e-12)
    assert am_score(unsure, unsure) == pytest.approx(math.log(classes), rel=1e-12)
    assert confidence(sure) == pytest.approx(1) and confidence(unsure) == pytest.approx(1 / classes)


def test_constant_posteriors_have_no_variety():
    same = np.repeat(random_posteriors(1, 6), 9, axis=0)
    assert log_inception_score(same) == pytest.approx(0, abs=1e-12)
    assert log_modified_inception_score(same) == pytest.approx(0, abs=1e-12)


def test_am_by_hand():
    # Reference: three quarters of class 0. Generated: all class 1 with probability 3/4.
    reference = np.log([[0.5, 0.5], [1.0 - 1e-300, 1e-300]])
    generated = np.log([[0.25, 0.75]] * 4)
    divergence = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert am_score(generated, reference) == pytest.approx(divergence + entropy, rel=1e-12)


def test_scores_are_those_of_loops_over_all_pairs():
    log_p = random_posteriors(13, 5)
    p = np.exp(log_p)
    pairs = [sum(p[i] * (log_p[i] - log_p[j])) for i in range(13) for j in range(13)]
    assert log_modified_inception_score(log_p) == pytest.approx(np.mean(pairs), rel=1e-12)
    to_mean = [sum(p[i] * np.log(p[i] / p.mean(0))) for i in range(13)]
    assert log_inception_score(log_p) == pytest.approx(np.mean(to_mean), rel=1e-12)
    scores = class_scores(log_p)
    assert scores["is"] == pytest.approx(math.exp(np.mean(to_mean)))
    assert scores["log_mis"] == pytest.approx(np.mean(pairs))


def test_extreme_logits_stay_finite():
    rng = np.random.default_rng(0)
    log_p = log_softmax(rng.choice([-1e3, 1e3], size=(40, 10)), axis=1)
    assert np.exp(log_p).min() == 0  # the probabilities themselves underflow
    pairs = [sum(np.exp(p) * (p - q)) for p in log_p for q in log_p]
    assert log_modified_inception_score(log_p) == pytest.approx(np.mean(pairs), rel=1e-10)
    for value in (log_inception_score(log_p), am_score(log_p, log_p), *class_scores(log_p).values()):
        assert math.isfinite(value)


def test_intervals_hold_the_truth_as_often_as_they_say():
    # The value of infinitely many clips, from a large set
    truth = log_inception_score(random_posteriors(200_000, 4, seed=1))
    hits = 0
    for seed in range(100):
        low, high = bootstrap_interval(log_inception_score, random_posteriors(100, 4, seed=seed + 2), seed)
        hits += low < truth < high
    assert 85 <= hits <= 100

    # Drawn sets have fewer different clips than there are: the interval lies about the value all the same.
    low, high = bootstrap_interval(lambda log_p: len(np.unique(log_p[:, 0])), random_posteriors(50, 2), 0)
    assert low < 50 < high

    rng = np.random.default_rng(0)
    shares = [share_interval(int(rng.binomial(50, 0.9)), 50) for _ in range(500)]
    assert 0.92 < np.mean([low <= 0.9 <= high for low, high in shares]) < 0.98
    assert share_interval(0, 10)[0] == 0 and share_interval(10, 10)[1] == 1
    assert share_interval(10, 10)[0] == pytest.approx(1 / (1 + 1.96**2 / 10))  # of the closed form at a share of 1


def test_the_test_of_two_proportions():
    # 30 of 100 against 45 of 100: pooled 0.375, z = 0.15 / sqrt(0.375 * 0.625 * 0.02) = 2.19
    assert proportions_differ(np.array([30, 70]), np.array([45, 55])).tolist() == [True, True]
    assert proportions_differ(np.array([30, 70]), np.array([45, 55]), alpha=0.02).tolist() == [False, False]
    # 30 against 43: z = 1.90
    assert not proportions_differ(np.array([30, 70]), np.array([43, 57])).any()
    # The sets may differ in size; empty bins do not differ
    assert not proportions_differ(np.array([300, 700, 0]), np.array([3, 7, 0])).any()


def test_bins_of_one_law_differ_as_often_as_chance_has_it():
    shares = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        bins = rng.dirichlet(np.full(20, 5.0))
        first, second = rng.multinomial(2000, bins), rng.multinomial(1500, bins)
        shares.append(proportions_differ(first, second).mean())
    assert np.mean(shares) == pytest.approx(0.05, abs=0.02)


def test_ndb_sees_lost_modes():
    rng = np.random.default_rng(0)
    modes = 10 * rng.normal(size=(10, 3))

    def draw(n, which):
        return modes[rng.choice(which, n)] + rng.normal(size=(n, 3)) * [1, 1, 1]

    train, alike, few = draw(1000, range(10)), draw(800, range(10)), draw(800, range(5))
    different, bins = number_of_different_bins(train, alike)
    assert bins == 50 and different / bins < 0.2
    lost, _ = number_of_different_bins(train, few)
    assert lost / bins > 0.6
    assert number_of_different_bins(train, train)[0] == 0
    # Scales of features do not matter
    scale = np.array([1, 1e3, 1e-3])
    assert number_of_different_bins(train * scale, few * scale)[0] == lost
    # The reference alone says what is large: here five numbers that tell two kinds apart count more than a wide one.
    kinds, other = np.repeat(np.tile([-1.0, 1.0], 200)[:, None], 5, 1), rng.uniform(-1000, 1000, (400, 1))
    alike = np.hstack([kinds, 500 + rng.normal(size=(400, 1))])
    assert number_of_different_bins(np.hstack([kinds, other]), alike, bins=2) == (0, 2)
    with pytest.raises(ValueError, match="10 bins need 20 rows of the reference at least, not 15"):
        number_of_different_bins(train[:15], alike, bins=10)


LABELS = ["one", "two", "3"]


@pytest.mark.parametrize(
    "name, columns, wanted",
    [
        ("x.wav", {"label": "two"}, "two"),
        ("x.wav", {"label": 1}, "two"),  # a number of the class
        ("x.wav", {"class": "one"}, "one"),
        ("one/two.wav", {"label": "two"}, "two"),  # what is said counts more than the folder
        ("one/two.wav", {}, "one"),
        ("runs/two/0007.wav", {}, "two"),
        ("runs/3.wav", {}, "3"),
        ("one/two/x.wav", {}, "two"),  # the folder that it lies in, and not one further up
        ("two_one_4.wav", {}, "two"),
        ("3_theo_1.wav", {}, "3"),
        ("sample-two (5).wav", {}, "two"),
        ("stone.wav", {}, None),  # a part of a word is not the word
        ("x.wav", {"label": "four"}, None),
    ],
)
def test_the_class_that_was_wanted(name, columns, wanted):
    assert wanted_class(Sample(name, None, "", columns), LABELS) == wanted


def test_numbers_are_classes_of_the_folder_they_come_from():
    sample = Sample("two/x.wav", None, "", {"label": 0})
    assert wanted_class(sample, LABELS, class_names=["two", "zzz"]) == "two"
    assert wanted_class(Sample("x.wav", None, "", {"label": 3}), LABELS) == "3"  # a name that is a number


def test_a_prompt_names_the_wanted_class():
    def wanted(prompt, name="000.wav"):
        return wanted_class(Sample(name, None, "", {"prompt": prompt}), ["six", "seven"])

    assert wanted("jackson says seven") == "seven"
    assert wanted("six or seven", "six.wav") == "six"  # two of them are none
    assert wanted(None) is None
