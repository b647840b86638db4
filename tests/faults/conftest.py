"""A cluster, an object store and unbroken runs, once for all faults."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, os.path.dirname(__file__))  # pytest's import mode hides what lies beside
from fault_lab import Lab, open_lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Start everything, and run every stage once with nothing in its way."""
    with open_lab(tmp_path_factory.mktemp("faults")) as lab:
        yield lab
