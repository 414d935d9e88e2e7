"""What compression did to a model: metrics on real data, the original beside its candidates."""
