"""The house: who imports whom, how large everything may be, and what readers rely on: names, pages, notebooks."""
import ast
import importlib
import inspect
import json
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = dict(badsnn=320, lif=190, models=210, trigger=270, data=150, settings=160)        # lines, at most
FLOORS = ({"lif", "data"}, {"models"}, {"trigger", "settings"}, {"badsnn"})
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for folder in (".", "kit", "lab") for path in sorted((ROOT / folder).glob("*.py"))
           if path.stem not in ("__init__", "__main__")}


def imports_of(path):
    """Our own modules that a file imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written in full"
            names = [node.module] + [f"{node.module}.{name}" for name in names]
        found |= {name for name in names if name in MODULES or name in ("kit", "lab")}
    return found - {"kit"}


def test_the_architecture():
    """kit imports nothing of ours but kit; the six top files kit and one another downward; nothing but lab imports lab.
    No circle."""
    assert {name for name in MODULES if "." not in name} == set(GROUND) == set().union(*FLOORS)
    graph, below = {name: imports_of(path) for name, path in MODULES.items()}, set()
    for floor in FLOORS:
        for name in floor:
            assert {other for other in graph[name] if not other.startswith("kit.")} <= below, name
        below |= floor
    for name, others in graph.items():
        if name.startswith("kit."):
            assert all(other.startswith("kit.") for other in others), name
        if not name.startswith("lab."):
            text = MODULES[name].read_text().split('if __name__ == "__main__":')
            assert not re.search(r"runpy|importlib|__import__", text[0]), f"{name} imports what this test cannot see"
    assert 'runpy.run_module("lab", run_name="__main__")' in (ROOT / "badsnn.py").read_text().split("__main__", 1)[1]
    list(TopologicalSorter(graph).static_order())


def lines(*patterns):
    return {path: path.read_text().splitlines() for pattern in patterns for path in ROOT.glob(pattern)}


def test_lines_are_narrow_and_the_training_is_short():
    ground, others = lines("*.py"), lines("kit/*.py", "lab/*.py", "tests/*.py")
    assert [f"{path}:{i + 1}" for files, most in ((ground, 100), (others, 120))
            for path, text in files.items() for i, line in enumerate(text) if len(line) > most] == []
    assert len(inspect.getsourcelines(thing("badsnn.train"))[0]) <= 45


def total(*patterns):
    return sum(len(text) for text in lines(*patterns).values())


def test_the_ground_floor_and_the_tests_are_small():
    assert {name: n for name in GROUND if (n := total(f"{name}.py")) > GROUND[name]} == {}
    assert total("*.py") <= 1300 and total("tests/*.py") <= 3300


@pytest.mark.xfail(strict=True, reason="not met yet, and not raised: see the numbers on the left")
def test_the_other_rooms_are_small():
    found = total("kit/*.py"), total("lab/*.py"), total("*.py", "kit/*.py", "lab/*.py")
    assert all(n <= most for n, most in zip(found, (520, 1950, 3750))), found


# ----- Names

PUBLIC = """lif.LIF lif.PLIF lif.lif_reference lif.neurons lif.count_spikes models.build_model models.resnet19
models.vgg16 models.NMNISTNet trigger.power_trigger trigger.spike_trigger trigger.deepfool trigger.adaptive_blend
trigger.UNet data.load data.poison_indices badsnn.train lab.baselines.badnets lab.baselines.blend lab.baselines.wanet
lab.baselines.clean_label lab.baselines.static lab.baselines.moving lab.baselines.flashy lab.baselines.pgd
lab.defenses.fine_tune lab.defenses.clp lab.defenses.anp lab.defenses.tsbd lab.defenses.nad lab.detectors.strip
lab.detectors.spike_deviation lab.detectors.threshold_scan""".split()
SIGNATURES = """lif.LIF v_thr tau; lif.PLIF v_thr; lif.lif_reference x_seq v_thr tau; lif.neurons model v_thr tau;
lif.count_spikes model x; models.build_model name num_classes T width neuron mean std; data.load name root;
trigger.power_trigger x q mean std renormalize; trigger.spike_trigger frames beta generator;
trigger.deepfool model x num_classes max_iter overshoot; badsnn.train data s attack poison; badsnn.attack data s;
badsnn.evaluate model data s v_thr tau; badsnn.asr model data s v_thr tau; badsnn.choose rows base_ca margin;
badsnn.deploy model data s; lab.defenses.restore model; settings.preset dataset changes"""


def thing(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_public_names_carry_shapes_and_sources():
    source = r"Sec\. \d|Eqs?\. \d|Fig\. \d|et al\.|\([A-Z][a-z]+ and [A-Z][a-z]+ \d{4}\)|SEENN|ours"
    for name in PUBLIC:
        found = thing(name)
        text = inspect.getdoc(found) + (inspect.getdoc(found.forward) or "" if inspect.isclass(found) else "")
        assert re.search(r"\[[A-Z]", text), f"{name}: no shape such as [B, C, H, W]"
        assert re.search(source, text) or name == "data.load", f"{name}: no source"


def test_signatures_that_others_rely_on():
    for signature in SIGNATURES.split(";"):
        name, *wanted = signature.split()
        assert list(inspect.signature(thing(name)).parameters)[:len(wanted)] == wanted, name


# ----- Pages and notebooks

def test_what_the_pages_name_exists():
    """Links, files of the code, options of the command line."""
    pages = [page for pattern in ("*.md", "results/*.md", "notebooks/*.md", "docs/*.md") for page in ROOT.glob(pattern)]
    known = set(re.findall(r'"(--[a-z][a-z-]+)"', (ROOT / "lab/cli.py").read_text()))
    known |= {"--help", "--no-flip", *map(thing("settings.flag"), thing("settings.KNOBS"))}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)
        for name in set(re.findall(r"`((?:kit/|lab/|tests/)?\w+\.py)`", text)):
            assert any((folder / name).exists() for folder in (ROOT, page.parent)), (page.name, name)
        options = set(re.findall(r"(?<!-)--[a-z][a-zA-Z-]+", " ".join(re.findall(r"badsnn\.py[^\n`]*", text))))
        assert options <= known, (page.name, options - known)


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_as_promised(path):
    """Executed, without errors, small, short cells, learning goals, summary, exercises, no traces of a machine."""
    text, notebook = path.read_text(), json.loads(path.read_text())
    assert len(text) < 1_000_000 and str(ROOT) not in text and "/home/" not in text
    prose = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    assert all(part in prose for part in ("You will learn", "Paper:", "## Summary", "## Exercises"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert len("".join(cell["source"]).splitlines()) <= 15
            assert cell["execution_count"], "execute the notebook before committing it"
            assert not any(output["output_type"] == "error" or output.get("name") == "stderr"
                           for output in cell["outputs"])
