"""The graded exercises, notebooks/exercises.py. Collected only when it is named: there, unsolved work fails.

    python -m pytest tests/test_exercises.py -k lif_step
    GRADE_SEED=41 python -m pytest tests/test_exercises.py --exercises SUBMISSION.py --grade OUT.json

Every input is drawn anew for every GRADE_SEED (`draw`), so no answer can be read off this file. Wanted values come from
the product's own functions where there are some. tests/test_grading.py shows that right answers pass, and that wrong
ones fail.
"""
import copy

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import nn

import badsnn
import lif
import models
import trigger
from kit.files import fingerprint
from lab import defenses, detectors


def points(n, exercise):
    return pytest.mark.points(exercise, n)


def normal(draw, *shape):
    return torch.randn(shape, generator=draw)


def uniform(draw, *shape):
    return torch.rand(shape, generator=draw)


def whole(draw, low, high, *shape):
    """Whole numbers from low to high - 1: one, or a tensor."""
    drawn = torch.randint(low, high, shape, generator=draw)
    return drawn if shape else int(drawn)


def same(answer, wanted, atol=1e-5):
    assert isinstance(answer, torch.Tensor), f"a tensor was wanted, not {type(answer).__name__}"
    assert answer.shape == wanted.shape, f"shape {list(wanted.shape)} was wanted, not {list(answer.shape)}"
    assert torch.allclose(answer.float(), wanted.float(), atol=atol), "other numbers were wanted"


def copied(a):
    if isinstance(a, torch.Tensor):
        return a.clone()
    return copy.deepcopy(a) if isinstance(a, list) else a


def ask(function, *arguments, may_edit=False):
    """A student's answer. It gets copies of tensors and lists, which it must leave as they are, and so a network."""
    given = [copied(a) for a in arguments]
    networks = [a for a in arguments if isinstance(a, nn.Module)]
    before = fingerprint(networks)
    answer = function(*given)
    for handed, own in zip(given, arguments):
        equal = torch.equal(handed, own) if isinstance(own, torch.Tensor) else handed == own
        assert equal or may_edit, "leave the arguments as they are"
    assert fingerprint(networks) == before, "leave the network as it is"
    return answer


def network(draw, K=4):
    torch.manual_seed(whole(draw, 0, 10**6))
    return models.build_model("resnet19", K, T=3, width=4).eval()


class Linear(nn.Module):
    """Neurons and a linear layer, as a stand-in for a network: notes the thresholds and rows of every forward pass."""

    def __init__(self, draw, pixels, K):
        super().__init__()
        self.lif, self.passes = lif.LIF(), []
        self.weight = nn.Parameter(normal(draw, K, pixels))

    def forward(self, x):
        rows = torch.broadcast_to(torch.as_tensor(self.lif.v_thr, dtype=torch.float32), (len(x),))
        taus = torch.broadcast_to(torch.as_tensor(self.lif.tau, dtype=torch.float32), (len(x),))
        logits = (x / rows.view(-1, 1, 1, 1)).flatten(1) @ self.weight.T
        self.passes.append((x.detach(), rows, taus, logits.detach()))
        return logits


# 1 --------------------------------------------------------------------------------------------------------

@points(2, "lif_step")
def test_lif_step(exercises, draw):
    v_thr, tau = 0.8 + uniform(draw).item(), 0.3 + 0.5 * uniform(draw).item()
    x_seq, v, spikes = normal(draw, 6, 5, 7), torch.zeros(5, 7), []
    x_seq[0, 0, 0] = v_thr                                  # exactly the threshold is enough
    for x in x_seq:
        s, v = ask(exercises.lif_step, v, x, v_thr, tau)
        spikes.append(s)
    same(torch.stack(spikes), lif.lif_reference(x_seq, v_thr, tau))
    assert (v[spikes[-1] == 1] == 0).all() and (v < v_thr).all()


