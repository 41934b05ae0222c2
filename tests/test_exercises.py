"""The checks of notebooks/exercises.py: what is drawn, and right answers, made from the product's functions; no student
gets this file. Collected only when it is named: python -m pytest tests/test_exercises.py -k lif_step"""
import copy
from types import SimpleNamespace

import grading
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import nn

import badsnn
import lif
import trigger
from lab import defenses, detectors


def normal(rng, *shape):
    return torch.randn(shape, generator=rng)


def uniform(rng, *shape):
    return torch.rand(shape, generator=rng)


def whole(rng, low, high, *shape):
    """Whole numbers from low to high - 1: one, or a tensor."""
    drawn = torch.randint(low, high, shape, generator=rng)
    return drawn if shape else int(drawn)


class Network(nn.Module):
    """x [B, 3, 2, 2] -> logits [B, 4]; counts its passes. In doubles: a sum in another order moves no spike."""

    def __init__(self, rng, T=3):
        super().__init__()
        self.T, self.passes = T, 0
        self.first, self.second = lif.LIF(), lif.LIF()
        self.weights = nn.ParameterList(normal(rng, *shape).double() for shape in ((12, 16), (16, 16), (16, 4)))

    def forward(self, x):
        self.passes += 1
        first, second, last = self.weights
        hidden = self.first((x.flatten(1) @ first).expand(self.T, -1, -1))
        return (self.second(hidden @ second) @ last).mean(0)


def step(v, x, v_thr, tau):
    return lif.step(v, x, torch.tensor(v_thr), tau)[::-1]


def lif_step(rng):
    v_thr, tau, v, x = 0.8 + uniform(rng).item(), 0.3 + 0.5 * uniform(rng).item(), normal(rng, 9, 7), normal(rng, 9, 7)
    v[0, 0], x[0, 0] = 0, v_thr                             # exactly the threshold is enough
    return v, x, v_thr, tau


def slope(d):
    return torch.autograd.functional.jvp(torch.sigmoid, 4 * d, 4 * torch.ones_like(d))[1]


def sigmoid_surrogate(rng):
    return (4 * normal(rng, 3, 40).double(),)


def hooks_too(spikes_per_sample, model, images):
    return spikes_per_sample(model, images), sum(len(m._forward_hooks) for m in model.modules())


def spikes_per_sample(rng):
    return Network(rng), uniform(rng, whole(rng, 3, 7), 3, 2, 2).double()


def tet(outputs, y):
    return badsnn.criterion(outputs, y, SimpleNamespace(model="resnet19"))


def with_gradient(loss_of, outputs, y):
    loss = loss_of(outputs.requires_grad_(), y)
    return loss, torch.autograd.grad(loss, outputs)[0]


def every_step_loss(rng):
    return 3 * normal(rng, 3, 6, 5), whole(rng, 0, 5, 6)


def eq2(model, x, y, poisoned, v_thr_t, weight, tau=0.5):
    v_thr = torch.cat([torch.ones(len(x)), torch.full((int(poisoned.sum()),), v_thr_t)])
    with lif.neurons(model, v_thr, tau):
        outputs = model(torch.cat([x, x[poisoned]]))[None]
    loss = tet(outputs[:, :len(x)], y)
    return loss + weight * tet(outputs[:, len(x):], y[poisoned]) if poisoned.any() else loss


def in_passes(loss_of, model, x, y, poisoned, *setting):
    loss = loss_of(model, x, y, poisoned, *setting)
    gradient, passes = torch.autograd.grad(loss, list(model.parameters())), model.passes
    return [loss, *gradient], passes, loss_of(model, x, y, poisoned & False, *setting)


def dual_spike_loss(rng):
    model, n = Network(rng), whole(rng, 6, 12)
    poisoned = (torch.arange(n) < n // 3)[torch.randperm(n, generator=rng)]
    return model, 2 * uniform(rng, n, 3, 2, 2).double(), whole(rng, 0, 4, n), poisoned, 1.2 + uniform(rng).item(), 0.3


def blend(*arguments, **changes):
    return trigger.adaptive_blend(*arguments, **changes)[::2]


def adaptive_blend(rng):
    model, k, target = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), whole(rng, 5, 12), whole(rng, 0, 4)
    model[1].weight.data, model[1].bias.data = normal(rng, 4, 12), torch.zeros(4)
    x, x_adv, x_p = (1.4 * uniform(rng, 20, 3, 2, 2) - 0.2 for _ in range(3))
    return model, x.clamp(0, 1), x_adv, x_p.clamp(0, 1), target, k


def trigger_losses(rng):
    made, wanted, std = normal(rng, 5, 3, 4, 4), normal(rng, 5, 3, 4, 4), tuple((0.1 + uniform(rng, 3)).tolist())
    return made, wanted, normal(rng, 5, 6), whole(rng, 0, 6), std


def seeded(spike_trigger, frames, beta, seed):
    return spike_trigger(frames, beta, torch.Generator().manual_seed(seed))


def spike_trigger(rng):
    return whole(rng, 0, 4, 2, 3, 2, 8, 8).float(), 0.02 + uniform(rng).item(), whole(rng, 0, 10**6)


def answers(rng):
    rates = torch.stack([torch.randperm(11, generator=rng)[:5] / 10 for _ in range(12)])
    rates[:2], rates[2:4], rates[4] = 0, 0.3, torch.tensor([0.1, 0, 0, 0, 0])
    return (rates[torch.randperm(12, generator=rng)],)


def along(choose_v_a, curves, margin):
    curves = copy.deepcopy(curves)                          # this exercise may edit its rows
    return [choose_v_a(rows, base_ca, margin) for rows, base_ca in curves]


