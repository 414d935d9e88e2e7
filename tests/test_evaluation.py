"""Evaluation end to end: every kind of data, metrics of any library, planted answers."""

import json

import numpy as np
import onnx_ir as ir
import pytest

import edgepass
from edgepass import Evaluation
from edgepass.errors import UsageError
from edgepass.evaluation.runners import Remembered

LINEAR = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[N, 3] logits)
<float[4, 3] w = {1.0, 0.0, -1.0, 0.5, 1.0, 0.0, -0.5, 0.25, 1.0, 0.0, -1.0, 0.5}>
{ logits = MatMul(x, w) }
"""
RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype(np.float32)
WEIGHT = np.array([[1, 0, -1], [0.5, 1, 0], [-0.5, 0.25, 1], [0, -1, 0.5]], np.float32)
LABELS = np.argmax(X @ WEIGHT, axis=1)


@pytest.fixture(scope="module")
def model():
    return ir.from_onnx_text(LINEAR)


class Scores:
    """Gives for sample `i` what it was made with."""

    def __init__(self, *outputs):
        self.outputs = outputs
        self.runs = 0

    def run(self, feed):
        self.runs += 1
        return {"scores": self.outputs[int(feed["i"])]}


def indices(count):
    return [{"i": np.array(i)} for i in range(count)]


def one_hot(*classes):
    return [np.eye(3, dtype=np.float32)[c][None] for c in classes]


# --- every kind of data ------------------------------------------------------------------------


def _generator():
    yield from zip(X, LABELS, strict=True)


class _Dataset:
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        if index >= len(X):
            raise IndexError
        return X[index], LABELS[index]


DATA = {
    "feed, label": [({"x": row[None]}, int(y)) for row, y in zip(X, LABELS, strict=True)],
    "tuples": [(row[None], y) for row, y in zip(X, LABELS, strict=True)],
    "without batch axis": list(zip(X, LABELS, strict=True)),
    "labels in the feed": [{"x": x[None], "label": y} for x, y in zip(X, LABELS, strict=True)],
    "stacks": {"x": X, "labels": LABELS},
    "stacks with a batch axis": {"x": X[:, None], "y": LABELS},
    "function": _generator,
    "iterator": _generator(),
    "dataset": _Dataset(),
    "batches": lambda: ((X[i : i + 7], LABELS[i : i + 7]) for i in range(0, 60, 7)),
}


@pytest.mark.parametrize("kind", DATA)
def test_data_of_any_kind(model, kind):
    batched = True if kind == "batches" else None
    report = edgepass.evaluate(model, {"same": model}, DATA[kind], batched=batched)
    assert report.samples == 60
    assert report.original.metrics["accuracy"].value.value == 1
    assert report["same"].metrics["accuracy"].difference.value == 0


def test_labels_apart(model):
    feeds = [{"x": row[None]} for row in X]
    for labels in (LABELS, LABELS.tolist(), iter(LABELS)):
        report = edgepass.evaluate(model, [model], feeds, labels)
        assert report.original.metrics["accuracy"].value.value == 1
    stacks = {"x": X, "truth": LABELS}
    report = edgepass.evaluate(model, model, stacks, "truth")
    assert report.original.metrics["accuracy"].value.value == 1


def test_npz_and_folders(model, tmp_path):
    np.savez(tmp_path / "data.npz", x=X, labels=LABELS)
    (tmp_path / "flat").mkdir()
    for i in range(60):
        np.savez(tmp_path / "flat" / f"{i:03}.npz", x=X[i][None], label=LABELS[i])
        folder = tmp_path / "classes" / f"class{LABELS[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{i}.npz", x=X[i][None])
    for place in ("data.npz", "flat", "classes"):
        report = edgepass.evaluate(model, model, tmp_path / place)
        assert report.original.metrics["accuracy"].value.value == 1, place
    with pytest.raises(UsageError, match="not a .npz"):
        edgepass.evaluate(model, model, tmp_path / "none.npz")


def test_a_torch_loader_is_split_into_samples(model):
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    pairs = TensorDataset(torch.from_numpy(X), torch.from_numpy(LABELS))
    for loader in (DataLoader(pairs, batch_size=16), DataLoader(pairs, batch_size=None)):
        report = edgepass.evaluate(model, model, loader)
        assert report.samples == 60
        assert report.original.metrics["accuracy"].value.value == 1


def test_models_of_any_kind(model, tmp_path):
    torch = pytest.importorskip("torch")
    net = torch.nn.Linear(4, 3, bias=False)
    net.weight.data = torch.from_numpy(WEIGHT.T.copy())
    ir.save(model, tmp_path / "model.onnx")
    compiled = edgepass.compile(model, "x86_64", time_budget_s=0)
    compiled.save(tmp_path / "out")
    same = np.array([[1, 0, -1], [0.5, 1, 0], [-0.5, 0.25, 1], [0, -1, 0.5]])
    candidates = {
        "path": str(tmp_path / "model.onnx"),
        "folder": tmp_path / "out",
        "compiled": compiled,
        "artifact": edgepass.load(tmp_path / "out"),
        "torch": net,
        "function": lambda feed: {"logits": (feed["x"] @ same).astype(np.float32)},
    }
    report = edgepass.evaluate(model, candidates, {"x": X, "y": LABELS})
    for name in candidates:
        assert report[name].divergence["logits"].agreement == 1, name
        assert report[name].divergence["logits"].sqnr_db > 80, name
    assert report["path"].bytes == (tmp_path / "model.onnx").stat().st_size
    assert report["folder"].bytes > 0


def test_data_is_read_once_one_sample_at_a_time():
    alive, most = 0, 0

    class Big(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def data():
        nonlocal alive, most
        for i in range(50):
            alive += 1
            most = max(most, alive)
            yield {"i": np.array(i), "big": np.zeros(4).view(Big)}, i % 3

    scores = Scores(*one_hot(*(i % 3 for i in range(50))))
    report = Evaluation(data=data, metrics=["accuracy"]).run(scores, {"a": scores, "b": scores})
    assert report.samples == 50
    assert most <= 3


def test_mistakes_are_named(model):
    feeds = [{"x": row[None]} for row in X]
    with pytest.raises(UsageError, match="60 samples and 59 labels|More than 59 samples"):
        edgepass.evaluate(model, model, feeds, LABELS[:59])
    with pytest.raises(UsageError, match="60 samples and 61 labels"):
        edgepass.evaluate(model, model, feeds, [*LABELS, 0])
    with pytest.raises(UsageError, match="There is no sample"):
        edgepass.evaluate(model, model, [])
    used = iter(feeds)
    edgepass.evaluate(model, model, used)
    with pytest.raises(UsageError, match="read only once"):
        edgepass.evaluate(model, model, used)
    with pytest.raises(UsageError, match="needs labels"):
        edgepass.evaluate(model, model, feeds, metrics=["accuracy"])
    with pytest.raises(UsageError, match="no built-in metric 'acuracy'"):
        edgepass.evaluate(model, model, feeds, LABELS, metrics=["acuracy"])
    with pytest.raises(UsageError, match="'broken' failed") as caught:
        edgepass.evaluate(model, model, feeds, LABELS, metrics={"broken": lambda p, y: 1 / 0})
    assert "float32[60, 3]" in str(caught.value)
    with pytest.raises(UsageError, match="no output 'q'"):
        edgepass.evaluate(model, model, feeds, LABELS, output="q")
    with pytest.raises(UsageError, match="not measured"):
        edgepass.evaluate(model, model, feeds, LABELS, limits={"auc": -0.1})
    with pytest.raises(UsageError, match="can't be read"):
        edgepass.evaluate(model, model, feeds, LABELS, limits={"accuracy": "a bit"})


# --- answers known by hand ---------------------------------------------------------------------


def test_accuracy_and_flips():
    original = Scores(*one_hot(0, 1, 2, 1))
    worse = Scores(*one_hot(0, 2, 1, 0))
    report = edgepass.evaluate(
        original, {"same": original, "worse": worse}, indices(4), [0, 1, 2, 0]
    )
    values = [rung.metrics["accuracy"].value.value for rung in report.rungs]
    assert values == [0.75, 0.75, 0.5]
    flips = report["worse"].flips
    assert (flips.broken, flips.mended, flips.decisions) == (2, 1, 4)
    assert flips.p_value == pytest.approx(1.0)
    assert report["worse"].divergence["scores"].agreement == 0.25
    assert report["worse"].divergence["scores"].worst == 1
    assert "2 broken, 1 mended" in str(report)
    assert report.table().row_count == 3


def test_an_equal_candidate_has_no_difference_and_is_within():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 200)
    runner = Scores(*[np.array([s], np.float32) for s in labels + rng.normal(size=200)])
    evaluation = Evaluation(
        data=indices(200),
        labels=labels,
        metrics=["auc", "accuracy", "f1", "eer"],
        slices={"third": [i % 3 for i in range(200)]},
        limits={"auc": 0, "accuracy": -0.001, "eer": 0, "sqnr_db": ">= 60", "harmed_slices": "<=0"},
        confident=True,
    )
    report = evaluation.run(runner, {"same": runner})
    for metric in report["same"].metrics.values():
        change = metric.difference
        assert (change.value, change.low, change.high) == (0, 0, 0)
    assert report.verdict("same") == "within"
    assert report["same"].divergence["scores"].sqnr_db == np.inf
    assert report["same"].harmed == ()
    assert (report["same"].flips.broken, report["same"].flips.mended) == (0, 0)
    assert report.regressed == ()


def test_limits_and_their_verdicts():
    labels = [0] * 100
    original = Scores(*one_hot(*[0] * 100))
    worse = Scores(*one_hot(*[1] * 4, *[0] * 96))

    def verdict(limits, confident=False):
        evaluation = Evaluation(
            data=indices(100),
            labels=labels,
            metrics=["accuracy"],
            limits=limits,
            confident=confident,
        )
        return evaluation.run(original, {"worse": worse}).verdict("worse")

    assert verdict({}) == "no limits"
    assert verdict({"accuracy": -0.04}) == "within"
    assert verdict({"accuracy": "-4%"}) == "within"
    assert verdict({"accuracy": -0.039}) == "exceeds"
    assert verdict({"accuracy": ">= 0.96"}) == "within"
    assert verdict({"accuracy": ">= 0.97"}) == "exceeds"
    assert verdict({"accuracy": -0.04}, confident=True) == "cannot tell"
    assert verdict({"accuracy": -0.2}, confident=True) == "within"
    assert verdict({"accuracy": -0.001}, confident=True) == "exceeds"
    assert verdict({"broken": "<= 0.04", "agreement": ">= 0.96"}) == "within"
    assert verdict({"accuracy": -0.5, "broken": "<= 0.03"}) == "exceeds"


def test_limits_can_be_judged_again():
    original, worse = Scores(*one_hot(*[0] * 50)), Scores(*one_hot(1, *[0] * 49))
    report = edgepass.evaluate(original, {"worse": worse}, indices(50), [0] * 50)
    strict = Evaluation(data=[], limits={"accuracy": -0.01})
    assert strict.judge(report).verdict("worse") == "exceeds"
    assert (
        Evaluation(data=[], limits={"accuracy": -0.02}).judge(report).verdict("worse") == "within"
    )


def test_the_harmed_slice_is_named_and_no_other():
    rng = np.random.default_rng(3)
    count = 1200
    labels = rng.integers(0, 2, count)
    speaker = rng.integers(0, 12, count)
    loud = rng.normal(size=count)
    scores = labels + rng.normal(size=count) * 0.7
    noisy = scores + rng.normal(size=count) * 0.02
    harmed = np.where(speaker == 5, rng.permutation(scores), noisy)
    evaluation = Evaluation(
        data=indices(count),
        labels=labels,
        metrics=["auc", "accuracy"],
        slices={
            "speaker": [f"s{value}" for value in speaker],
            "loudness": lambda feed, label, index: loud[index],
            "half": lambda feed: "low" if feed["i"] < count / 2 else "high",
        },
    )
    runners = [Scores(*values[:, None].astype(np.float32)) for values in (scores, noisy, harmed)]
    report = evaluation.run(runners[0], {"noisy": runners[1], "harmed": runners[2]})
    assert report["noisy"].harmed == ()
    assert {row.name for row in report["harmed"].harmed} == {"speaker=s5"}
    worst = report["harmed"].worst_slice
    assert (worst.name, worst.count) == ("speaker=s5", int((speaker == 5).sum()))
    assert worst.difference < -0.2
    explained = {row.explained_by for row in report["harmed"].slices if row.explained_by}
    assert explained <= {"speaker=s5"}
    assert len([row for row in report["harmed"].slices if row.slice == "loudness"]) == 8
    assert report.slice_table().row_count == 20


def test_calibration_error_where_outputs_are_probabilities():
    confident = [np.array([[0.9, 0.1]], np.float32)] * 10
    labels = [0] * 6 + [1] * 4  # says 0.9, is right 0.6 of the time
    report = edgepass.evaluate(Scores(*confident), {}, indices(10), labels)
    assert report.original.ece == pytest.approx(0.3, abs=1e-6)
    logits = [np.log(p) + 3 for p in confident]
    assert edgepass.evaluate(Scores(*logits), {}, indices(10), labels).original.ece is None
    softmaxed = edgepass.evaluate(Scores(*logits), {}, indices(10), labels, logits=True)
    assert softmaxed.original.ece == pytest.approx(0.3, abs=1e-6)


def test_divergence_without_labels():
    p = np.array([[0.5, 0.5]]), np.array([[0.75, 0.25]])
    report = edgepass.evaluate(Scores(p[0], p[0]), {"q": Scores(p[1], p[0])}, indices(2))
    found = report["q"].divergence["scores"]
    kl = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert found.kl == pytest.approx(kl / 2)
    assert found.sqnr_db == pytest.approx(10 * np.log10(1.0 / 0.125))
    assert report["q"].metrics == {}
    assert report["q"].verdict == "no limits"
    text = edgepass.evaluate(Scores("ab"), {"q": Scores("ac")}, indices(1), predict=lambda o: "x")
    assert text["q"].divergence["scores"].sqnr_db == -np.inf


def test_several_outputs_and_a_metric_of_all():
    class Two:
        def __init__(self, shift):
            self.shift = shift

        def run(self, feed):
            value = feed["i"].astype(np.float32)
            return {"a": value[None], "b": value[None] * 2 + self.shift}

    def gap(outputs, labels):
        return float(np.mean(outputs["b"] - outputs["a"] - labels))

    report = edgepass.evaluate(
        Two(0), {"shifted": Two(3)}, indices(8), np.arange(8.0), metrics={"gap": gap, "mae": "mae"}
    )
    assert report["shifted"].metrics["gap"].difference.value == pytest.approx(3)
    assert report["shifted"].metrics["mae"].difference.value == 0
    assert report["shifted"].divergence["a"].sqnr_db == np.inf
    assert report["shifted"].divergence["b"].worst > 1
    chosen = edgepass.evaluate(
        Two(0), {"s": Two(3)}, indices(8), 2 * np.arange(8.0), metrics=["mae"], output="b"
    )
    assert chosen["s"].metrics["mae"].value.value == pytest.approx(3)


def test_labels_of_any_shape_for_a_metric_of_ones_own():
    boxes = [[[0, 0, 1]], [], [[1, 1, 2], [2, 2, 3]]]
    found = [np.zeros((k, 4), np.float32) for k in (1, 2, 2)]
    for labels in (boxes, [{"boxes": np.array(b)} for b in boxes]):
        report = edgepass.evaluate(
            Scores(*found),
            {"same": Scores(*found)},
            indices(3),
            labels,
            metrics={
                "boxes": lambda predictions, labels: sum(map(len, predictions)),
                "labels": lambda predictions, labels: len(labels),
            },
            resamples=20,
        )
        assert report.original.metrics["boxes"].value.value == 5
        assert report.original.metrics["labels"].value.value == 3
        assert report["same"].flips is None


# --- stateful ----------------------------------------------------------------------------------

CUMULATIVE = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[1] x, float[1] state) => (float[1] y, float[1] stateN)
{ stateN = Add(x, state)  y = Identity(stateN) }
"""


