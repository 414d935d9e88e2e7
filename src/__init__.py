"""edgepass: a model-conversion compiler pass framework for on-device machine learning."""
