"""Devices: what they are, what they run, and how a graph becomes something they execute."""
