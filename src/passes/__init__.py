"""Passes: transformations of the graph, the driver that runs them, and their names."""
