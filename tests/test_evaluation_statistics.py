"""Intervals cover what they claim, slices of noise raise no alarm, metrics are what others say."""

import functools
import math

import numpy as np
import pytest

from edgepass import Evaluation, PerSample
from edgepass.errors import UsageError
from edgepass.evaluation.bootstrap import draws, intervals
from edgepass.evaluation.builtin_metrics import (
    BUILTIN,
    auc,
    edit_distance,
    eer,
    f1,
    spearman,
    weighted_auc,
)
from edgepass.evaluation.classification import calibration_error, mcnemar
from edgepass.evaluation.metrics import resolve
from edgepass.evaluation.permutation import harm_test, holm
from edgepass.evaluation.recognise import recognised
from edgepass.evaluation.scored import Calls, Sums
from edgepass.evaluation.slices import make_slices, slice_results


def sums(parts, units=None):
    count = len(next(iter(parts.values())))
    pairs = {name: np.stack([values, np.ones(count)], 1) for name, values in parts.items()}
    units = np.arange(count) if units is None else units
    return Sums(pairs, units, np.arange(count))


def calls(predictions, labels, metric="auc", units=None):
    count = len(labels)
    units = np.arange(count) if units is None else units
    one = BUILTIN[metric]
    return Calls(metric, one.call, predictions, labels, units, np.arange(count), one.weighted)


def difference(scored, method="percentile", seed=0, resamples=300):
    found, _ = intervals(scored, resamples=resamples, confidence=0.9, seed=seed, method=method)
    return found["candidate"][1]


