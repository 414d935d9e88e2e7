"""Fixtures that more than one test file uses."""

from __future__ import annotations

import pytest

from edgepass.errors import MissingDependencyError
from edgepass.targets.emulator import Emulator, find_emulator


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """The emulated arm64 machine; the test is skipped, saying why, where it is not set up."""
    try:
        return find_emulator()
    except MissingDependencyError as error:
        pytest.skip(" ".join(str(error).split()))
