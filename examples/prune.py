"""Use 4: make a model physically smaller, without training, as far as its accuracy allows."""

from digits import build, data, train

import edgepass

net, (_, example) = train(), build()
training, test, _, test_labels = data()
shapes = {"example_inputs": example, "dynamic_shapes": {"image": {0: "batch"}}}
samples = {"image": training[:100]}

# Where could it be pruned, and where would it hurt?
print(edgepass.prune_scan(net, calibration=samples, **shapes))

# As much as half a percent of accuracy allows.
judge = edgepass.Evaluation(
    data={"image": test}, labels=test_labels, metrics=["accuracy"], limits={"accuracy": -0.005}
)
found = edgepass.prune(
    net, calibration=samples, evaluation=judge, step=0.1, most=0.7, time_budget_s=0.1, **shapes
)
print(f"\n{found}")
print(f"\nto compile: {found.recipe}")
