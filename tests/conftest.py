import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(autouse=True)
def compile_only_where_it_matters(request, monkeypatch):
    """The neuron is compiled in the tests of the neuron, of the networks, and of one whole attack. Elsewhere, and in the processes
    that tests start, the same code runs uncompiled: a compilation costs seconds, and what is tested there does not depend on it."""
    if request.module.__name__ not in ("test_lif", "test_models") and request.node.name != "test_attack_end_to_end":
        monkeypatch.setattr("lif.compiled.enabled", False)
        monkeypatch.setenv("BADSNN_COMPILE", "0")
