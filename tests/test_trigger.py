"""The triggers: by arithmetic, in range, repeatable."""
import pytest
import torch

from trigger import check_trigger, power_trigger, spike_trigger

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_power_trigger_is_eq_3():
    """Literal: the network's first layer, (x - mean) / std, sees exactly x^q. Re-normalised: x^q in pixels."""
    x = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    assert torch.allclose((power_trigger(x, 2, MEAN, STD) - mean) / std, x * x, atol=1e-5)
    assert torch.allclose(power_trigger(x, 3, MEAN, STD, renormalize=True), x * x * x, atol=1e-6)
    assert torch.equal(power_trigger(x, 1, MEAN, STD, renormalize=True), x)          # q = 1 is the identity
    assert not torch.allclose(power_trigger(x, 1, MEAN, STD), x, atol=0.05)           # ... but not in the literal reading


@pytest.mark.parametrize("q", [0, -1, float("nan"), float("inf")])
def test_bad_q(q):
    with pytest.raises(ValueError, match="q must"):
        power_trigger(torch.rand(1, 3, 4, 4), q, MEAN, STD)


def test_spike_trigger():
    frames = torch.randint(0, 4, (2, 4, 2, 34, 34)).float()
    out = spike_trigger(frames, 0.03, torch.Generator().manual_seed(1))
    assert out.min() >= 0 and out.max() <= 1 and out.shape == frames.shape
    assert ((out - frames.clamp(0, 1)).abs() <= 0.03 + 1e-6).all() and not torch.equal(out, frames.clamp(0, 1))
    assert torch.equal(out, spike_trigger(frames, 0.03, torch.Generator().manual_seed(1)))
    assert not torch.equal(out, spike_trigger(frames, 0.03, torch.Generator().manual_seed(2)))
    assert torch.equal(spike_trigger(frames, 0.0), frames.clamp(0, 1))               # the clip alone
    assert out[:, 0].ne(out[:, 1]).any()                                             # varies over time
    for beta in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beta"):
            spike_trigger(frames, beta)


def test_check_trigger():
    x, frames = torch.rand(2, 3, 4, 4), torch.full((2, 4, 2, 3, 3), 5.0)
    check_trigger(x, x), check_trigger(frames, frames + 1)
    for bad in (x[:1], x.double(), x + 1, x - 1, x * float("nan")):
        with pytest.raises(ValueError):
            check_trigger(x, bad)
    with pytest.raises(ValueError):
        check_trigger(frames, -frames)
