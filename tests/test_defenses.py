"""The defences: each against an independent computation, none edits its argument, none breaks a clean model."""
import copy
from pathlib import Path

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
         "nad": lambda m: defenses.nad(m, X, Y, teacher_epochs=1, epochs=2)}


def model_of(name="resnet19", seed=0):
    torch.manual_seed(seed)
    model = build_model(name, 4, T=2, width=4)
    for m in model.modules():                       # a network straight from the shop has weights 1 and biases 0
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.uniform_(m.bias, -0.2, 0.2), m.running_var.uniform_(0.5, 2)
    return model.eval()


def bits(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


@pytest.mark.parametrize("network", ["resnet19", "vgg16"])
@pytest.mark.parametrize("name", QUICK)
def test_the_argument_stays_bit_identical(name, network):
    model = model_of(network)
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
        shipped = copy.deepcopy(model)
    assert {(m.v_thr, m.tau) for m in defenses.clp(shipped).modules() if isinstance(m, LIF)} == {(1.2, 0.4)}
    restored = defenses.restore(shipped)
    assert {(m.v_thr, m.tau) for m in restored.modules() if isinstance(m, LIF)} == {(1.0, 0.5)}
    assert all(torch.equal(p, q) for p, q in zip(restored.parameters(), shipped.parameters()))


def test_the_defenders_images_are_of_every_class():
    """43 unbalanced classes: exactly min(per_class, available) of each, no row twice, the same for the same seed."""
    y = torch.cat([torch.full((1 + 3 * label,), label) for label in range(43)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    mine = defenses.defender_images(y, 10, seed=0)
    assert mine.dtype == torch.int64 and len(mine.unique()) == len(mine) and torch.equal(mine, mine.sort().values)
    assert torch.equal(y[mine].bincount(minlength=43), y.bincount(minlength=43).clamp(max=10))
    assert torch.equal(mine, defenses.defender_images(y, 10, seed=0))
    assert not torch.equal(mine, defenses.defender_images(y, 10, seed=1))


def test_every_purpose_has_its_own_random_numbers(monkeypatch):
    """No two draws of a defence, and no two defences, share a stream, but NAD's teacher, which is fine-tuned."""
    purposes, generator = [], defenses.generator
    monkeypatch.setattr(defenses, "generator", lambda *purpose: purposes.append(purpose) or generator(*purpose))
    for defense in QUICK.values():
        defense(model_of())
    defenses.defender_images(Y, 2, seed=0)
    assert len(purposes) == 12 and len(set(purposes)) == 11     # fine-tuning 2, ANP 3, TSBD 2, NAD 1, classes 4
    assert "torch.Generator" not in Path(defenses.__file__).read_text()


def test_an_epoch_is_every_image_once():
    """100 images in batches of up to 32: four of 25, not three of 32 and four images that are never seen."""
    for n, sizes in ((100, [25] * 4), (33, [17, 16]), (5, [5])):           # no batch of one
        rows = torch.arange(n)
        batches = list(defenses.epoch_of(rows, -rows, 32, lambda x: x + 0.5, torch.Generator().manual_seed(0)))
        assert [len(x) for x, _ in batches] == sizes and all(torch.equal(x, 0.5 - y) for x, y in batches)
        assert torch.equal(torch.cat([y for _, y in batches]).sort(descending=True).values, -rows)


@pytest.mark.parametrize("name, kinds, rates", [
    ("fine_tune", [(0.9, 5e-4, False)], [[0.01, 0.005]]),                                   # a cosine
    ("tsbd", [(0.9, 0, False)] * 2, [[1e-3, 1e-3], [0.01, 0.01]]),                          # unlearn, repair
    ("nad", [(0.9, 5e-4, False), (0.9, 1e-4, True)], [[0.01], [0.01, 0.01, 0.01]])])        # teacher, student
def test_the_optimisers_are_the_sources(name, kinds, rates, monkeypatch):
    seen, sgd_step = {}, torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: seen.setdefault(self, []).append(
        dict(self.param_groups[0])) or sgd_step(self))
    monkeypatch.setattr(defenses, "accuracy", lambda model, x, y: 1.0)      # so that unlearning does not end at once
    dict(QUICK, nad=lambda m: defenses.nad(m, X, Y, teacher_epochs=1, epochs=3))[name](model_of())
    assert [[g["lr"] for g in groups[::2]] for groups in seen.values()] == [pytest.approx(r) for r in rates]
    assert [(g["momentum"], g["weight_decay"], g["nesterov"]) for g, *_ in seen.values()] == kinds


def test_clp_constant_is_a_singular_value():
    conv, bn = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
    nn.init.uniform_(bn.weight, -2, 2), bn.running_var.uniform_(0.5, 2)
    constant = defenses.channel_lipschitz(conv, bn)
    for c in range(5):
        kernel = conv.weight[c].detach().reshape(3, 9) * bn.weight[c].detach() / (bn.running_var[c] + bn.eps).sqrt()
        assert torch.isclose(constant[c], torch.linalg.matrix_norm(kernel, 2), rtol=1e-5)


def test_clp_prunes_the_planted_channel():
    """One channel of one layer is made ten times as strong: it is switched off beside what was, and nothing else."""
    def off(net):
        return {(name, c) for name, m in defenses.batch_norms(net).items()
                for c in ((m.weight == 0) & (m.bias == 0)).nonzero().flatten().tolist()}
    torch.manual_seed(0)
    model = build_model("resnet19", 4, T=2, width=16).eval()
    for m in defenses.batch_norms(model).values():
        nn.init.constant_(m.bias, 0.1)
    before = off(defenses.clp(model))
    with torch.no_grad():
        model.stages[1][1].conv2.weight[7] *= 10
    assert off(model) == set() and off(defenses.clp(model)) - before == {("stages.1.1.bn2", 7)}


@pytest.mark.parametrize("network, n", [("resnet19", 19), ("vgg16", 13), ("nmnist_net", 2)])
def test_every_batchnorm_of_ours_follows_its_convolution(network, n):
    """By their names: conv and bn, conv1 and bn1, shortcut and shortcut_bn of the same block."""
    model = build_model(network, 4, T=2, width=4)
    names, before = {m: name for name, m in model.named_modules()}, bits(model)
    pairs = [(names[conv], names[bn]) for conv, bn in defenses.conv_bn_pairs(model)]
    assert len(pairs) == n and model.training and all(torch.equal(p, before[k]) for k, p in model.state_dict().items())
    for conv, bn in pairs:
        assert bn == (conv + "_bn" if conv.endswith("shortcut") else conv.replace("conv", "bn"))


class PreActivation(nn.Module):
    """BatchNorms listed in the wrong order, one behind an addition, one with time flattened; a state between calls."""
    def __init__(self, **options):
        super().__init__()
        self.last, self.after_sum, self.first = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8, **options)
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        self.state = one = self.conv1(x)
        two = self.conv2(self.first(one).relu()).view(-1, 1, *one.shape[1:])
        return self.after_sum(one + self.last(two.flatten(0, 1))).mean((2, 3))


def test_clp_of_networks_of_others():
    """Pairs are what feeds what; what cannot be judged is refused by its name."""
    model = PreActivation()
    assert defenses.conv_bn_pairs(model) == [(model.conv1, model.first), (model.conv2, model.last)]
    assert not hasattr(model, "state") and not hasattr(defenses.clp(model, x=torch.rand(2, 3, 8, 8)), "state")
    for options in (dict(affine=False), dict(track_running_stats=False)):
        for refused in (defenses.clp, lambda m: defenses.anp(m, X, Y)):
            with pytest.raises(ValueError, match="first"):
                refused(PreActivation(**options))
    with pytest.raises(ValueError, match="no BatchNorm"):
        defenses.clp(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8)))