def test_a_state_is_carried_from_step_to_step():
    model = ir.from_onnx_text(CUMULATIVE)
    rng = np.random.default_rng(0)
    lengths = [3, 5, 1, 4]
    recordings = [rng.normal(size=(n, 1)).astype(np.float32) for n in lengths]
    sums = [np.cumsum(one) for one in recordings]
    as_arrays = [({"x": one}, total) for one, total in zip(recordings, sums, strict=True)]
    as_steps = [
        ([{"x": x} for x in one], total) for one, total in zip(recordings, sums, strict=True)
    ]

    def step(run, sequence):
        state, found = np.zeros(1, np.float32), []
        for x in sequence["x"]:
            outputs = run({"x": x, "state": state})
            state = outputs["stateN"]
            found.append({"y": outputs["y"]})
        return found

    for data, how in (
        (as_arrays, {"carry": {"stateN": "state"}}),
        (as_steps, {"carry": {"stateN": "state"}}),
        (as_arrays, {"step": step}),
    ):
        seen = []

        def error(predictions, labels, seen=seen):
            seen.append(predictions.shape)
            return float(np.abs(predictions - labels).max())

        report = edgepass.evaluate(model, {"same": model}, data, metrics={"error": error}, **how)
        assert report.original.metrics["error"].value.value < 1e-5
        assert seen[0] == (13,)  # steps end to end
        assert (report.samples, report.units) == (4, 4)


