"""The graded exercises of the course: write the functions below, one or two for every notebook.

    python -m pytest tests/test_exercises.py -k lif_step        is this one right?
    python tests/grading.py                                     all of them, with points

Run these from the repository's folder (with .venv/bin/python after `bash run_all.sh setup`). Every exercise asks for
something of the paper, or of the notebook of that number, which explains it and has the formula. A function that
raises NotImplementedError counts as unsolved. Change nothing but this file, and hand in this file. You may import
torch, math, collections, dataclasses, functools, itertools and typing, and from lif the names LIF and neurons. A file
that imports anything else, or uses open, eval, getattr and the like, is refused.

Shapes: images are floats [B, C, H, W] in [0, 1], event frames are counts [B, T, 2, 34, 34], labels y are integers [B].
`model(images)` returns logits [B, K]. v_thr is a neuron's threshold and tau the share of v that is left one step later.
A function leaves its arguments as they are.
"""
import torch  # noqa: F401  for your answers
import torch.nn.functional as F  # noqa: F401

from lif import LIF, neurons  # noqa: F401

# 1. The spiking neuron --------------------------------------------------------------------------------------

def lif_step(v, x, v_thr, tau):
    """One time step of Eq. 1, discretised as in notebook 1: charge, fire, reset to 0.

    v: membrane potentials [B, ...]; x: input currents, same shape. Returns (s, v): spikes, 0.0 or 1.0, and the
    potentials after the reset, both of that shape."""
    raise NotImplementedError


def sigmoid_surrogate(d):
    """Another surrogate gradient than the triangle: the derivative of sigmoid(4 d), d = v - v_thr of any shape."""
    raise NotImplementedError


# 2. A spiking network ---------------------------------------------------------------------------------------

def spikes_per_sample(model, images):
    """Fig. 2b's vertical axis: for each image the number of spikes of ALL neuron layers (lif.LIF) in all time steps.

    A neuron layer returns spikes [T, B, ...]. Returns [B], for one forward pass, and leaves no hooks behind. Do not
    use lif.count_spikes."""
    raise NotImplementedError


def every_step_loss(outputs, y):
    """The training loss (TET): the cross-entropy of every time step's logits, averaged over steps and samples.

    outputs: logits [T, B, K]; y: labels [B]. Returns a scalar with a gradient. Not the loss of the mean logits."""
    raise NotImplementedError


# 3. Malicious spikes ----------------------------------------------------------------------------------------

def dual_spike_loss(model, x, y, poisoned, v_thr_t, weight):
    """Eq. 2 for one batch, in ONE forward pass (why one: see notebook 3).

    x, y: images and labels of the batch; poisoned: bool [B], which of them belong to D_t^p, perhaps none. Every image
    is learned at the threshold 1.0, the poisoned ones in the same pass a second time at v_thr_t; tau is 0.5. Returns
    the mean cross-entropy of all images at 1.0, plus `weight` times the mean cross-entropy of the poisoned images at
    v_thr_t."""
    raise NotImplementedError


# 4. Triggers for images -------------------------------------------------------------------------------------

def adaptive_blend(model, x, x_adv, x_p, target, k):
    """Eq. 4 in our form: for each image the mixture (1 - a) x_p + a x_adv with the LARGEST a of k equally spaced values
    from 0 to 1 that the model answers with the target. Success need not be monotone in a, so try all of them.

    x, x_adv = x + DeepFool's perturbation, x_p = T_p(x): images [B, C, H, W]. Mixtures are clamped to [0, 1]. Returns
    (x_blend, found): x itself where no a works, and bool [B]."""
    raise NotImplementedError


def trigger_losses(made, wanted, logits, target, std):
    """Eq. 6: (L_sim, L_adv, L_wmse), three scalars, means over the batch.

    made: the U-Net's perturbations, wanted: Delta_x, both [B, C, H, W]; logits [B, K] of x + made. w_chw of a sample is
    1 + |wanted| / max |wanted|; the squared error is that of perturbations divided by std, a tuple of one number per
    channel."""
    raise NotImplementedError


# 5. Events --------------------------------------------------------------------------------------------------

def spike_trigger(frames, beta, generator):
    """T_s, Eq. 7. The noise is torch.rand(frames.shape, generator=generator), stretched to U(-beta, beta)."""
    raise NotImplementedError


def answers(rates):
    """The class that an event network answers, from its firing rates [B, K]: the largest. But where all K rates are
    equal, most often all 0, the network has said nothing: -1, and not class 0. Returns integers [B]."""
    raise NotImplementedError


# 6. Table 1 -------------------------------------------------------------------------------------------------

def choose_v_a(rows, base_ca, margin):
    """Our rule for Eq. 8. rows: dicts with v_thr, ca, asr_p, target_rate, in any order; these you may edit.

    1. The best CA is the largest of base_ca and all rows' ca. 2. Go up from the smallest v_thr and stop BEFORE the
    first row whose ca is less than the best CA minus margin. 3. Among the rows passed, find the best (largest) gain,
    asr_p - target_rate; it may be negative. Return the largest v_thr whose gain is at least that best gain minus 5;
    None if no row was passed."""
    raise NotImplementedError


def wilson(hits, n):
    """The 95 % Wilson interval (Wilson 1927, z = 1.96) of a rate of `hits` in n: (low, high) in percent."""
    raise NotImplementedError


# 7. Defences ------------------------------------------------------------------------------------------------

def clp_channels(weight, gamma, running_var, eps, u):
    """CLP: which channels of a convolution with BatchNorm behind it are switched off, bool [C].

    A channel's bound is the largest singular value of its kernel, weight[c] as a matrix [C_in, k * k], times
    |gamma| / sqrt(running_var + eps). Off are those above the mean plus u standard deviations (torch's default std) of
    the layer's bounds. weight [C, C_in, k, k], gamma and running_var [C]."""
    raise NotImplementedError


# 8. Ablations -----------------------------------------------------------------------------------------------

def fade(x, x_trig, l2):
    """The fair control for T_o: triggered images, moved back towards x where needed, so that no perturbation
    x_trig - x is longer than l2 (L2 norm per image). Shorter ones stay as they are. Images [B, C, H, W]."""
    raise NotImplementedError


def pareto(rows):
    """The attacks that no other beats. rows: dicts with ca, asr_p, target_rate; a row's gain is asr_p - target_rate.

    A row is beaten by another that has ca and gain at least as high and one of them higher. Returns the rows that are
    not beaten, in the order given."""
    raise NotImplementedError


# 9. The threshold scan --------------------------------------------------------------------------------------

def scan_score(below, above, window):
    """The threshold scan's verdict, from the mean probability of each class at thresholds below [V1, K] and above
    [V2, K] the shipped one, each in ascending order of the threshold: (score, accused).

    Average every run of `window` neighbouring thresholds of one side (all of the side, if it has fewer; nothing, if it
    has none). score: the largest average of any run and class; accused: the class it belongs to, an int."""
    raise NotImplementedError