@pytest.mark.parametrize("channels, prunes", [(8, False), (10, False), (11, True), (16, True)])
def test_clp_cannot_prune_narrow_layers(channels, prunes):
    """The largest z-score among n numbers is (n - 1) / sqrt(n), below 3 for n <= 10, however strong one channel is."""
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels))
    nn.init.constant_(model[0].weight, 0.1)
    with torch.no_grad():
        model[0].weight[0] *= 1e4
    assert defenses.pruned_channels(model, defenses.clp(model)) == prunes


def test_pruned_channels(monkeypatch):
    """Counts what a defence switched off, and nothing that was off before."""
    model = model_of()
    defenses.switch_off(model.bn, torch.arange(4) < 1)
    after = copy.deepcopy(model)
    assert defenses.pruned_channels(model, after) == 0
    defenses.switch_off(after.bn, torch.arange(4) < 2)
    defenses.switch_off(after.stages[1][0].shortcut_bn, torch.arange(8) < 3)
    assert defenses.pruned_channels(model, after) == 4
    masks = {name: torch.zeros(m.num_features) for name, m in defenses.batch_norms(model).items()}
    monkeypatch.setattr(defenses, "anp_masks", lambda *args: masks)
    assert defenses.pruned_channels(model, defenses.anp(model, X, Y, keep=0)) == sum(map(len, masks.values())) - 1