def choose_v_a(rng):
    """CA falls, with bumps behind which a careless rule goes on; the gain rises and falls, or is negative; or both."""
    n, base_ca, curves = whole(rng, 4, 15), 80 + 15 * uniform(rng).item(), []
    falls = (3 * uniform(rng, n) - 0.5).cumsum(0) + 6 * (uniform(rng, n) < 0.2) - 4 * (uniform(rng) < 0.3)
    rises, other = (18 * uniform(rng, n) - 8).cumsum(0) - 30 * (uniform(rng) < 0.3), (8 * uniform(rng, n)).cumsum(0)
    for fall, rise in ((falls, 0 * rises), (0 * falls, rises), (falls, rises)):
        rows = [dict(v_thr=round(1.02 + 0.01 * j, 2), ca=base_ca + 1 - fall[j].item(),
                     asr_p=(rise[j] + other[j]).item(), target_rate=other[j].item()) for j in range(n)]
        rows = [rows[j] for j in torch.randperm(n, generator=rng)]
        curves.append((rows, base_ca + 6 * (uniform(rng).item() < 0.2)))
    return curves, 1 + 7 * uniform(rng).item()


def numbers(function, *arguments):
    return [float(value) for value in function(*arguments)]


def known_interval(hits, n, level=0.95):
    known = binomtest(hits, n).proportion_ci(level, method="wilson")
    return 100 * known.low, 100 * known.high


def wilson(rng):
    n = whole(rng, 1, 40)
    return whole(rng, 0, n + 1), n


def pruned(weight, gamma, running_var, eps, u):
    conv, bn = nn.Conv2d(*weight.shape[1::-1], weight.shape[2]), nn.BatchNorm2d(len(weight), eps=eps)
    conv.weight.data, bn.weight.data, bn.running_var = weight, gamma.clone(), running_var
    return defenses.clp(nn.Sequential(conv, bn), u)[1].weight == 0


def clp_channels(rng):
    C = whole(rng, 20, 40)
    gamma, running_var = normal(rng, C).exp() * uniform(rng, C).sub(0.5).sign(), normal(rng, C).exp()
    return normal(rng, C, 5, 3, 3), gamma, running_var, 10 ** -(1 + 2 * uniform(rng).item()), 1 + uniform(rng).item()


def renormed(x, x_trig, l2):
    return x + torch.renorm(x_trig - x, 2, 0, l2)


def fade(rng):
    x, l2, sizes = uniform(rng, 8, 3, 6, 6), 0.5 + uniform(rng).item(), 3 * torch.arange(8).view(-1, 1, 1, 1) / 7
    return x, x + l2 * sizes * F.normalize(normal(rng, 8, 108), dim=1).view_as(x), l2


def front(rows, control="target_rate"):
    points = [(row["ca"], row["asr_p"] - row.get(control, 0)) for row in rows]
    return [row for row, (ca, gain) in zip(rows, points)
            if not any(a >= ca and g >= gain and (a, g) != (ca, gain) for a, g in points)]


def pareto(rng):
    drawn = zip(*(whole(rng, 0, n, 14).tolist() for n in (9, 9, 30)))
    return ([dict(ca=90 - a, asr_p=g - 0.5 * a + rate, target_rate=rate) for a, g, rate in drawn],)


def scan_score(rng):
    sides = ((2 * normal(rng, n, 6)).softmax(1) for n in (whole(rng, 0, 9), whole(rng, 1, 9)))
    return *sides, whole(rng, 2, 5)


EXERCISES = [grading.Exercise(*row) for row in (      # draw, right, notebook, parts and their points, drive
    (lif_step, step, "1, From Eq. 1 to the three lines", dict(spikes=1, potentials=1)),
    (sigmoid_surrogate, slope, "1, The surrogate gradient", dict(values=2)),
    (spikes_per_sample, lif.count_spikes, "2, Looking inside: spikes", dict(counts=1, hooks=1), hooks_too),
    (every_step_loss, tet, "2, Training, in ten lines", dict(value=1, gradient=1), with_gradient),
    (dual_spike_loss, eq2, "3, The way round it: one mixed batch", dict(loss=3, passes=1, none_poisoned=1), in_passes),
    (adaptive_blend, blend, "4, Step 2: adaptive blending", dict(images=3, found=2)),
    (trigger_losses, trigger.trigger_losses, "4, Step 3: a U-Net makes it in one pass", dict(sim=1, adv=1, wmse=1)),
    (spike_trigger, trigger.spike_trigger, "5, The trigger T_s, and the clip inside it", dict(frames=2), seeded),
    (answers, badsnn.answers, "5, What does a network answer to silence?", dict(classes=2)),
    (choose_v_a, badsnn.choose, "6, How the attacker chooses: Eq. 8", dict(accuracy=1, gain=1, both=2), along),
    (wilson, known_interval, "6, Seeds", dict(low=1, high=1), numbers),
    (clp_channels, pruned, "7, Table 2", dict(channels=3)),
    (fade, renormed, "8, Fig. 4b: strength of T_o", dict(images=2)),
    (pareto, front, "8, Fig. 3: which malicious setting?", dict(rows=2)),
    (scan_score, detectors.scan_score, "9, A score", dict(score=1, accused=1), numbers),
)]


@pytest.mark.parametrize("found", EXERCISES, ids=lambda found: found.draw.__name__)
def test_exercise(found):
    row = grading.grade(grading.MINE, [found], "0", limit=30)["tests"][0]
    assert row["score"] == row["max_score"], row["output"]
