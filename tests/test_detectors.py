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
    """Is surer of class 0 the brighter an image is."""
    def forward(self, x):
        return torch.stack([4 * x.mean((1, 2, 3)), torch.full((len(x),), -0.1)], 1)


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
    assert torch.allclose(result["probability"], p.mean(1), atol=1e-6) and result["accused"] == 2
    assert result["score"] == pytest.approx(p.mean(1)[-4:].mean(0).max().item())
    assert (model.lif.v_thr, model.lif.tau) == (1.05, 0.4) and model.training   # left as it was


ENDS = {"probabilities": lambda z: z.half().softmax(1), "rates": lambda z: z.clamp(0, 10) / 10,
        "numbers of spikes": lambda z: (5 * z.clamp(0, 10)).long(), "silence": lambda z: 0 * z}


@pytest.mark.parametrize("end", ENDS)
def test_answers_that_softmax_cannot_read_are_refused(end):
    for detect in (detectors.threshold_scan, detectors.margin_scan):
        with pytest.raises(ValueError, match="mean potentials"):
            detect(Tempted(ENDS[end]), FEW)


def test_event_networks_answer_in_rates():
    model, frames = build_model("nmnist_net", 3, T=2, width=4).eval(), torch.rand(4, 2, 2, 34, 34) * 9
    nn.init.uniform_(model.fc2.bias, 0, 2)
    assert torch.equal(detectors.logits_of(model, frames), 10 * model(frames)) and model(frames).max() > 0
    assert detectors.threshold_scan(model, frames)["score"] > 0


def test_other_answers_are_refused():
    for answers in (torch.ones(3, 2, 4), (torch.ones(2, 4), None), torch.ones(2, 1), torch.full((2, 4), torch.nan)):
        with pytest.raises(ValueError, match="logits|no numbers"):
            detectors.logits_of(lambda x: answers, X[:2])


def test_nothing_is_said_of_nan():
    """A neuron of another library turns a NaN into "no spike", and everything behind it looks healthy."""
    for where in ("conv.weight", "stages.0.0.bn1.running_var", "images"):
        model, x = small(), X[:3].clone()
        (x if where == "images" else model.state_dict()[where])[0] = torch.nan
        for detect, *clean in ((detectors.strip, x), (detectors.spike_deviation, x), (detectors.threshold_scan,),
                                (detectors.margin_scan,)):
            with pytest.raises(ValueError, match=f"NaN.*{where}"):
                detect(model, x, *clean)


class Colours(nn.Module):
    """The logit of a class is the mean of its channel, times its gain, times the threshold."""
    def __init__(self):
        super().__init__()
        self.lif = LIF(v_thr=1.1)

    def forward(self, x):
        return x.mean((2, 3)) * torch.tensor([5.0, 2, 7]) * self.lif.v_thr - 0.1


def test_margin_scan():
    """The best image of a class has its channel full and the others empty."""
    model = Colours().train()
    result = detectors.margin_scan(model, FEW, factor=1.5, steps=60)
    assert result["margins"] == pytest.approx([8.25, 3.3, 11.55], abs=0.01) and result["accused"] == 2
    assert result["gap"] == pytest.approx(3.3, abs=0.01) and model.training and model.lif.v_thr == 1.1


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
        detectors.spike_deviation(Bright(), X, X)