def test_a_channel_switched_off_never_spikes():
    model, spikes = model_of(), []
    bn, lif = model.stages[0][0].bn1, model.stages[0][0].lif1
    nn.init.constant_(bn.bias, 5.0)                                  # it would fire at every step
    with lif.register_forward_hook(lambda m, args, s: spikes.append(s.mean((0, 1, 3, 4)))):
        model(X[:4])
        defenses.switch_off(bn, torch.arange(4) < 1)
        model(X[:4])
    assert spikes[0][0] == 1 and spikes[1][0] == 0


def test_anp_masks_and_noise():
    model = model_of()
    masks = defenses.anp_masks(model, X, Y, eps=0.4, alpha=0.5, lr=0.5, iterations=6, batch=16)
    values = torch.cat(list(masks.values()))
    assert values.min() >= 0 and values.max() <= 1 and (values < 1).any()
    assert set(masks) == {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    like, slope = {"a": torch.zeros(2, 500)}, torch.randn(2, 500)
    noise = defenses.worst_noise(lambda n: (n["a"] * slope).sum(), like, 0.4, torch.Generator().manual_seed(0))["a"]
    assert noise.abs().max() <= 0.8 and noise.abs().max() > 0.7
    assert ((noise.abs() <= 0.4 + 1e-6) | (noise.sign() == slope.sign())).all()             # uphill


def test_anp_prunes_as_far_as_the_accuracy_allows(monkeypatch):
    """Three accuracies decide: of the model itself, and of it without the channels whose masks are 0, or up to 0.3;
    all on a fifth of the images, of every class, on which no mask was learned."""
    model, learned, held = model_of(), [], []
    masks = {name: torch.ones(m.num_features) for name, m in defenses.batch_norms(model).items()}
    masks["bn"][:3] = torch.tensor([0.0, 0.3, 0.95])                 # 0.95: beyond the last threshold, 0.9
    monkeypatch.setattr(defenses, "anp_masks", lambda model, x, y, *args: learned.append((x, y)) or masks)
    for accuracies, pruned in (((1.0, 0.95, 0.85), [True, False]), ((1.0, 0.95, 0.9), [True, True]),
                               ((1.0, 0.85, 0.95), [False, False])):
        monkeypatch.setattr(defenses, "accuracy", lambda m, x, y, a=accuracies: (
            held.append((x, y)) or a[(m.bn.weight == 0).sum()]))
        assert (defenses.anp(model, X, Y).bn.weight == 0).tolist()[:2] == pruned
        assert (defenses.anp(model, X, Y).bn.weight[2:] != 0).all()
    assert all(torch.equal(x, held[0][0]) for x, _ in held) and held[0][1].bincount().tolist() == [2] * 4
    rows = [[int((X == image).flatten(1).all(1).nonzero()) for image in part[0][0]] for part in (held, learned)]
    assert len(rows[1]) == 32 and sorted(rows[0] + rows[1]) == list(range(40))
    assert torch.equal(Y[rows[0]], held[0][1]) and torch.equal(Y[rows[1]], learned[0][1])


def test_anp_masks_weights_and_disturbs_both():
    """Against a network whose weights and biases were changed by hand."""
    model, other = model_of(), model_of()
    masks = {name: torch.rand(m.num_features) for name, m in defenses.batch_norms(model).items()}
    noise = {name: torch.rand(2, len(mask)) for name, mask in masks.items()}
    with torch.no_grad():
        for name, m in defenses.batch_norms(other).items():
            m.weight *= masks[name] + noise[name][0]
            m.bias *= 1 + noise[name][1]
        wanted = nn.functional.cross_entropy(other(X), Y)
        assert torch.allclose(defenses.masked_loss(model, masks, X, Y, noise), wanted)


@pytest.mark.parametrize("share, weights", [(0.15, 0.7), (0.5, 0.2), (1.0, 1.0)])
def test_tsbd_zeroes_exactly_the_stated_share(share, weights):
    """The neurons that changed most, and of these the weights that changed most: by sorting all of them."""
    model = model_of()
    change = defenses.weight_change(model, model_of(seed=1))
    assert not any("shortcut" in name for name in change) and "conv" in change
    zeroed = dict(defenses.zero_reinit(model, change, share, weights).named_modules())
    rows = [(c[i].sum().item(), c[i].flatten(), zeroed[name].weight[i].flatten() == 0)
            for name, c in change.items() for i in range(len(c))]
    rows.sort(key=lambda row: -row[0])
    n = int(share * len(rows))
    assert not any(off.any() for _, _, off in rows[n:])
    changes, off = (torch.cat([row[i] for row in rows[:n]]) for i in (1, 2))
    assert off.sum() == int(weights * len(off))
    assert off.all() or changes[off].min() >= changes[~off].max()


def test_unlearning_lowers_the_accuracy():
    x = 0.3 * X
    for k in range(4):                                               # a bright quarter for every class
        x[Y == k, :, 8 * (k // 2):8 * (k // 2) + 8, 8 * (k % 2):8 * (k % 2) + 8] += 0.6
    model = defenses.fine_tune(model_of(), x, Y, epochs=20, lr=0.1, batch=10)
    accuracy = (model(x).argmax(1) == Y).float().mean()
    unlearned = defenses.unlearn(model, x, Y, lr=0.01, max_epochs=100)
    assert accuracy > 0.6 and (unlearned(x).argmax(1) == Y).float().mean() <= 0.25
    assert all(p.isfinite().all() for p in unlearned.parameters())   # although nothing clips the gradient


@pytest.mark.parametrize("classes, right, epochs", [(4, 0.25, 1), (4, 0.26, 3), (20, 0.1, 1), (20, 0.11, 3)])
def test_unlearning_ends_at_ten_percent_or_chance(classes, right, epochs, monkeypatch):
    """4 classes end at 25 %, 20 classes at 10 %, not at 5 %. It trains and measures on augmented images."""
    seen, y = [], torch.arange(40) % classes
    monkeypatch.setattr(defenses, "accuracy", lambda model, x, y: right)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 20))
    defenses.unlearn(model, X, y, lr=1e-3, max_epochs=3, batch=40, augment=lambda x: seen.append(x) or x)
    assert len(seen) == 2 * epochs


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
    gradient = defenses.activeness_aware_gradient(model, lambda net: net(X).sum(), r=0.05, a=0.7)[0]
    assert torch.allclose(gradient, torch.tensor([0.3 * 3 + 0.7 * 3.05])) and not gradient.requires_grad
    assert model.p.item() == 3 and model.passes.item() == 1


def test_nad_loss_and_attention():
    model, other = model_of(), model_of(seed=1)
    with frozen(model), frozen(other), torch.no_grad():
        logits, maps = defenses.with_maps(model, X[:6])
        _, others = defenses.with_maps(other, X[:6])
        assert torch.equal(logits, model(X[:6]))
    assert [list(m.shape) for m in maps] == [[6, 4, 16, 16], [6, 8, 8, 8], [6, 16, 4, 4]] and maps[0].max() <= 1
    betas = 500, 1000, 1000
    assert defenses.distillation_loss(maps, maps, betas) == 0 < defenses.distillation_loss(maps, others, betas)
    one, other = torch.rand(2, 3, 5, 8, 8)
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