# --- intervals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_of_differences_cover(method):
    """Accuracies 0.9 and 0.86 on the same 150 samples, errors correlated: the true difference,
    -0.04, is in the 90 % interval in 90 % of 300 experiments, within what chance allows."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        hard = rng.random(150)
        original = hard < 0.9
        candidate = np.where(rng.random(150) < 0.7, hard < 0.86, rng.random(150) < 0.86)
        parts = {"original": original.astype(float), "candidate": candidate.astype(float)}
        found = difference(sums(parts), method, seed=trial)
        hits += found.low <= -0.04 <= found.high
    assert 0.85 <= hits / 300 <= 0.95


def test_intervals_of_auc_cover():
    """Normal scores one apart: AUC is Phi(1 / sqrt 2)."""
    true = 0.5 * (1 + math.erf(0.5))
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        labels = (np.arange(120) % 3 == 0).astype(int)
        scored = calls({"original": labels + rng.normal(size=120)}, labels)
        found, _ = intervals(scored, resamples=300, confidence=0.9, seed=trial, method="percentile")
        value = found["original"][0]
        hits += value.low <= true <= value.high
    assert 0.84 <= hits / 200 <= 0.96


def test_frames_of_one_recording_are_resampled_together():
    """20 recordings of 50 frames that are right or wrong together: resampling frames claims far too
    narrow an interval, resampling recordings covers."""
    rng = np.random.default_rng(2)
    units = np.repeat(np.arange(20), 50)
    grouped = single = 0
    for trial in range(200):
        frames = np.repeat(rng.random(20) < 0.5, 50).astype(float)
        for_units = intervals(
            sums({"original": frames}, units), resamples=200, confidence=0.9, seed=trial,
            method="percentile",
        )[0]["original"][0]  # fmt: skip
        for_frames = intervals(
            sums({"original": frames}), resamples=200, confidence=0.9, seed=trial,
            method="percentile",
        )[0]["original"][0]  # fmt: skip
        grouped += for_units.low <= 0.5 <= for_units.high
        single += for_frames.low <= 0.5 <= for_frames.high
    assert grouped / 200 > 0.8
    assert single / 200 < 0.4


def test_resamples_are_the_same_for_all_models_and_metrics():
    counts = np.concatenate(list(draws(7, 120, 3)))
    assert counts.shape == (120, 7)
    assert (counts.sum(1) == 7).all()
    assert np.array_equal(counts, np.concatenate(list(draws(7, 120, 3))))
    values = np.random.default_rng(0).random(7)
    shifted = sums({"original": values, "candidate": values + 0.25})
    found = difference(shifted)
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))


def test_undefined_resamples_are_left_out():
    labels = np.array([1, 0, 0, 0, 0, 0])
    found, undefined = intervals(
        calls({"original": np.arange(6.0)}, labels), resamples=400, confidence=0.9, seed=0,
        method="percentile",
    )  # fmt: skip
    assert undefined == pytest.approx((5 / 6) ** 6, abs=0.07)
    assert found["original"][0].low == 0


def test_the_ways_to_resample_agree():
    """Weights, repeated rows and sums are three ways to the same numbers."""
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 40)
    scores = {"original": rng.normal(size=40).round(1), "candidate": rng.normal(size=40).round(1)}
    units = rng.integers(0, 15, 40)
    units = np.unique(units, return_inverse=True)[1]
    quick = calls(scores, labels, units=units)
    slow = Calls("auc", auc, scores, labels, units, np.arange(40))
    counts = next(draws(int(units.max()) + 1, 30, 0))
    for name in scores:
        assert quick.values(counts)[name] == pytest.approx(slow.values(counts)[name], nan_ok=True)
    errors = {name: np.abs(values - labels) for name, values in scores.items()}
    fast = sums(errors, units)
    mean = Calls("mae", lambda p, y: np.mean(np.abs(p - y)), scores, labels, units, np.arange(40))
    swaps = rng.random((20, int(units.max()) + 1)) < 0.5
    for name in scores:
        assert fast.values(counts)[name] == pytest.approx(mean.values(counts)[name])
    assert fast.swapped("original", "candidate", swaps) == pytest.approx(
        mean.swapped("original", "candidate", swaps)
    )
    rows = np.flatnonzero(labels)
    assert fast.only(rows).point() == pytest.approx(mean.only(rows).point())


# --- slices ------------------------------------------------------------------------------------


def _alarms(make, trials):
    """Share of experiments in which any of 20 slices is named."""
    alarms = 0
    for trial in range(trials):
        scored, better = make(np.random.default_rng(100 + trial))
        count = len(scored.samples)
        slices = make_slices({"s": [f"v{i % 20}" for i in range(count)]}, 4)
        rows = slice_results(
            slices, {"m": scored}, {"m": better}, "candidate", level=0.05, seed=trial
        )
        assert len(rows) == 20
        alarms += any(row.harmed for row in rows)
    return alarms / trials


def test_noise_on_20_slices_raises_no_alarm():
    """Decisions flipped at random, as often either way: at most 5 % of experiments name a slice."""

    def flips(rng):
        right = rng.random(800) < 0.8
        flipped = rng.random(800) < 0.1
        again = np.where(flipped, rng.random(800) < 0.8, right)
        parts = {"original": right.astype(float), "candidate": again.astype(float)}
        return sums(parts), True

    assert _alarms(flips, 150) <= 0.08


def test_noise_of_scores_raises_no_alarm():
    """Both models see the same score with noise of their own; AUC and error."""

    def scores(rng):
        labels = rng.integers(0, 2, 600)
        common = labels + rng.normal(size=600)
        noisy = {name: common + rng.normal(size=600) * 0.3 for name in ("original", "candidate")}
        return calls(noisy, labels), True

    def errors(rng):
        common = rng.gamma(1.0, size=600)
        noisy = {name: common * rng.gamma(9.0, 1 / 9, 600) for name in ("original", "candidate")}
        return sums(noisy), False

    assert _alarms(scores, 60) <= 0.1
    assert _alarms(errors, 100) <= 0.09


def test_harm_is_found_in_both_directions_of_a_metric():
    rng = np.random.default_rng(0)
    error = rng.gamma(2.0, size=300)
    worse = error * np.where(np.arange(300) % 20 == 3, 2.0, rng.gamma(50, 1 / 50, 300))
    slices = make_slices({"s": [f"v{i % 20}" for i in range(300)]}, 4)
    scored = {"m": sums({"original": error, "candidate": worse})}
    rows = slice_results(slices, scored, {"m": False}, "candidate", level=0.05, seed=0)
    assert [row.name for row in rows if row.harmed] == ["s=v3"]
    assert rows[0].difference > 0
    mended = slice_results(slices, scored, {"m": True}, "candidate", level=0.05, seed=0)
    assert not any(row.harmed for row in mended)


def test_p_values_are_uniform_or_larger_without_harm():
    rng = np.random.default_rng(0)
    found = []
    for seed in range(200):
        values = rng.normal(size=(2, 40))
        scored = sums({"original": values[0], "candidate": values[1]})
        found.append(harm_test(scored, "candidate", True, 200, seed))
    found = np.array(found)
    for level in (0.05, 0.2, 0.4):
        assert (found <= level).mean() <= level + 3 * math.sqrt(level * (1 - level) / 200)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_values_of_slices():
    def names(values, bins=4):
        return {piece.value: int(piece.samples.sum()) for piece in make_slices({"s": values}, bins)}

    assert names(["a", "b", "a", None]) == {"a": 2, "b": 1}
    assert names([True, False, True]) == {"True": 2, "False": 1}
    assert names([1, 2, 2]) == {"1": 1, "2": 2}
    assert sum(names(list(np.linspace(0, 1, 40))).values()) == 40
    assert list(names(list(np.linspace(0, 1, 40)))) == [
        "0 to 0.25", "0.25 to 0.5", "0.5 to 0.75", "0.75 to 1"
    ]  # fmt: skip
    assert len(names([i % 20 for i in range(400)])) == 20  # whole numbers, many of each: not binned
    assert len(names(list(range(400)))) == 4
    assert names([{"cat", "dog"}, {"cat"}, set()]) == {"cat": 2, "dog": 1}
    assert names([1.0, float("nan"), 2.0]) == {"1": 1, "2": 1}
    rows = make_slices({"s": [np.array([0, 1, 1]), np.array([0, 0])]}, 4)
    assert [(piece.value, piece.rows.tolist()) for piece in rows] == [
        ("0", [True, False, False, True, True]),
        ("1", [False, True, True, False, False]),
    ]


# --- metrics against references ----------------------------------------------------------------


def test_metrics_equal_their_references():
    sklearn = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for trial in range(20):
        labels = rng.integers(0, 2, 50)
        scores = rng.normal(size=50).round(1) + labels * (trial % 3)
        expected = pytest.approx(sklearn.roc_auc_score(labels, scores))
        assert auc(scores, labels) == expected
        assert weighted_auc(scores, labels, np.ones((1, 50)))[0] == expected
        chosen = (scores > 0.5).astype(int)
        assert f1(chosen, labels) == pytest.approx(sklearn.f1_score(labels, chosen))
        numbers = rng.normal(size=50).round(1)
        assert spearman(scores, numbers) == pytest.approx(
            stats.spearmanr(scores, numbers).statistic
        )
        classes = rng.integers(0, 4, 50)
        rows = rng.dirichlet(np.ones(4), 50)
        expected = sklearn.roc_auc_score(classes, rows, multi_class="ovr")
        assert auc(rows, classes) == pytest.approx(expected)
        assert auc(np.log(rows) * 3 + 1, classes) == pytest.approx(
            sklearn.roc_auc_score(
                classes, rows**3 / (rows**3).sum(1, keepdims=True), multi_class="ovr"
            )
        )
        expected = sklearn.f1_score(classes, rows.argmax(1), average="macro")
        assert f1(rows, classes) == pytest.approx(expected)
        broken, mended = rng.integers(0, 12, 2)
        if broken + mended:
            exact = stats.binomtest(int(broken), int(broken + mended)).pvalue
            assert mcnemar(int(broken), int(mended)) == pytest.approx(exact)


def test_equal_error_rate():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert eer(np.arange(8.0), labels) == 0
    assert eer(np.array([0, 1, 2, 5, 3, 6, 7, 8.0]), labels) == pytest.approx(0.25)
    assert eer(-np.arange(8.0), labels) == pytest.approx(1)


def test_text_and_language():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance([], ["a", "b"]) == 2
    wer, cer, ppl = BUILTIN["wer"], BUILTIN["cer"], BUILTIN["perplexity"]
    assert wer.contribution("the cat sat", "the cat sat down") == (1, 4)
    assert cer.contribution("abc", "abd") == (1, 3)
    with pytest.raises(UsageError, match="not text"):
        wer.contribution(np.zeros(3), "a")
    scores = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])) + 4
    loss, count = ppl.contribution(scores[None], np.array([0, 1, -100]))
    assert (ppl.finish(loss / count), count) == (pytest.approx(2), 2)
    assert ppl.contribution(scores, np.array([0, 1]))[0] == pytest.approx(loss)
    assert ppl.contribution(np.exp(scores - 4), np.array([0, 1, -1]))[0] == pytest.approx(loss)


def test_calibration_error_of_known_bins():
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    right = np.array([True, True, True, False])
    assert calibration_error(confidence, right) == pytest.approx((0.1 + 0.1) / 4)


# --- metrics of other libraries ----------------------------------------------------------------


def _measured(metric, predictions, labels):
    one = resolve({"m": metric}, {})["m"]
    return float(one.call(np.asarray(predictions), np.asarray(labels)))


def test_scikit_learn_functions_as_they_are():
    m = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    logits = rng.normal(size=(60, 3)) + np.eye(3)[labels]
    chosen = logits.argmax(1)
    assert _measured(m.accuracy_score, logits, labels) == m.accuracy_score(labels, chosen)
    assert _measured(m.cohen_kappa_score, logits, labels) == m.cohen_kappa_score(labels, chosen)
    macro = functools.partial(m.f1_score, average="macro")
    assert _measured(macro, logits, labels) == m.f1_score(labels, chosen, average="macro")
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    one_rest = functools.partial(m.roc_auc_score, multi_class="ovr")
    expected = m.roc_auc_score(labels, shares, multi_class="ovr")
    assert _measured(one_rest, logits, labels) == pytest.approx(expected)
    assert _measured(m.log_loss, logits, labels) == pytest.approx(m.log_loss(labels, shares))
    yes = labels > 1
    single = logits[:, :1] + 3 * yes[:, None]
    for function in (m.roc_auc_score, m.average_precision_score):
        assert _measured(function, single, yes) == pytest.approx(function(yes, single[:, 0]))
    assert _measured(m.accuracy_score, single, yes) == m.accuracy_score(yes, single[:, 0] > 0)
    assert _measured(m.roc_auc_score, logits[:, :2], yes) == pytest.approx(
        m.roc_auc_score(yes, logits[:, 1] - logits[:, 0])
    )
    assert _measured(m.mean_squared_error, single, yes + 0.5) == pytest.approx(
        m.mean_squared_error(yes + 0.5, single[:, 0])
    )
    assert not resolve({"m": m.log_loss}, {})["m"].higher_is_better
    assert not resolve({"m": m.mean_squared_error}, {})["m"].higher_is_better
    assert resolve({"m": m.r2_score}, {})["m"].higher_is_better


class Torchlike:
    """The protocol of a torchmetrics object: batches are added up, `compute` is the value."""

    higher_is_better = False

    def __init__(self):
        self.reset()

    def reset(self):
        self.total, self.count = 0.0, 0

    def update(self, preds, target):
        self.total += float((preds - target).abs().sum())
        self.count += len(target)

    def compute(self):
        import torch

        return torch.tensor(self.total / self.count)


def test_torchmetrics_objects_as_they_are():
    pytest.importorskip("torch")
    metric = Torchlike()
    assert _measured(metric, [1.0, 2.0], [2.0, 4.0]) == 1.5
    assert _measured(metric, [1.0], [2.0]) == 1.0
    assert not resolve({"m": metric}, {})["m"].higher_is_better


def test_the_order_of_arguments_is_read_off_their_names():
    def first(predictions, labels):
        return float(np.mean(predictions))

    def last(y_true, y_score):
        return float(np.mean(y_score))

    assert _measured(first, [1.0], [2.0]) == _measured(last, [1.0], [2.0]) == 1.0
    assert _measured(lambda p: p.sum(), [1.0, 2.0], [0, 0]) == 3


def test_the_sign_of_a_limit_says_what_is_better():
    def better(limit):
        return resolve({"odd": lambda p, y: 0.0}, {"odd": limit})["odd"].higher_is_better

    assert better(-0.1)
    assert not better(0.1)
    assert better(">= 3")
    assert not better("<= 3")
    assert better("-1%")


def test_a_metric_that_is_a_built_in_one_is_recognised():
    m = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    scores = {"original": labels + rng.normal(size=60)}

    def quick(metric, given=scores):
        found = recognised(Calls("m", metric, given, labels, np.arange(60), np.arange(60)))
        return found.weighted is not None

    assert quick(lambda p, y: m.roc_auc_score(y, p))
    assert not quick(lambda p, y: m.average_precision_score(y, p))
    assert quick(lambda p, y: float(((p > 0) == y).mean()), given=scores)
    assert not quick(lambda p, y: float(((p > 0.1) == y).mean()))
    assert not quick(lambda p, y: 0.5)


def test_a_per_sample_metric_keeps_no_predictions():
    class Wide:
        def run(self, feed):
            return {"y": np.full((1, 1000), feed["i"], np.float32)}

    seen = []
    metric = PerSample(lambda prediction, label: (float(prediction.mean()), 2.0), np.sqrt)
    evaluation = Evaluation(
        data=({"i": np.array(i), "label": 0} for i in range(9)), metrics={"m": metric}
    )
    report = evaluation.run(Wide(), {"w": Wide()}, progress=lambda *now: seen.append(now))
    assert report.original.metrics["m"].value.value == pytest.approx(math.sqrt(4 / 2))
    assert seen[-1][:2] == (9, 9)
