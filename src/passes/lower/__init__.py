"""Passes of the last stage: the forms that a runtime executes."""
