"""The defences: each against an independent computation, and none edits its argument."""
import pytest
import torch
from torch import nn

from lab import defenses
from lif import LIF, neurons
from models import build_model, frozen

X = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 4
QUICK = {"restore": lambda m: defenses.restore(m), "clp": lambda m: defenses.clp(m),
         "fine_tune": lambda m: defenses.fine_tune(m, X, Y, epochs=2),
         "anp": lambda m: defenses.anp(m, X, Y, iterations=4),
         "tsbd": lambda m: defenses.tsbd(m, X, Y, epochs=2, max_unlearn=2),
         "nad": lambda m: defenses.nad(m, X, Y, teacher_epochs=1, epochs=3)}


def model_of(name="resnet19", seed=0):
    torch.manual_seed(seed)
    model = build_model(name, 4, T=2, width=4)
    for m in model.modules():                       # a network straight from the shop has weights 1 and biases 0
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.uniform_(m.bias, -0.2, 0.2), m.running_var.uniform_(0.5, 2)
    return model.eval()


def bits(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


@pytest.mark.parametrize("name", QUICK)
def test_the_argument_stays_bit_identical(name):
    model = model_of()
    before, setting = bits(model), [(m.v_thr, m.tau) for m in model.modules() if isinstance(m, LIF)]
    repaired = QUICK[name](model)
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())
    assert setting == [(m.v_thr, m.tau) for m in model.modules() if isinstance(m, LIF)] and not model.training
    assert not any(m._forward_hooks for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert repaired is not model and not repaired.training
    assert all(p.isfinite().all() for p in repaired.state_dict().values())
    if name in ("fine_tune", "tsbd", "nad"):
        assert any(not torch.equal(p, before[key]) for key, p in repaired.state_dict().items())


def test_a_defence_works_at_the_deployed_setting():
    """The copy keeps the neurons' setting; restore puts it back to nominal, and leaves the weights."""
    with neurons(model_of(), 1.2, 0.4) as model:
        shipped, restored = defenses.clp(model), defenses.restore(model)
    assert {(m.v_thr, m.tau) for m in shipped.modules() if isinstance(m, LIF)} == {(1.2, 0.4)}
    assert {(m.v_thr, m.tau) for m in restored.modules() if isinstance(m, LIF)} == {(1.0, 0.5)}
    assert all(torch.equal(p, q) for p, q in zip(restored.parameters(), model.parameters()))


def test_an_epoch_is_every_image_once():
    """100 images in batches of up to 32: four of 25, not three of 32 and four images that are never seen."""
    for n, sizes in ((100, [25] * 4), (33, [17, 16]), (5, [5])):           # no batch of one
        rows = torch.arange(n)
        batches = list(defenses.epoch_of(rows, -rows, lambda x: x + 0.5, torch.Generator().manual_seed(0)))
        assert [len(x) for x, _ in batches] == sizes and all(torch.equal(x, 0.5 - y) for x, y in batches)
        assert torch.equal(torch.cat([y for _, y in batches]).sort(descending=True).values, -rows)


class PreActivation(nn.Module):
    """BatchNorms listed in the wrong order, one behind an addition, one behind a view."""
    def __init__(self):
        super().__init__()
        self.last, self.after_sum, self.first = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        one = self.conv1(x)
        two = self.conv2(self.first(one).relu()).view(-1, 1, *one.shape[1:])
        return self.after_sum(one + self.last(two.flatten(0, 1))).mean((2, 3))


def test_clp_pairs_what_feeds_what():
    model = PreActivation()
    assert defenses.conv_bn_pairs(model) == [(model.conv1, model.first), (model.conv2, model.last)]


def test_recentre_goes_to_the_middle_of_what_leaves_the_answers():
    """A neuron that gets 1.0 at once: it spikes up to a threshold of 1.0, so 0.9 may rise by 10 %, or fall."""
    class Net(nn.Module):
        def __init__(self, v_thr):
            super().__init__()
            self.lif = LIF(v_thr)

        def forward(self, x):
            rate = self.lif(torch.ones(1, len(x), 1))[0]
            return torch.cat([10 * rate - 5, 0 * rate], 1)
    model = Net(0.9)
    assert defenses.recentre(model, torch.rand(5, 3, 4, 4)).lif.v_thr == pytest.approx(0.9 * (0.25 + 1.1) / 2)
    assert model.lif.v_thr == 0.9 and defenses.recentre(Net(1.2), torch.rand(5, 3, 4, 4)).lif.v_thr > 1.2


@pytest.mark.parametrize("name, kinds, rates", [
    ("fine_tune", [(0.9, 5e-4, False)], [[0.01, 0.005]]),                                   # a cosine
    ("tsbd", [(0.9, 0, False)] * 2, [[1e-3, 1e-3], [0.01, 0.01]]),                          # unlearn, repair
    ("nad", [(0.9, 5e-4, False), (0.9, 1e-4, True)], [[0.01], [0.01, 0.01, 0.01]])])        # teacher, student
def test_the_optimisers_are_the_sources(name, kinds, rates, monkeypatch):
    seen, sgd_step = {}, torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: seen.setdefault(self, []).append(
        dict(self.param_groups[0])) or sgd_step(self))
    monkeypatch.setattr(defenses, "accuracy", lambda model, x, y: 1.0)      # so that unlearning does not end at once
    QUICK[name](model_of())
    assert [[g["lr"] for g in groups[::2]] for groups in seen.values()] == [pytest.approx(r) for r in rates]
    assert [(g["momentum"], g["weight_decay"], g["nesterov"]) for g, *_ in seen.values()] == kinds