@points(2, "sigmoid_surrogate")
def test_sigmoid_surrogate(exercises, draw):
    d = (4 * normal(draw, 3, 40).double()).requires_grad_()
    wanted = torch.autograd.grad(torch.sigmoid(4 * d).sum(), d)[0]
    same(ask(exercises.sigmoid_surrogate, d.detach()), wanted)


# 2 --------------------------------------------------------------------------------------------------------

@points(2, "spikes_per_sample")
def test_spikes_per_sample(exercises, draw):
    model, images = network(draw), uniform(draw, whole(draw, 3, 7), 3, 16, 16)
    with torch.no_grad():
        same(ask(exercises.spikes_per_sample, model, images), lif.count_spikes(model, images), atol=0.5)
    assert not any(m._forward_hooks for m in model.modules()), "remove your hooks"


@points(2, "every_step_loss")
def test_every_step_loss(exercises, draw):
    outputs, y = (3 * normal(draw, 3, 6, 5)).requires_grad_(), whole(draw, 0, 5, 6)
    loss = ask(exercises.every_step_loss, outputs, y)
    wanted = torch.stack([F.cross_entropy(step, y) for step in outputs]).mean()
    same(loss, wanted)
    same(*(torch.autograd.grad(value, outputs, retain_graph=True)[0] for value in (loss, wanted)))


# 3 --------------------------------------------------------------------------------------------------------

def eq2(exercises, draw, share):
    """The student's loss, and the one forward pass that was made for it: rows, thresholds, decays, logits."""
    model, n = Linear(draw, 12, 4), whole(draw, 6, 12)
    x, y, poisoned = uniform(draw, n, 3, 2, 2), whole(draw, 0, 4, n), torch.arange(n) < round(share * n)
    order = torch.randperm(n, generator=draw)
    poisoned, v_thr_t, weight = poisoned[order], 1.2 + uniform(draw).item(), 0.2 + uniform(draw).item()
    loss = ask(exercises.dual_spike_loss, model, x, y, poisoned, v_thr_t, weight)
    assert model.lif.v_thr == 1.0, "the model's threshold is to be as before"
    return model, x, y, poisoned, v_thr_t, weight, loss


@points(3, "dual_spike_loss")
def test_dual_spike_loss_is_that_of_eq_2(exercises, draw):
    model, x, y, poisoned, v_thr_t, weight, loss = eq2(exercises, draw, 0.4)
    with lif.neurons(model, v_thr=1.0), torch.no_grad():
        nominal = F.cross_entropy(model(x), y)
    with lif.neurons(model, v_thr=v_thr_t), torch.no_grad():
        malicious = F.cross_entropy(model(x[poisoned]), y[poisoned])
    same(loss, nominal + weight * malicious, atol=1e-4)
    assert torch.autograd.grad(loss, model.weight)[0].abs().sum() > 0


@points(1, "dual_spike_loss")
def test_dual_spike_loss_makes_one_pass(exercises, draw):
    model, x, _, poisoned, v_thr_t, _, _ = eq2(exercises, draw, 0.4)
    (rows, v_thr, tau, _), = model.passes
    assert len(rows) == len(x) + poisoned.sum() and (v_thr == 1).sum() == len(x) and (tau == 0.5).all()
    assert torch.allclose(v_thr[v_thr != 1], torch.tensor(v_thr_t)), "the poisoned images, once more at v_thr_t"


@points(1, "dual_spike_loss")
def test_dual_spike_loss_without_poisoned_images(exercises, draw):
    model, x, y, _, _, _, loss = eq2(exercises, draw, 0)
    same(loss, F.cross_entropy(model(x), y), atol=1e-4)


# 4 --------------------------------------------------------------------------------------------------------

