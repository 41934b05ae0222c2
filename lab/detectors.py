"""Three detectors of backdoors, none of them in the paper: two judge inputs, the third judges the model.

They leave the model as it was. ValueError where it or images hold a NaN, which a neuron may turn into "no spike".
"""
import torch

from kit.sources import need
from kit.training import generator
from lab.libraries import entry, neurons_of, scaled
from lif import LIF, count_spikes
from models import frozen

SCAN = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)     # times the shipped threshold


def logits_of(model, x):
    """A network's answers to x [B, ...] as logits [B, K], differentiable. Event frames: answers are rates."""
    answers = checked(model(x), x)
    return to_logits(answers, ("rates", 10) if x.dim() == 5 else reading_of(answers))


def checked(answers, x):
    shape = list(answers.shape) if isinstance(answers, torch.Tensor) else type(answers).__name__
    need(isinstance(shape, list) and len(shape) == 2 and shape[0] == len(x) and shape[1] > 1,
         f"a network must answer {list(x.shape)} with logits [N, K], K at least 2, the mean over steps, not {shape}")
    need((answers < torch.inf).all(), "the network's answers are no numbers (NaN or infinite)")
    return answers


def reading_of(answers):
    """What answers [N, K] at the shipped thresholds are: "logits", "probabilities" (rows sum to 1, few zeros) or
    "rates" (of spikes, numbers of spikes, sigmoids), and the factor that makes a full vote 10, of which softmax is
    sure. A full vote is 1; of numbers, and of rates below one half, the largest."""
    answers = answers.detach().float()
    most, whole = answers.max().item(), (answers == answers.round()).all()
    if answers.min() < 0 or most > 1 and not whole:
        return "logits", 1
    if ((answers.sum(1) - 1).abs() < 0.01).all() and (answers > 0).float().mean() > 0.5:
        return "probabilities", 1
    return "rates", 10 / (most if most > 1 or 0 < most < 0.5 else 1)


def to_logits(answers, reading):
    return answers.clamp(min=1e-9).log() if reading[0] == "probabilities" else answers * reading[1]


@torch.no_grad()
def answers_of(model, x, batch=256):
    with frozen(model), scaled(model):
        return torch.cat([checked(model(part), part) for part in x.split(batch)]).float()


def probabilities(model, x, reading=None):
    """Softmax of the logits for x [N, ...]: float32 [N, K]."""
    answers = answers_of(model, x)
    return to_logits(answers, reading or reading_of(answers)).softmax(1)


def check_finite(model, *images):
    for name, values in (*model.named_parameters(), *model.named_buffers(), *(("the images", x) for x in images)):
        need(values.isfinite().all(), f"NaN or infinite numbers in {name}: what the network says means nothing")


def entropy(p):
    """Of probabilities [..., K]: [...], in nats."""
    return torch.special.entr(p).sum(-1)


@torch.no_grad()
def strip(model, x, clean, overlays=20, seed=0):
    """STRIP (Gao et al. 2019): mean entropy [B], in nats, of the predictions for x [B, C, H, W] with trusted images
    [N, C, H, W] added to it, not clipped. A trigger survives any overlay: LOW is suspicious.
    # differs from the source: 20 overlays, not 100, to fit a CPU; nats, not bits, which changes no ranking
    """
    check_finite(model, x, clean)
    reading = reading_of(answers_of(model, clean))
    over = torch.randint(len(clean), (len(x), overlays), generator=generator(seed, "STRIP overlays"))
    entropies = [entropy(probabilities(model, (images[:, None] + clean[rows]).flatten(0, 1), reading))
                 for images, rows in zip(x.split(12), over.split(12))]
    return torch.cat(entropies).view(len(x), overlays).mean(1)


def spike_deviation(model, x, clean):
    """|spikes of x - mean| / standard deviation [B], both over clean images; HIGH is suspicious. Images in [0, 1].
    Sec. 3.2 says that triggers change the number of spikes; here that is turned against them."""
    check_finite(model, x, clean)
    need(any(isinstance(m, LIF) for m in model.modules()), "spikes are counted of the neurons of lif.py alone")
    trusted, counts = count_spikes(model, clean), count_spikes(model, x)
    return (counts - trusted.mean()).abs() / trusted.std().clamp(min=1e-12)


def threshold_scan(model, x):
    """What a model says of clean images x [N, C, H, W] in [0, 1] when its thresholds are scaled. Sec. 3.3 turned
    around: beyond the shipped setting lies one at which the model was TAUGHT to be sure of the target.

    A dict: v_thr [V], SCAN times the first neurons' threshold; probability [V, K] and entropy [V]: means, in nats;
    score in [1 / K, 1] and accused: see scan_score (HIGH is suspicious); shipped [N, K]: the probabilities as shipped;
    reading: see reading_of. ValueError for a model without a neuron that is known.
    # prior art: IBD-PSC (Hou et al. 2024) scales BatchNorm, which amounts to thresholds, to judge inputs
    """
    found, unknown = neurons_of(model)
    need(found, f"no spiking neuron that is known in this model; unknown modules: {', '.join(unknown)}")
    v_thr = torch.as_tensor(getattr(found[0], entry(found[0])[0]), dtype=torch.float32).mean().item()
    check_finite(model, x)
    answers = answers_of(model, x)
    reading, p = reading_of(answers), []
    for factor in SCAN:
        with scaled(model, factor):
            p.append(probabilities(model, x, reading))
    p, middle = torch.stack(p), sum(factor < 1 for factor in SCAN)                                      # [V, N, K]
    probability = p.mean(1)
    score, accused = scan_score(probability[:middle], probability[middle:], window=4)
    return dict(v_thr=[round(factor * v_thr, 4) for factor in SCAN], probability=probability, score=score,
                entropy=entropy(p).mean(1), accused=accused, reading=reading[0],
                shipped=to_logits(answers, reading).softmax(1))


def scan_score(below, above, window):
    """(score, accused): the largest mean that one class has over `window` neighbouring rows of one side (or over the
    side, if it is shorter), and that class. below, above: mean probabilities [V, K] at ascending thresholds on either
    side of the shipped one."""
    means = [side.unfold(0, min(window, len(side)), 1).mean(2) for side in (below, above) if len(side)]
    best = torch.cat(means).amax(0)     # of each class
    return best.max().item(), best.argmax().item()
