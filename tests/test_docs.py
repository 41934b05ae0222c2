"""What readers rely on: public names with docstrings that give shapes and sources, the README's names, the notebooks' form."""
import inspect
import json
import re
from pathlib import Path

import pytest

import badsnn
import data
import defenses
import lif
import models
import trigger

ROOT = Path(badsnn.__file__).parent
MODULES = dict(badsnn=badsnn, data=data, defenses=defenses, lif=lif, models=models, trigger=trigger)
PUBLIC = """lif.LIF lif.PLIF lif.lif_reference lif.neurons lif.count_spikes models.build_model models.resnet19 models.vgg16 models.NMNISTNet
trigger.power_trigger trigger.spike_trigger trigger.deepfool trigger.adaptive_blend trigger.UNet trigger.badnets trigger.blend trigger.wanet
trigger.clean_label trigger.pgd defenses.fine_tune defenses.clp defenses.anp defenses.tsbd defenses.nad defenses.strip
defenses.spike_deviation data.load data.poison_indices""".split()


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
    table = readme[readme.index("## Notation"):readme.index("## Speed")]
    source = "\n".join((ROOT / f"{name}.py").read_text() for name in MODULES)
    names = {word for line in table.splitlines()[4:] if line.startswith("|") for code in re.findall(r"`([^`]+)`", line.split("|")[2])
             for word in re.findall(r"[A-Za-z_]+", code)}
    assert names and all(re.search(rf"\b{name}\b", source) for name in names), names
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("http") or (ROOT / link).exists(), link
    options = set(re.findall(r"--[a-z][a-zA-Z-]+", " ".join(re.findall(r"badsnn\.py[^\n`]*", readme)))) - {"--dataset", "--help", "--study"}
    known = {flag for group in badsnn.OPTIONS.values() for flag, *_ in group}
    assert options <= known, options - known


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_as_promised(path):
    """Executed, without errors, small, short cells, learning goals, summary, exercises, no traces of a machine."""
    text, notebook = path.read_text(), json.loads(path.read_text())
    assert len(text) < 1_000_000 and str(ROOT) not in text and "/home/" not in text
    prose = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    for part in ("You will learn", "Paper:", "## Summary", "## Exercises", "tests/test_exercises.py -k", "Open."):
        assert part in prose
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert len("".join(cell["source"]).splitlines()) <= 15
            assert cell["execution_count"], "execute the notebook before committing it"
            assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in cell["outputs"])


def test_there_are_eight_notebooks():
    assert [path.stem[:2] for path in sorted(ROOT.glob("notebooks/*.ipynb"))] == [f"{i:02d}" for i in range(1, 9)]