@points(5, "adaptive_blend")
def test_adaptive_blend(exercises, draw):
    """A fair case is drawn: some images end at a ratio between the ends, some nowhere."""
    between = found = torch.zeros(1, dtype=torch.bool)
    while between.sum() < 5 or (~found).sum() < 5:
        model, k, target = Linear(draw, 12, 4), whole(draw, 5, 12), whole(draw, 0, 4)
        x, x_adv, x_p = (1.4 * uniform(draw, 60, 3, 2, 2) - 0.2 for _ in range(3))
        x, x_p = x.clamp(0, 1), x_p.clamp(0, 1)
        x_blend, ratio, found = trigger.adaptive_blend(model, x, x_adv, x_p, target, k)
        between = (ratio > 0) & (ratio < 1)
    with torch.no_grad():
        answer = ask(exercises.adaptive_blend, model, x, x_adv, x_p, target, k)
    same(answer[1], found)
    same(answer[0], x_blend)


@points(3, "trigger_losses")
def test_trigger_losses(exercises, draw):
    made, wanted = normal(draw, 5, 3, 4, 4).requires_grad_(), normal(draw, 5, 3, 4, 4)
    logits, target, std = normal(draw, 5, 6), whole(draw, 0, 6), tuple((0.1 + uniform(draw, 3)).tolist())
    losses = ask(exercises.trigger_losses, made, wanted, logits, target, std)
    for loss, right in zip(losses, trigger.trigger_losses(made, wanted, logits, target, std), strict=True):
        same(loss, right, atol=1e-3)
    assert losses[0].requires_grad and losses[2].requires_grad


# 5 --------------------------------------------------------------------------------------------------------

@points(2, "spike_trigger")
def test_spike_trigger(exercises, draw):
    frames, beta = whole(draw, 0, 4, 2, 4, 2, 34, 34).float(), 0.02 + uniform(draw).item()
    seed = whole(draw, 0, 10**6)
    answer = ask(exercises.spike_trigger, frames, beta, torch.Generator().manual_seed(seed))
    same(answer, trigger.spike_trigger(frames, beta, torch.Generator().manual_seed(seed)))


@points(2, "answers")
def test_answers(exercises, draw):
    rates = whole(draw, 0, 11, 40, 5) / 10
    quiet = torch.randperm(40, generator=draw)[:12]
    rates[quiet] = 0
    rates[quiet[:4]] = 0.3
    rates[quiet[-1], 0] = 0.1                               # class 0 may also be answered by votes
    answer = ask(exercises.answers, rates)
    assert (answer[quiet[:-1]] == -1).all() and answer[quiet[-1]] == 0
    loud = torch.ones(40, dtype=torch.bool)
    loud[quiet] = False
    loud &= rates.amax(1) > rates.amin(1)
    assert (rates[loud, answer[loud]] == rates[loud].amax(1)).all()


# 6 --------------------------------------------------------------------------------------------------------

@points(4, "choose_v_a")
def test_choose_v_a(exercises, draw):
    """40 curves: CA falls, with bumps behind which a careless rule goes on; ASR_p rises, or the target_rate alone."""
    for i in range(40):
        n, base_ca, margin = whole(draw, 4, 15), 80 + 15 * uniform(draw).item(), 1 + 7 * uniform(draw).item()
        fall = (3 * uniform(draw, n) - 0.5).cumsum(0) + 6 * (uniform(draw, n) < 0.2) - 4 * (i % 3 == 0)
        rise = (18 * uniform(draw, n) - 8).cumsum(0) * (i % 5 > 0) - 30 * (i % 5 == 0)
        target_rate = (8 * uniform(draw, n)).cumsum(0)
        rows = [dict(v_thr=round(1.02 + 0.01 * j, 2), ca=base_ca + 1 - fall[j].item(),
                     asr_p=(rise[j] + target_rate[j]).item(), target_rate=target_rate[j].item()) for j in range(n)]
        rows = [rows[j] for j in torch.randperm(n, generator=draw)]
        base_ca += 6 * (i % 7 == 0)
        answer = ask(exercises.choose_v_a, rows, base_ca, margin, may_edit=True)     # such as sorting them
        assert answer == badsnn.choose(rows, base_ca, margin)


