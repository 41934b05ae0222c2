import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(autouse=True)
def compile_only_where_it_matters(request, monkeypatch):
    """The neuron is compiled in the tests of the neuron and where networks learn. Elsewhere, and in the processes that tests start,
    the same code runs uncompiled: a compilation costs seconds, and what is tested there does not depend on it."""
    if request.module.__name__ != "test_lif" and not request.node.name.startswith("test_a_small_batch_can_be_learned"):
        monkeypatch.setattr("lif.compiled.enabled", False)
        monkeypatch.setenv("BADSNN_COMPILE", "0")
