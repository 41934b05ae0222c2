"""The detectors: right values, whatever form a network's answers have, and nothing said of networks that hold NaN."""
import copy

import pytest
import torch
from torch import nn

from lab import detectors
from lif import LIF, count_spikes
from models import build_model

X = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small(name="resnet19"):
    torch.manual_seed(0)
    return build_model(name, 4, T=2, width=4).eval()


class Bright(nn.Module):
    """Is surer of class 0 the brighter an image is; answers with probabilities."""
    def forward(self, x):
        return torch.stack([4 * x.mean((1, 2, 3)), torch.full((len(x),), -0.1)], 1).softmax(1)


def test_strip_adds_without_clipping():
    """As in the authors' code; the mean over the overlays of each image, whatever a pass holds."""
    clean, x = X[:1], X[:30] + torch.arange(30).view(30, 1, 1, 1) / 30
    p = (4 * (x + clean).mean((1, 2, 3)) + 0.1).sigmoid()            # one clean image, so every overlay is this one
    wanted = -(p * p.log() + (1 - p) * (1 - p).log())
    for overlays in (1, 20):
        assert torch.allclose(detectors.strip(Bright(), x, clean, overlays), wanted, atol=1e-5)


class Tempted(nn.Module):
    """Logits that depend on the threshold: class 2 gets 10 * (v_thr - 1); class 0 gets 1 for bright images."""
    def __init__(self, end=lambda z: z - 0.5, tempted=10):
        super().__init__()
        self.lif, self.end, self.tempted = LIF(v_thr=1.05, tau=0.4), end, tempted

    def forward(self, x):
        bright = (x.mean((1, 2, 3)) > 0.5).float()
        return self.end(torch.stack([bright, 0 * bright, self.tempted * (self.lif.v_thr - 1) + 0 * bright], 1))


FEW = torch.cat([torch.ones(2, 3, 4, 4), torch.zeros(4, 3, 4, 4)])


def test_threshold_scan():
    model = Tempted().train()
    result = detectors.threshold_scan(model, FEW)
    v_thr = [1.05 * factor for factor in detectors.SCAN]
    p = torch.tensor([[[1, 0, 10 * (v - 1)]] * 2 + [[0, 0, 10 * (v - 1)]] * 4 for v in v_thr]).softmax(2)
    assert result["v_thr"] == pytest.approx(v_thr, abs=1e-4) and isinstance(result["score"], float)
    assert torch.allclose(result["probability"], p.mean(1), atol=1e-6) and result["accused"] == 2
    assert torch.allclose(result["entropy"], -(p * p.log()).sum(2).mean(1), atol=1e-5)
    assert result["score"] == pytest.approx(p.mean(1)[-4:].mean(0).max().item())
    assert torch.allclose(result["shipped"][0], torch.tensor([1, 0, 0.5]).softmax(0))
    assert (model.lif.v_thr, model.lif.tau) == (1.05, 0.4) and model.training   # left as it was


ENDS = {"logits": lambda z: z - 0.5, "probabilities": lambda z: z.half().softmax(1),
        "rates": lambda z: z.clamp(0, 10) / 10, "rates below a half": lambda z: z.clamp(0, 10) / 40,
        "rates as counts": lambda z: (5 * z.clamp(0, 10)).long()}


@pytest.mark.parametrize("end", ENDS)
def test_answers_of_every_form_score_alike(end):
    backdoored, clean = (detectors.threshold_scan(Tempted(ENDS[end], tempted), FEW) for tempted in (10, 0))
    assert backdoored["score"] > 0.95 and backdoored["accused"] == 2 and clean["score"] < 0.6
    assert backdoored["reading"] == end.split()[0]


def test_event_networks_answer_in_rates():
    model, frames = build_model("nmnist_net", 3, T=2, width=4).eval(), torch.rand(4, 2, 2, 34, 34) * 9
    nn.init.uniform_(model.fc2.bias, 0, 2)
    assert torch.equal(detectors.logits_of(model, frames), 10 * model(frames)) and model(frames).max() > 0
    assert detectors.reading_of(torch.tensor([[0.0, 0, 0], [0.6, 0.1, 0.4]])) == ("rates", 10)
    assert detectors.reading_of(torch.zeros(2, 3)) == ("rates", 10)             # silent: nothing becomes sure


def test_other_answers_are_refused():
    for answers in (torch.ones(3, 2, 4), (torch.ones(2, 4), None), torch.ones(2, 1), torch.full((2, 4), torch.nan)):
        with pytest.raises(ValueError, match="logits|no numbers"):
            detectors.logits_of(lambda x: answers, X[:2])


def test_nothing_is_said_of_nan():
    """A neuron of another library turns a NaN into "no spike", and everything behind it looks healthy."""
    for where in ("conv.weight", "stages.0.0.bn1.running_var", "images"):
        model, x = small(), X[:3].clone()
        (x if where == "images" else model.state_dict()[where])[0] = torch.nan
        for detect, *clean in ((detectors.strip, x), (detectors.spike_deviation, x), (detectors.threshold_scan,)):
            with pytest.raises(ValueError, match=f"NaN.*{where}"):
                detect(model, x, *clean)


def test_scan_score_by_hand():
    """The largest mean over neighbours of one side: not across the shipped threshold, not of different classes."""
    above = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.2, 0.8], [0.4, 0.6]])
    below = torch.tensor([[0.75, 0.25], [0.7, 0.3]])
    assert detectors.scan_score(below, above, 2) == (pytest.approx(0.85), 1)
    assert detectors.scan_score(below, above[:2], 4) == (pytest.approx(0.725), 0)
    assert detectors.scan_score(below[:0], above, 9) == (pytest.approx(0.6), 1)


def test_spike_deviation():
    model = small()
    counts, training = count_spikes(model, X), copy.deepcopy(model).train()
    wanted = (counts[:5] - counts.mean()).abs() / counts.std()
    assert torch.allclose(detectors.spike_deviation(training, X[:5], X), wanted) and training.training
    with pytest.raises(ValueError, match="lif.py"):
        detectors.spike_deviation(nn.Identity(), X, X)