def test_the_first_state_can_be_given():
    model = ir.from_onnx_text(CUMULATIVE)
    data = [
        (
            {"x": np.ones((3, 1), np.float32), "state": np.full(1, 10, np.float32)},
            np.arange(11, 14.0),
        )
    ]
    report = edgepass.evaluate(model, {}, data, metrics=["mae"], carry={"stateN": "state"})
    assert report.original.metrics["mae"].value.value == 0
    with pytest.raises(UsageError, match="no output 'h' to carry"):
        edgepass.evaluate(model, {}, data, carry={"h": "state"})


def test_stacks_of_sequences_and_entries_for_slices(tmp_path):
    model = ir.from_onnx_text(CUMULATIVE)
    steps = np.ones((6, 4, 1), np.float32)
    totals = np.cumsum(steps[..., 0], axis=1)
    np.savez(tmp_path / "s.npz", x=steps, labels=totals, speaker=np.arange(6) % 2)
    report = edgepass.evaluate(
        model,
        {"same": model},
        tmp_path / "s.npz",
        metrics=["mae"],
        slices={"speaker": "speaker"},
        carry={"stateN": "state"},
    )
    assert report.original.metrics["mae"].value.value == 0
    assert {row.name: row.count for row in report["same"].slices} == {
        "speaker=0": 3,
        "speaker=1": 3,
    }