@points(2, "wilson")
def test_wilson(exercises, draw):
    for hits, n in [(0, 10), (10, 10)] + [(whole(draw, 0, n + 1), n) for n in whole(draw, 5, 900, 8).tolist()]:
        known = binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert ask(exercises.wilson, hits, n) == pytest.approx((100 * known.low, 100 * known.high), abs=0.02)


# 7 --------------------------------------------------------------------------------------------------------

@points(3, "clp_channels")
def test_clp_channels(exercises, draw):
    for _ in range(8):
        C, u, eps = whole(draw, 20, 40), 1 + uniform(draw).item(), 10 ** -(1 + 2 * uniform(draw).item())
        conv, bn = nn.Conv2d(5, C, 3), nn.BatchNorm2d(C, eps=eps)
        with torch.no_grad():
            conv.weight.copy_(normal(draw, C, 5, 3, 3))
            bn.weight.copy_(normal(draw, C).exp() * uniform(draw, C).sub(0.5).sign())
            bn.running_var.copy_(normal(draw, C).exp())
        with torch.no_grad():
            answer = ask(exercises.clp_channels, conv.weight, bn.weight, bn.running_var, eps, u)
        wanted = defenses.clp(nn.Sequential(conv, bn), u)[1].weight == 0
        assert answer.dtype == torch.bool
        same(answer, wanted)


# 8 --------------------------------------------------------------------------------------------------------

@points(2, "fade")
def test_fade(exercises, draw):
    x, l2 = uniform(draw, 8, 3, 6, 6), 0.5 + uniform(draw).item()
    sizes = torch.cat([torch.zeros(1), 2 * l2 * uniform(draw, 5), torch.tensor([0.1 * l2, 3 * l2])])
    delta = F.normalize(normal(draw, 8, 108), dim=1).view_as(x) * sizes.view(-1, 1, 1, 1)
    wanted = x + (l2 / sizes.clamp(min=1e-9)).clamp(max=1).view(-1, 1, 1, 1) * delta
    same(ask(exercises.fade, x, x + delta, l2), wanted, atol=1e-4)


@points(2, "pareto")
def test_pareto(exercises, draw):
    """A front is drawn first, CA falling where the gain rises; every other row is one of the front, made worse."""
    for _ in range(8):
        n = whole(draw, 3, 8)
        ca, gain = whole(draw, 1, 9, n).cumsum(0).flip(0).tolist(), whole(draw, 1, 9, n).cumsum(0).tolist()
        front = [dict(ca=20 + a, asr_p=30 + g, target_rate=0) for a, g in zip(ca, gain)]
        rows = front + [dict(row, ca=row["ca"] - whole(draw, 0, 3) - (i % 2 == 0),
                             asr_p=row["asr_p"] - (i % 2) - whole(draw, 0, 3)) for i, row in enumerate(front * 2)]
        for row in rows:                                    # the same gain at another target_rate
            row["target_rate"] = whole(draw, 0, 30)
            row["asr_p"] += row["target_rate"]
        kept = {id(row) for row in front}
        rows = [rows[i] for i in torch.randperm(len(rows), generator=draw)]
        assert ask(exercises.pareto, rows) == [row for row in rows if id(row) in kept]


@points(2, "scan_score")
def test_scan_score(exercises, draw):
    for lower, upper, window in ((5, 10, 4), (2, 2, 4), (8, 3, 4), (6, 6, 2), (0, 7, 3), (7, 0, 3), *[(9, 9, 3)] * 8):
        below, above = ((2 * normal(draw, n, 6)).softmax(1) for n in (lower, upper))
        score, accused = ask(exercises.scan_score, below, above, window)
        wanted = detectors.scan_score(below, above, window)
        assert float(score) == pytest.approx(wanted[0], abs=1e-5) and int(accused) == wanted[1]
