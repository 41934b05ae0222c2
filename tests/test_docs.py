"""What readers rely on: public names with docstrings that give shapes and sources, the README's names, the
notebooks' form."""
import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path

import baselines
import defenses
import figures
import fused
import libraries
import machine
import pytest
import report
import runs
import scan
import studies
import tables

import badsnn
import data
import lif
import models
import settings
import trigger

ROOT = Path(badsnn.__file__).parent
MODULES = {module.__name__: module for module in (badsnn, baselines, data, defenses, figures, fused, libraries, lif,
                                                  machine, models, report, runs, scan, settings, studies, tables,
                                                  trigger)}
LINES = dict(lif=210, libraries=80, scan=340, fused=250, models=220, data=305, baselines=240, trigger=300,
             defenses=454, badsnn=455, studies=493, report=150, tables=242, figures=310, settings=313, runs=231,
             machine=220)       # at most
FLOORS = [{"fused", "libraries"}, {"lif"}, {"models"}, {"settings", "machine"}, {"runs"}, {"data"}, {"baselines"},
          {"trigger", "defenses"}, {"badsnn"}, {"studies"}, {"scan"}, {"tables"},
          {"figures"}, {"report"}]


def imports_of(path):
    """Our own modules that a file imports at its top."""
    lines = (ast.get_source_segment(path.read_text(), node) for node in ast.parse(path.read_text()).body
             if isinstance(node, ast.Import | ast.ImportFrom))
    return {word for line in lines for word in re.findall(r"\w+", line.split(" import ")[0]) if word in MODULES}


def test_imports_go_one_way():
    """Every module imports only from the floors below its own, or from a neighbour on its floor that does not
    import it."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert set(floor) == set(MODULES) == set(LINES)
    for name in MODULES:
        for other in imports_of(ROOT / f"{name}.py"):
            assert floor[other] < floor[name] or (
                floor[other] == floor[name] and name not in imports_of(ROOT / f"{other}.py")), (name, other)


@pytest.mark.parametrize("name", LINES)
def test_a_file_is_read_in_one_sitting(name):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    assert len(lines) <= LINES[name] and max(map(len, lines)) <= 120


def test_the_whole_is_small():
    assert sum(len(path.read_text().splitlines()) for path in ROOT.glob("*.py")) <= 4765


PUBLIC = """lif.LIF lif.PLIF lif.lif_reference lif.neurons lif.count_spikes models.build_model models.resnet19
models.vgg16 models.NMNISTNet trigger.power_trigger trigger.spike_trigger trigger.deepfool trigger.adaptive_blend
trigger.UNet trigger.badnets trigger.blend trigger.wanet trigger.clean_label baselines.pgd defenses.fine_tune
defenses.clp defenses.anp defenses.tsbd defenses.nad defenses.strip defenses.spike_deviation data.load
data.poison_indices""".split()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_carry_shapes_and_sources(name):
    module, _, attribute = name.partition(".")
    thing = getattr(MODULES[module], attribute)
    text = inspect.getdoc(thing) + (inspect.getdoc(thing.forward) or "" if inspect.isclass(thing) else "")
    assert re.search(r"\[[A-Z]", text), "no shape such as [B, C, H, W]"
    if name != "data.load":
        assert re.search(r"Sec\. \d|Eq\. \d|Fig\. \d|et al\.|\([A-Z][a-z]+ and [A-Z][a-z]+ \d{4}\)", text), "no source"


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_says_what_it_does(module):
    opening = inspect.getdoc(MODULES[module])
    assert len(opening.splitlines()) > 5
    for name, thing in vars(MODULES[module]).items():
        if inspect.isfunction(thing) and thing.__module__ == module and not name.startswith("_"):
            short = len(inspect.getsourcelines(thing)[0]) <= 8
            assert short or inspect.getdoc(thing), f"{module}.{name} has no docstring"


def test_signatures_that_others_rely_on():
    def arguments(f):
        return list(inspect.signature(f).parameters)
    assert arguments(lif.LIF)[:2] == ["v_thr", "tau"] and arguments(lif.PLIF)[0] == "v_thr"
    assert arguments(lif.lif_reference)[:3] == ["x_seq", "v_thr", "tau"]
    assert arguments(models.build_model) == ["name", "num_classes", "T", "width", "neuron", "mean", "std"]
    assert arguments(trigger.power_trigger) == ["x", "q", "mean", "std", "renormalize"]
    assert arguments(trigger.spike_trigger) == ["frames", "beta", "generator"]
    assert arguments(trigger.deepfool)[:5] == ["model", "x", "num_classes", "max_iter", "overshoot"]
    assert arguments(data.load)[:2] == ["name", "root"]


def test_the_readme_uses_the_codes_names():
    """Second column of the notation table; and every file and notebook that the README names exists."""
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("## Notation"):readme.index("## Responsible")]
    source = "\n".join((ROOT / f"{name}.py").read_text() for name in MODULES)
    names = {word for line in table.splitlines()[4:] if line.startswith("|")
             for code in re.findall(r"`([^`]+)`", line.split("|")[2])
             for word in re.findall(r"[A-Za-z_]+", code)}
    assert names and all(re.search(rf"\b{name}\b", source) for name in names), names
    for page in ("README.md", "results/README.md", "notebooks/README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            assert link.startswith("http") or ((ROOT / page).parent / link).exists(), (page, link)
    options = (set(re.findall(r"--[a-z][a-zA-Z-]+", " ".join(re.findall(r"badsnn\.py[^\n`]*", readme))))
               - {"--dataset", "--help", "--study"})
    known = {settings.flag(field.name) for field in dataclasses.fields(settings.Settings)}
    known |= {"--attacks", "--publish", "--models", "--weights", "--build"}
    assert options <= known, options - known


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_as_promised(path):
    """Executed, without errors, small, short cells, learning goals, summary, exercises, no traces of a machine."""
    text, notebook = path.read_text(), json.loads(path.read_text())
    assert len(text) < 1_000_000 and str(ROOT) not in text and "/home/" not in text
    prose = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    for part in ("You will learn", "Paper:", "## Summary", "## Exercises", "Core, graded", "Open.",
                 "tests/test_exercises.py -k"):
        assert part in prose
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert len("".join(cell["source"]).splitlines()) <= 15
            assert cell["execution_count"], "execute the notebook before committing it"
            assert not any(output["output_type"] == "error" or output.get("name") == "stderr"
                           for output in cell["outputs"])


def test_there_are_nine_notebooks():
    assert [path.stem[:2] for path in sorted(ROOT.glob("notebooks/*.ipynb"))] == [f"{i:02d}" for i in range(1, 10)]
