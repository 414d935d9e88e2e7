"""Fixtures that more than one test file uses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edgepass.errors import MissingDependencyError
from edgepass.targets.emulator import Emulator, find_emulator


@pytest.fixture(scope="session", autouse=True)
def _no_profiles_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was calibrated on this machine changes no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPASS_PROFILES", str(tmp_path_factory.mktemp("profiles")))
        yield


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """The emulated arm64 machine; the test is skipped, saying why, where it is not set up."""
    try:
        return find_emulator()
    except MissingDependencyError as error:
        pytest.skip(" ".join(str(error).split()))