def test_pairs_of_recordings_by_a_step(model):
    """Speaker verification: two runs and a cosine make one score."""

    def cosine(run, pair):
        a, b = (run({"x": one[None]})["logits"][0] for one in pair)
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    pairs = [((X[i], X[i] * (2 if i % 2 else -1)), i % 2) for i in range(20)]
    report = edgepass.evaluate(
        model, {"same": model}, pairs, metrics=["eer", "auc"], step=cosine, resamples=50
    )
    assert report.original.metrics["eer"].value.value == 0
    assert report.original.metrics["auc"].value.value == 1
    assert report["same"].metrics["eer"].difference.value == 0


# --- results -----------------------------------------------------------------------------------


def test_json_there_and_back_and_merging():
    original = Scores(*one_hot(0, 1, 2, 1) * 5)
    worse = Scores(*one_hot(0, 2, 1, 0) * 5)
    evaluation = Evaluation(
        data=indices(20),
        labels=[0, 1, 2, 0] * 5,
        slices={"half": [i // 10 for i in range(20)]},
        limits={"accuracy": -0.1},
    )
    report = evaluation.run(original, {"same": original, "worse": worse})
    text = json.dumps(report.as_dict(), allow_nan=False)
    assert edgepass.Report.from_dict(json.loads(text)) == report
    assert json.loads(text)["schema_version"] == 1
    parts = [evaluation.run(original, {n: m}) for n, m in (("same", original), ("worse", worse))]
    assert edgepass.Report.merge(parts).rungs == report.rungs
    with pytest.raises(UsageError, match="not a report"):
        edgepass.Report.from_dict({"schema": "other"})
    with pytest.raises(UsageError, match="No model 'x'"):
        report["x"]


def test_results_repeat():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 80)
    one, other = (Scores(*(labels + rng.normal(size=80))[:, None]) for _ in range(2))
    evaluation = Evaluation(data=indices(80), labels=labels, metrics=["auc"])
    assert evaluation.run(one, {"b": other}) == evaluation.run(one, {"b": other})


def test_fingerprint_is_of_the_content():
    def made(shift=0, **options):
        def metric(predictions, labels):
            return float(np.mean(predictions - labels) + shift)

        values = {"data": indices(5), "labels": [1, 2, 3, 4, 5], "metrics": {"m": metric}}
        return Evaluation(**{**values, **options}).fingerprint()

    assert made() == made()
    assert made(limits={"m": -1}) == made(limits={"m": -2}, confident=True)
    others = [
        made(shift=1),
        made(labels=[1, 2, 3, 4, 6]),
        made(data=[{"i": np.array(9)}, *indices(4)]),
        made(metrics={"m": "mae"}),
        made(slices={"s": [1, 1, 2, 2, 2]}),
        made(resamples=10),
        made(predict=lambda outputs: 1),
    ]
    assert len({made(), *others}) == len(others) + 1


def test_an_iterator_that_was_hashed_can_be_read_again(model):
    evaluation = Evaluation(data=iter(DATA["tuples"]), metrics=["accuracy"])
    assert evaluation.fingerprint() == evaluation.fingerprint()
    assert evaluation.run(model, {}).samples == evaluation.run(model, {}).samples == 60


def test_stacks_are_hashed_with_what_belongs_to_them(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, labels=LABELS, rate=np.array(16000))
    np.savez(tmp_path / "b.npz", x=X, labels=LABELS[::-1], rate=np.array(16000))
    prints = [Evaluation(data=tmp_path / f"{name}.npz").fingerprint() for name in "ab"]
    stacks = {"x": X, "labels": LABELS, "rate": np.array(16000)}
    assert Evaluation(data=stacks).fingerprint() == prints[0] != prints[1]


def test_a_remembered_runner_runs_once(tmp_path):
    for folder in (None, tmp_path / "cache"):
        runner = Scores(*one_hot(0, 1, 2))
        kept = Remembered(runner, folder)
        for _ in range(2):
            report = edgepass.evaluate(kept, {"same": kept}, indices(3), [0, 1, 2])
            assert report.original.metrics["accuracy"].value.value == 1
        assert runner.runs == 3
    again = Remembered(Scores(), tmp_path / "cache")
    assert edgepass.evaluate(again, {}, indices(3), [0, 1, 2]).samples == 3


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    original, worse = Scores(*one_hot(*[0] * 40)), Scores(*one_hot(1, *[0] * 39))
    report = edgepass.evaluate(
        original,
        {"w$o$rse": worse},
        indices(40),
        [0] * 40,
        slices={"half": [i // 20 for i in range(40)]},
    )
    saved = report.save_plots(tmp_path / "plots")
    assert [path.name for path in saved] == ["metrics.png", "slices.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in saved)


def test_the_pareto_front():
    from edgepass.evaluation.plots import Point, mark_front, pareto_plot
    from edgepass.evaluation.report import Estimate

    points = [Point(n, x, Estimate(y)) for n, x, y in (("a", 1, 0.5), ("b", 2, 0.9), ("c", 3, 0.8))]
    front = mark_front(points, higher_is_better=True)
    assert [point.name for point in front if point.front] == ["a", "b"]
    front = mark_front(points, higher_is_better=False)
    assert [point.name for point in front if point.front] == ["a"]
    assert callable(pareto_plot)


def test_the_name_is_a_function_whatever_was_imported_before():
    import edgepass.evaluation.evaluation

    assert callable(edgepass.evaluate)
