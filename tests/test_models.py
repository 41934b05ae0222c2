"""The networks: the paper's sizes, layer by layer, statelessness, and that they learn."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lif import LIF, lif_reference, neurons
from models import build_model

INPUT = {"resnet19": (3, 32, 32), "vgg16": (3, 32, 32), "nmnist_net": (2, 2, 34, 34)}         # T = 2, as in most tests


@pytest.mark.parametrize("name, width, parameters, convs, neuron_layers, macs", [
    ("resnet19", 128, 12_569_226, 19, 17, 2285), ("vgg16", 64, 14_728_266, 13, 13, 313),
    ("nmnist_net", 128, 17_134_436, 2, 4, 62)])
def test_the_papers_sizes(name, width, parameters, convs, neuron_layers, macs):
    """Counts as stated in the docstrings; multiply-adds (in millions) are PyTorch's own count of one step."""
    model = build_model(name, 10, T=1, width=width).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    kinds = [type(m) for m in model.modules()]
    assert (kinds.count(nn.Conv2d), kinds.count(LIF)) == (convs, neuron_layers)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand((1, 1, 2, 34, 34) if name == "nmnist_net" else (1, 3, 32, 32)))
    assert round(counter.get_total_flops() / 2e6) == macs


def test_resnet19_layer_by_layer():
    """The same weights applied step by step, with neurons by their definition; every sample at a setting of its own."""
    torch.manual_seed(0)
    model = build_model("resnet19", 5, T=2, width=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    x, setting = torch.rand(2, 3, 16, 16), (torch.tensor([1.0, 1.2]), torch.tensor([0.5, 0.8]))

    def steps(f, s):
        return torch.stack([f(frame) for frame in s])

    def fire(current):
        return lif_reference(current, *setting)

    with torch.no_grad():
        for _ in range(50):
            model(x)                                        # fills BatchNorm's running statistics
        model.eval()
        current = model.bn(model.conv((x - model.mean) / model.std))
        s = fire(torch.stack([current] * 2))
        for block in [b for stage in model.stages for b in stage]:
            h = fire(steps(lambda z: block.bn1(block.conv1(z)), s))
            r = steps(lambda z: block.shortcut_bn(block.shortcut(block.pool(z))), s) if block.project else s
            s = fire(steps(lambda z: block.bn2(block.conv2(z)), h) + r)
        expected = torch.stack([model.head(frame.mean((2, 3))) for frame in s]).mean(0)
        with neurons(model, *setting):
            assert torch.allclose(model(x), expected, atol=1e-4)
        assert [len(stage) for stage in model.stages] == [3, 3, 2] and 0.01 < s.mean() < 0.9


@pytest.mark.parametrize("name", INPUT)
def test_answers_are_stateless_per_sample_and_per_step(name):
    """[B, K], the mean over T of the answers of every step, which know no later step; T may grow."""
    torch.manual_seed(0)
    model, x = build_model(name, 5, T=2, width=4).eval(), torch.rand(3, *INPUT[name])
    with neurons(model, v_thr=0.1):                      # fresh networks are silent at 1.0
        logits, before = model(x), model(x, every_step=True)
        assert logits.shape == (3, 5) and before.shape == (2, 3, 5)
        assert torch.allclose(before.mean(0), logits, atol=1e-5) and torch.allclose(logits, model(x), atol=1e-6)
        assert torch.allclose(logits[1:2], model(x[1:2]), atol=1e-4)
        x, model.T = torch.cat([x, x.flip(0)], 1) if name == "nmnist_net" else x, 4
        after = model(x, every_step=True)
    assert torch.allclose(after[:2], before, atol=1e-5) and not torch.equal(after[0], after[3])


@pytest.mark.parametrize("name, neuron", [("resnet19", "lif"), ("vgg16", "plif"), ("nmnist_net", "lif")])
def test_a_small_batch_can_be_learned(name, neuron):
    torch.manual_seed(0)
    model, y, losses = build_model(name, 3, T=2, width=8, neuron=neuron), torch.arange(12) % 3, []
    x = 0.5 * torch.rand(12, *INPUT[name])
    for k in range(3):
        x[y == k, ..., 4 * k:4 * k + 4] += 0.5                           # a bright stripe at another place
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        loss = F.mse_loss(model(x), F.one_hot(y, 3).float())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and all(p.grad is not None for p in model.parameters())


def test_refusals():
    """Bad arguments, inputs of another shape, and stored bytes, which a network would take for white."""
    for bad, message in ((dict(name="resnet20"), "unknown model"), (dict(name="vgg16", width=0), "width must")):
        with pytest.raises(ValueError, match=message):
            build_model(**bad, num_classes=10)
    for name, shape in INPUT.items():
        for x in (torch.rand(2, 5, *shape[1:]), torch.ones(2, *shape, dtype=torch.uint8)):
            with pytest.raises(ValueError, match="this network takes.*floats"):
                build_model(name, 10, T=2, width=4)(x)