def test_clp_switches_off_the_largest_singular_values():
    torch.manual_seed(0)
    for _ in range(20):
        conv, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.1)
        nn.init.uniform_(bn.weight, -2, 2), nn.init.ones_(bn.bias), bn.running_var.uniform_(0.05, 1)
        kernels = conv.weight.detach().view(8, 3, 9)
        norms = torch.stack([torch.linalg.matrix_norm(kernel, 2) for kernel in kernels])
        norms *= bn.weight.detach().abs() / (bn.running_var + 0.1) ** 0.5
        pruned = defenses.clp(nn.Sequential(conv, bn), u=1.0)[1]
        assert torch.equal(pruned.weight == 0, norms > norms.mean() + norms.std())
        assert torch.equal(pruned.bias == 0, pruned.weight == 0)        # else the channel might spike at every step


@pytest.mark.parametrize("network, n", [("resnet19", 19), ("vgg16", 13), ("nmnist_net", 2)])
def test_every_batchnorm_of_ours_follows_its_convolution(network, n):
    """By their names: conv and bn, conv1 and bn1, shortcut and shortcut_bn of the same block."""
    model = build_model(network, 4, T=2, width=4)
    names, before = {m: name for name, m in model.named_modules()}, bits(model)
    pairs = [(names[conv], names[bn]) for conv, bn in defenses.conv_bn_pairs(model)]
    assert len(pairs) == n and model.training and all(torch.equal(p, before[k]) for k, p in model.state_dict().items())
    for conv, bn in pairs:
        assert bn == (conv + "_bn" if conv.endswith("shortcut") else conv.replace("conv", "bn"))


def test_pruning_refuses_what_it_cannot_judge():
    conv = nn.Conv2d(3, 8, 3)
    with pytest.raises(ValueError, match="1, BatchNorm2d.*running statistics"):
        defenses.clp(nn.Sequential(conv, nn.BatchNorm2d(8, affine=False)))
    with pytest.raises(ValueError, match="no BatchNorm"):
        defenses.clp(nn.Sequential(conv, nn.MaxPool2d(2), nn.BatchNorm2d(8)))


