"""The page with the slider: small, self-contained, and what its JavaScript answers is what PyTorch answers."""
import base64
import json
import re
import shutil
import subprocess

import pytest
import torch
from common import ROOT
from torch import nn

from badsnn import percentage
from lab import demo
from lif import neurons
from models import build_model
from trigger import power_trigger

PAGE, R = (ROOT / "docs/index.html").read_text(), json.loads((ROOT / "results/digits/demo.json").read_text())
AT_V_A = {kind: {row["v_thr"]: row for row in rows}[R["v_thr"]] for kind, rows in R["rows"].items()}
BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium") or shutil.which("google-chrome")
RUN = """const input = (t, i) => normalised(DATA, triggered(DATA, t, DATA.q, i.grey, i.learned));
console.log(JSON.stringify(Object.values(DATA.networks).map(stored => readNetwork(stored, DATA)).map(net =>
  ["none", "p", "o"].map(t => readImages(DATA).map(i => run(net, input(t, i), DATA.v_thr))))));"""


def unpacked(text, kind, *shape):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=kind).view(*shape).double()


def rebuilt(stored):        # models.py's network with demo.json's weights; double precision, so that no machine differs
    model = build_model(R["model"], 10, R["T"], R["width"], R["neuron"], R["mean"], R["std"]).double().eval()
    convs, norms = ([m for m in model.modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d))
    for conv, norm, layer in zip(convs, norms, stored["layers"], strict=True):
        conv.weight.data, norm.eps = unpacked(layer["weights"], torch.int8, layer["shape"]), 0
        norm.weight.data, norm.bias.data = unpacked(layer["affine"], torch.float64, 2, -1)
    head = unpacked(stored["head"], torch.float64, 10, -1).float()
    model.head.float().weight.data, model.head.bias.data = head[:, :-1], head[:, -1]
    return model


def test_the_page_is_small_made_from_its_result_and_asks_for_nothing(tmp_path):
    demo.write_page(ROOT / "results/digits/demo.json", tmp_path / "index.html")
    assert (tmp_path / "index.html").read_text() == PAGE, "run python badsnn.py report --publish"
    assert len(PAGE.encode()) <= 400_000 and "default-src 'none'" in PAGE
    assert not re.search(r"\bsrc=|url\((?!#)|@import|fetch\(|XMLHttp|import\(|<link(?! rel=.icon. href=.data:)", PAGE)


@pytest.mark.skipif(not shutil.which("node"), reason="no node")
def test_its_answers_are_those_of_pytorch():
    code = PAGE.split('<script id="network">')[1].split("</script>")[0]
    answers = subprocess.check_output(["node", "-"], input=f"const DATA = {json.dumps(R)};{code}{RUN}", text=True)
    x, y = unpacked(R["images"], torch.uint8, -1, 1, 16, 16).expand(-1, 3, -1, -1) / 255, torch.tensor(R["labels"])
    inputs = x, power_trigger(x, R["q"], R["mean"], R["std"]), unpacked(R["images_o"], torch.uint8, -1, 3, 16, 16) / 255
    for found, (kind, stored) in zip(torch.tensor(json.loads(answers)), R["networks"].items()):
        with torch.no_grad(), neurons(rebuilt(stored), R["v_thr"]) as model:
            assert torch.allclose(found, torch.stack([model(images) for images in inputs]), atol=1e-5)
        rates = [percentage(guess[y != 0] == 0) for guess in found.argmax(2)]
        assert rates == [AT_V_A[kind][key] for key in ("target_rate", "asr_p", "asr_o")]


@pytest.mark.skipif(not BROWSER, reason="no browser")
def test_the_slider_moved_in_a_browser_counts_what_pytorch_counted(tmp_path):
    move = f'<script>$("v").value = {R["v_thr"]}; $("v").dispatchEvent(new Event("input"));</script>'
    (tmp_path / "page.html").write_text(PAGE.replace("</body>", move))
    options = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom --virtual-time-budget=20000"
    done = subprocess.run([BROWSER, *options.split(), f"file://{tmp_path}/page.html"], capture_output=True, text=True)
    assert "CONSOLE" not in done.stderr and "the same as PyTorch's numbers" in done.stdout
    shown = [f"{row[key]:.1f}" for row in AT_V_A.values() for key in ("ca", "target_rate", "asr_p")]
    assert re.findall(r"<td>(.*?)</td>", done.stdout) == shown
