"""Use 3: try every post-training variant worth trying, judge each on labelled data, ship one."""

import tempfile

from digits import build, data, train

import edgepass

net, (_, example) = train(), build()
training, test, _, test_labels = data()


def ink(feed, label, index):
    """How much is drawn: faint digits may suffer more than bold ones."""
    return float(feed["image"].mean())


result = edgepass.sweep(
    net,
    target="host",
    recipes="ptq",
    example_inputs=example,
    dynamic_shapes={"image": {0: "batch"}},
    calibration={"image": training[:100]},
    evaluate=edgepass.Evaluation(
        data={"image": test},
        labels=test_labels,
        metrics=["accuracy"],
        slices={"ink": ink, "digit": lambda feed, label, index: int(label)},
        limits={"accuracy": -0.01},
    ),
    time_budget_s=0.2,
)
print(result)

best = result.best()
print(f"\nto ship: {best.recipe}\nbecause: {best.reason}")
for why in best.misses:
    print(f"missed: {why}")

folder = result.save(tempfile.mkdtemp(prefix="edgepass-example-") + "/sweep")
print(f"saved in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