def test_anp_masks_and_noise(monkeypatch):
    """Masks lie in [0, 1]. On a plane the noise goes eps uphill of where it started, and masks descend both losses."""
    masks = torch.cat(defenses.anp_masks(model_of(), X, Y, iterations=6))
    assert masks.min() >= 0 and masks.max() <= 1 and (masks < 1).any()
    model, noises = nn.Sequential(nn.BatchNorm2d(500)), []
    slope = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))

    def plane(net, masks, x, y, noise):
        noises.append(noise[0].detach())
        return (noise[0] * slope).sum() + (1 + noises[-1].abs().max()) * (masks[0] * slope[0]).sum()
    monkeypatch.setattr(defenses, "masked_loss", plane)
    (mask,) = defenses.anp_masks(model, X, Y, iterations=1, alpha=0.25)
    start, none, worst = noises
    assert 0.39 < start.abs().max() <= 0.4 and not none.any()
    assert torch.allclose(worst - start, 0.4 * slope.sign(), atol=1e-6)
    assert torch.allclose(mask, (1 - 0.2 * (1 + 0.75 * worst.abs().max()) * slope[0]).clamp(0, 1), atol=1e-5)


def test_anp_prunes_as_far_as_the_accuracy_allows(monkeypatch):
    """Three accuracies decide: of the model itself, and of it without the channels whose masks are 0, or up to 0.3;
    all on a fifth of the images, of every class, on which no mask was learned."""
    model, learned, held = model_of(), [], []
    masks = [torch.ones(m.num_features) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    masks[0][:3] = torch.tensor([0.0, 0.3, 0.95])                    # 0.95: beyond the last threshold, 0.9
    monkeypatch.setattr(defenses, "anp_masks", lambda model, x, y, *args: learned.append((x, y)) or masks)
    for accuracies, pruned in (((1.0, 0.95, 0.85), [True, False]), ((1.0, 0.95, 0.9), [True, True]),
                               ((1.0, 0.85, 0.95), [False, False])):
        monkeypatch.setattr(defenses, "accuracy", lambda m, x, y, a=accuracies: (
            held.append((x, y)) or a[(m.bn.weight == 0).sum()]))
        assert (defenses.anp(model, X, Y).bn.weight == 0).tolist() == [*pruned, False, False]
    assert all(torch.equal(x, held[0][0]) for x, _ in held) and held[0][1].bincount().tolist() == [2] * 4
    rows = [[int((X == image).flatten(1).all(1).nonzero()) for image in part[0][0]] for part in (held, learned)]
    assert len(rows[1]) == 32 and sorted(rows[0] + rows[1]) == list(range(40))
    assert torch.equal(Y[rows[0]], held[0][1]) and torch.equal(Y[rows[1]], learned[0][1])


def test_anp_masks_weights_and_disturbs_both():
    """Against a network whose weights and biases were changed by hand."""
    model, other = model_of(), model_of()
    norms = [m for m in other.modules() if isinstance(m, nn.BatchNorm2d)]
    masks, noises = [torch.rand(m.num_features) for m in norms], [torch.rand(2, m.num_features) for m in norms]
    with torch.no_grad():
        for m, mask, noise in zip(norms, masks, noises):
            m.weight *= mask + noise[0]
            m.bias *= 1 + noise[1]
        wanted = nn.functional.cross_entropy(other(X), Y)
        assert torch.allclose(defenses.masked_loss(model, masks, X, Y, noises), wanted)


@pytest.mark.parametrize("share, weights", [(0.15, 0.7), (0.5, 0.2), (1.0, 1.0)])
def test_tsbd_zeroes_exactly_the_stated_share(share, weights):
    """The neurons that changed most, and of these the weights that changed most: by sorting all of them."""
    model, other = model_of(), dict(model_of(seed=1).named_parameters())
    zeroed, rows = dict(defenses.zero_reinit(model, model_of(seed=1), share, weights).named_parameters()), []
    for name, w in model.named_parameters():
        if "conv" in name and name.endswith("weight"):
            change = (w - other[name]).detach().abs().flatten(1)
            rows += [(c.sum().item(), c, off) for c, off in zip(change, zeroed[name].flatten(1) == 0)]
        else:
            assert torch.equal(w, zeroed[name])                      # a shortcut, BatchNorm, the head
    rows.sort(key=lambda row: -row[0])
    n = int(share * len(rows))
    assert not any(off.any() for _, _, off in rows[n:])
    changes, off = (torch.cat([row[i] for row in rows[:n]]) for i in (1, 2))
    assert off.sum() == int(weights * len(off))
    assert off.all() or changes[off].min() >= changes[~off].max()


def test_unlearning_ends_at_ten_percent_or_chance(monkeypatch):
    """4 classes end at 25 %, 20 classes at 10 %, not at 5 %. Augmented images train (two batches) and are measured."""
    for classes, right, epochs in ((4, 0.25, 1), (4, 0.26, 3), (20, 0.1, 1), (20, 0.11, 3)):
        seen, model = [], nn.Sequential(nn.Flatten(), nn.Linear(768, 20))
        monkeypatch.setattr(defenses, "accuracy", lambda model, x, y, right=right: right)
        y, loss = torch.arange(40) % classes, nn.functional.cross_entropy
        unlearned = defenses.unlearn(model, X, y, 3, lambda x, seen=seen: seen.append(x) or x)
        assert list(map(len, seen)) == [20, 20, 40] * epochs and loss(unlearned(X), y) > loss(model(X), y)


def test_activeness_aware_gradient_of_a_parabola():
    """loss = p^2 / 2 at p = 3: g1 = 3, and 0.05 further up g2 = 3.05; p is left as it was, the buffer saw one pass."""
    class Parabola(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.passes = nn.Parameter(torch.tensor([3.0])), nn.Buffer(torch.zeros(1))

        def forward(self, x):
            self.passes += 1
            return self.p ** 2 / 2

    model = Parabola()
    defenses.activeness_aware_backward(model, lambda net: net(X).sum())
    assert torch.allclose(model.p.grad, torch.tensor([0.3 * 3 + 0.7 * 3.05])) and not model.p.grad.requires_grad
    assert model.p.item() == 3 and model.passes.item() == 1


def test_nad_loss_and_attention():
    model = model_of()
    with frozen(model), torch.no_grad():
        logits, maps = defenses.with_maps(model, X[:6])
        assert torch.equal(logits, model(X[:6])) and not model.stages[-1][-1]._forward_hooks
    assert [list(m.shape) for m in maps] == [[6, 4, 16, 16], [6, 8, 8, 8], [6, 16, 4, 4]] and maps[0].max() <= 1
    one, other = torch.rand(2, 3, 5, 8, 8)
    assert defenses.distillation_loss([one], [one]) == 0
    assert torch.allclose(defenses.distillation_loss([one], [other], [7.0], [8]),         # at the source's size
                          7 * nn.functional.mse_loss(defenses.attention(one), defenses.attention(other)))
    large, other_large = (x.repeat_interleave(4, 2).repeat_interleave(4, 3) for x in (one, other))  # the same pattern
    assert torch.allclose(defenses.distillation_loss([one], [other], [7.0], [32]),        # small or not, as heavy
                          defenses.distillation_loss([large], [other_large], [7.0], [32]), rtol=1e-3)
    rates = torch.zeros(1, 2, 1, 2)
    rates[0, :, 0, 0] = torch.tensor([3.0, 0.0])                     # squares: 9 and 0 + 16 -> (9, 16) / |(9, 16)|
    rates[0, :, 0, 1] = torch.tensor([0.0, 4.0])
    assert torch.allclose(defenses.attention(rates), torch.tensor([[9.0, 16.0]]) / 337 ** 0.5, atol=1e-5)
    vgg = defenses.with_maps(model_of("vgg16"), X[:2])[1]
    assert [m.shape[-1] for m in vgg] == [4, 2, 1]                   # before each pool: groups 3, 4, 5 of a 16x16 image
