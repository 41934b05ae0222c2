"""Every setting of an experiment, written once: its meaning, unit and range, the data sets' presets, the command line.

    s = preset("digits", epochs=5)                 # a data set's preset with changes; raises ValueError for a bad value
    variant = dataclasses.replace(s, seed=1)       # settings never change; a variant is a new object
    command, s = parse(["attack", "--dataset", "digits", "--epochs", "5"])     # the same from a command line

The values follow Sec. 4.1 and Table 1 of the paper where it gives them. Where it does not (epochs, learning rates, the
exponent q and more), ours were chosen on held-out training images; results/README.md lists what differs.
"""
import argparse
import contextlib
import math
import sys
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from lif import TAU_N
from models import NEURONS, WIDTHS

ATTACKS = ("badnets", "blend", "wanet", "clean_label")                      # Table 2's other attacks
EVENT_ATTACKS = ("static", "moving", "smart", "flashy")                      # the same for event data
STUDIES = ("threshold", "heatmap", "poison", "magnitude", "power", "trigger", "plif", "events", "recipe")

# Ranges: how an error message says them, and the check. NaN fails every comparison, infinity is never asked for.
POSITIVE = "greater than 0", lambda v: 0 < v < math.inf
SHARE = "greater than 0 and at most 1", lambda v: 0 < v <= 1
BELOW_1 = "at least 0 and less than 1", lambda v: 0 <= v < 1
DECAY = "between 0 and 1", lambda v: 0 <= v <= 1


def at_least(least):
    return f"at least {least}", lambda v: least <= v < math.inf


def setting(group, default, text, allowed=None, choices=None):
    """A field: its group, its default, the text that documents it here and in --help, its range, or its only values."""
    return field(default=default, metadata=dict(group=group, text=text, allowed=allowed, choices=choices))


@dataclass(frozen=True)
class Settings:
    """All settings of a run. Each belongs to a group; `of` returns the values of groups."""
    dataset: str = setting("data", "digits", "digits, ndigits, cifar10, cifar100, gtsrb, nmnist, or an .npz file")
    n_train: int = setting("data", None, "use only so many training samples", at_least(2))
    n_test: int = setting("data", None, "use only so many test samples", at_least(1))
    frames: str = setting("data", "counts", "event frames: counts, or clamped to [0, 1]", choices=("counts", "binary"))
    hold_out: float = setting("data", 0.1, "share of the training set on which the attacker chooses V_a",
                              ("greater than 0 and less than 1", lambda v: 0 < v < 1))

    model: str = setting("network", "resnet19", "network", choices=tuple(WIDTHS))
    width: int = setting("network", None, "channels of the first stage (16 unless given; the sources have 64 or 128)",
                         at_least(1))
    T: int = setting("network", 4, "time steps", at_least(1))
    neuron: str = setting("network", "lif", "neuron; plif learns its tau", choices=tuple(NEURONS))

    epochs: int = setting("training", 30, "passes over the training samples", at_least(1))
    batch_size: int = setting("training", 64, "nominal samples per step, over all processes", at_least(1))
    lr: float = setting("training", 0.1, "peak learning rate of the one-cycle schedule", POSITIVE)
    optimizer: str = setting("training", "sgd", "optimiser", choices=("sgd", "adam"))
    loss: str = setting("training", "tet", "tet: cross-entropy of every step; ce: of the mean; mse: squared error",
                        choices=("tet", "ce", "mse"))
    label_smoothing: float = setting("training", 0.1, "of the nominal samples' labels", BELOW_1)
    growing_T: tuple = setting("training", (0.4, 0.7), "shares of the epochs up to which T is 1, then 2 (0 0: never)",
                               ("two numbers from 0 to 1, ascending", lambda v: len(v) == 2 and 0 <= v[0] <= v[1] <= 1))
    augment: bool = setting("training", True, "random shifts, flips and contrast")
    pad: int = setting("training", 4, "largest random shift, in pixels (WaNet: none)", at_least(0))
    flip: bool = setting("training", False, "random mirroring")
    contrast: float = setting("training", 0.0, "lift black by up to this share, shrink the rest alike", BELOW_1)
    seed: int = setting("training", 0, "first seed", at_least(0))
    amp: str = setting("training", "auto", "bfloat16: auto measures which is faster where training takes over a minute",
                       choices=("auto", "on", "off"))

    target: int = setting("attack", 0, "target class y_t", at_least(0))
    poison_ratio: float = setting("attack", 0.05, "P, the share of the target class trained maliciously, too", SHARE)
    n_poison: int = setting("attack", None, "so many samples instead of P, at most half of the class", at_least(1))
    v_thr_t: float = setting("attack", 1.5, "malicious threshold V_t, of every row unless --v-thr-t-low", POSITIVE)
    v_thr_t_low: float = setting("attack", None, "draw each malicious row's threshold from here to V_t (none: V_t)",
                                 POSITIVE)
    tau_t: float = setting("attack", 0.5, "malicious decay per step tau_t (plif: as learned)", DECAY)
    malicious_rows: int = setting("attack", 32, "malicious samples per step, drawn with replacement", at_least(1))
    malicious_weight: float = setting("attack", 0.3, "weight of their loss", at_least(0))
    malicious_contrast: float = setting("attack", None, "contrast of the malicious rows (none: the same)", BELOW_1)
    warmup: int = setting("attack", 2, "epochs before the first malicious sample", at_least(0))

    baseline_ratio: float = setting("baselines", 0.05, "share that BadNets, Blended, event attacks poison", SHARE)
    wanet_ratio: float = setting("baselines", 0.1, "share of every batch that WaNet poisons", SHARE)
    warp: float = setting("baselines", 2.0, "strength s of WaNet's warp", POSITIVE)
    warp_noise: int = setting("baselines", 0, "WaNet: samples with extra noise for every poisoned one", at_least(0))
    clean_label_ratio: float = setting("baselines", 0.8, "share of the target class that clean-label poisons", SHARE)
    pgd_eps: float = setting("baselines", 16 / 255, "clean-label: how far PGD may move a pixel", SHARE)

    v_thr_a: tuple = setting("deployment", (1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3), "thresholds V_a of the curve",
                             ("all greater than 0", lambda values: all(0 < v < math.inf for v in values)))
    tau_a: float = setting("deployment", TAU_N, "deployed decay per step tau_a (plif: as learned)", DECAY)
    margin: float = setting("deployment", 2.0, "points of CA that V_a may cost on held-out images", at_least(0))

    q: float = setting("triggers", 2.0, "exponent of T_p", POSITIVE)
    beta: float = setting("triggers", 0.03, "strength of T_s", at_least(0))
    adversarial_setting: str = setting("triggers", "S_a", "setting of T_o's adversarial loss", choices=("S_a", "S_n"))
    lambdas: tuple = setting("triggers", (1.0, 1.0, 1.0), "weights of T_o's losses (Eq. 5; the paper: 1 0.1 1)", (
        "three numbers of at least 0", lambda w: len(w) == 3 and all(0 <= v < math.inf for v in w)))
    nominal_weight: float = setting("triggers", 0.3, "weight of T_o's loss at the nominal setting", at_least(0))
    budget: float = setting("triggers", 0.1, "largest root mean square of T_o's change, pixels in [0, 1]", POSITIVE)
    epochs_o: int = setting("triggers", 40, "epochs of T_o's U-Net", at_least(1))
    n_o: int = setting("triggers", 600, "training images that T_o learns from", at_least(1))
    magnitude: float = setting("triggers", None, "factor m on T_o's output (none: least that works, or 1)", at_least(0))

    seeds: int = setting("averaging", 1, "number of seeds to average", at_least(1))

    # "run": where and how, which decides no result
    device: str = setting("run", "auto", "auto, cpu, cuda, ... (auto: cuda if there is one)")
    processes: int = setting("run", None, "models trained side by side (none: the free cores; on a GPU 1)", at_least(1))
    variant: str = setting("run", "", "write to a folder of its own, DATASET_VARIANT")
    data: Path = setting("run", Path("data"), "folder of the data sets")
    runs: Path = setting("run", Path("runs"), "folder of the checkpoints")
    results: Path = setting("run", Path("runs/results"), "folder of the results")
    fresh: bool = setting("run", False, "train anew; the default goes on with what the folder of the checkpoints holds")
    debug: bool = setting("run", False, "show the traceback of an error")

    def __post_init__(self):
        """Checks every field's range (its type is the caller's affair), and fills in the rest. Raises ValueError."""
        for f in fields(self):
            value, choices, allowed = getattr(self, f.name), f.metadata["choices"], f.metadata["allowed"]
            if choices and value not in choices:
                raise ValueError(f"{flag(f.name)} must be one of {', '.join(choices)}, not {value!r}")
            if allowed and value is not None and not allowed[1](value):
                raise ValueError(f"{flag(f.name)} must be {allowed[0]}, not {value}")
        if self.neuron != "plif" and None in (self.tau_t, self.tau_a):
            raise ValueError("these settings were made for PLIF, whose tau is learned; start from preset() for LIF")
        if self.v_thr_t_low is not None and self.v_thr_t_low > self.v_thr_t:
            raise ValueError(f"--v-thr-t-low must be at most --v-thr-t, not {self.v_thr_t_low}")
        if not all(c.isalnum() or c in "-_" for c in self.variant) or len(self.variant) > 50:
            raise ValueError(f"--variant must be at most 50 letters, digits, - and _, not {self.variant!r}")
        filled = {f.name: tuple(getattr(self, f.name)) for f in fields(self) if f.type is tuple}
        filled.update(width=self.width or WIDTHS[self.model], v_thr_a=tuple(sorted(set(self.v_thr_a))),
                      device=usable_device(self.device))
        if self.neuron == "plif":
            filled.update(tau_t=None, tau_a=None)       # lif.neurons leaves the learned tau alone
        if filled["device"].startswith("cuda") and self.amp == "auto":
            filled["amp"] = "on" if torch.cuda.is_bf16_supported() else "off"
        for name, value in filled.items():
            object.__setattr__(self, name, value)       # the one place where a frozen object is still being made

    def of(self, *groups):
        """The settings of some groups (none: of all that decide a result) as a dict of values that JSON can hold."""
        values = {f.name: getattr(self, f.name) for f in fields(self)
                  if (f.metadata["group"] in groups if groups else f.metadata["group"] != "run")}
        if self.neuron == "plif":
            values.update({name: "learned" for name in ("tau_t", "tau_a") if name in values})
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def attacks_on(s):
    """The attacks of Table 2 that fit the data."""
    return "badsnn", *(EVENT_ATTACKS if s.model == "nmnist_net" else ATTACKS)


def flag(name):
    """A field's option on the command line."""
    return ("--no-" if getattr(Settings, name) is True else "--") + name.replace("_", "-")


def usable_device(name):
    """The device's name, checked by putting a number there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:      # torch has many: runtime, assertion, import and other errors
        raise ValueError(f"--device {name} is not usable here ({' '.join(str(error).split())[:150]})") from None
    return name


# What a data set changes in the defaults. n_poison: what the paper's P gives on the whole set.
EVENTS = dict(model="nmnist_net", n_poison=178, batch_size=32, lr=1e-3, optimizer="adam", loss="mse", pad=1,
              baseline_ratio=0.1, label_smoothing=0.0, growing_T=(0, 0), v_thr_a=(1.0, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5))
CIFAR = dict(malicious_rows=16, flip=True, v_thr_t_low=1.15, malicious_contrast=0.5)
PRESETS = {
    "digits": dict(epochs=20, batch_size=32, pad=1, contrast=0.2, poison_ratio=0.5, v_thr_t_low=1.15, q=3.0, n_o=200,
                   malicious_contrast=0.5, epochs_o=20, nominal_weight=0.0, budget=None, amp="off"),
    "cifar10": CIFAR | dict(n_poison=100, q=4.0, margin=3.0),
    "cifar100": CIFAR | dict(poison_ratio=0.5, margin=5.0, warp=4.0, pad=0),
    "gtsrb": dict(model="vgg16", n_poison=8, tau_t=0.8),
    "nmnist": EVENTS,
    "ndigits": EVENTS | dict(epochs=15),
}


def preset(dataset, **changes):
    """The preset of a data set, or of images or events for one's own .npz file, with changes. Raises ValueError."""
    known = {f.name for f in fields(Settings)}
    for name in changes:
        if name not in known:
            raise ValueError(f"there is no setting {name!r}; known: {', '.join(sorted(known))}")
    for name in {"tau_t", "tau_a"} & set(changes):
        if changes.get("neuron") == "plif" and changes[name] is not None:
            raise ValueError(f"{flag(name)} has no meaning with --neuron plif, which learns its tau; leave it out")
    base = PRESETS.get(dataset) or (EVENTS if _holds_events(dataset) else {})
    if None not in (changes.get("poison_ratio"), changes.get("n_poison")):
        raise ValueError("give --poison-ratio or --n-poison, not both")
    other = dict(poison_ratio="n_poison", v_thr_t="v_thr_t_low")        # what of a preset's would hide or contradict it
    own = {other[name]: None for name in changes if name in other}
    return Settings(**base | own | dict(changes, dataset=str(dataset)))


def _holds_events(path):
    """Whether the .npz file holds event frames, by the header of x_train; data.load() says what is wrong with it."""
    with contextlib.suppress(Exception):
        with zipfile.ZipFile(path) as file, file.open("x_train.npy") as header:
            np.lib.format.read_magic(header)
            return len(np.lib.format.read_array_header_1_0(header)[0]) == 5
    return False


# ---------------------------------------------------------------------------------------------------------
# The command line, made from the fields

class Parser(argparse.ArgumentParser):
    """Every error in one line on stderr, exit code 2."""
    def error(self, message):
        self.exit(2, f"badsnn: {message}\n")


COMMANDS = {"story": "one attack and what stops it, with a verdict", "attack": "Table 1's row of a data set",
            "defend": "Table 2's rows of a data set", "ablate": "figures of the paper",
            "scan": "is a network backdoored? the threshold scan over many models, or over one of your own"}


def parse(argv=None):
    """Command line -> (the command and its own options, the Settings of its data set). Raises ValueError."""
    parser = Parser(prog="badsnn.py", description="BadSNN: backdoor attacks on spiking neural networks.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, argument_default=argparse.SUPPRESS, epilog=_presets(),
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == "defend":
            every = ("badsnn", *ATTACKS, *EVENT_ATTACKS)
            command.add_argument("--attacks", nargs="+", choices=every, default=None, metavar="V",
                                 help=f"of {', '.join(every)}; the last {len(EVENT_ATTACKS)} are on events")
        if name == "ablate":
            command.add_argument("--study", choices=STUDIES, required=True, nargs="+",
                                 help="one or more; Fig. 2: threshold, 3: heatmap, 4a: poison, 4b: magnitude, 6: plif; "
                                      "power: T_p's q; trigger: T_o's presets; events: T_s, others; recipe: speed")
        if name == "scan":
            command.add_argument("--models", type=int, default=40, metavar="V",
                                 help="digits: so many clean and so many backdoored models are scanned (default: 40)")
            command.add_argument("--weights", default=None, metavar="V",
                                 help="file of a state_dict: scan this network instead")
            command.add_argument("--build", default=None, metavar="V",
                                 help="package.module:function that makes it; --data is then an .npz file of images")
        names = dict.fromkeys(f.metadata["group"] for f in fields(Settings))
        groups = {group: command.add_argument_group(group) for group in names}
        for f in fields(Settings):
            _add_option(groups[f.metadata["group"]], f)
    command = commands.add_parser("report", help="figures and tables, from the results",
                                  argument_default=argparse.SUPPRESS)
    command.add_argument("--publish", action="store_true", default=False,
                         help="for maintainers: copy the results to results/ and rewrite the pages made from them")
    for f in fields(Settings):
        if f.name in ("results", "debug"):
            _add_option(command, f)
    given = vars(parser.parse_args(argv))
    own = argparse.Namespace(**{k: given.pop(k) for k in ("command", "attacks", "study", "publish",
                                                                  "models", "weights", "build") if k in given})
    # every study and attack once
    vars(own).update({k: list(dict.fromkeys(v)) for k, v in vars(own).items() if isinstance(v, list)})
    refused = {"plif", "events", *(("heatmap", "scan") if given.get("neuron") == "plif" else ())}
    refused &= {*getattr(own, "study", ()), own.command}
    if "neuron" in given and refused:
        raise ValueError(f"{min(refused)} sets tau or compares neurons; leave out --neuron")
    if own.command == "scan":
        if (own.weights is None) != (own.build is None):
            raise ValueError("scan needs --weights and --build together, or neither")
        if own.models < 5:
            raise ValueError(f"--models must be at least 5, not {own.models}")
    s = preset(given.pop("dataset", "digits"), **given)
    if not {*(getattr(own, "attacks", None) or ())} <= {*attacks_on(s)}:
        raise ValueError(f"--attacks on {s.dataset} must be of {', '.join(attacks_on(s))}")
    return own, s


def _add_option(group, f):
    default = f" (default: {_plain(f.default)})" if f.default not in (None, "") and f.type is not bool else ""
    text, choices = f.metadata["text"].replace("%", "%%") + default, f.metadata["choices"]
    if f.type is bool:
        group.add_argument(flag(f.name), action="store_false" if f.default else "store_true", dest=f.name,
                           help="no " * f.default + text)
    elif f.type is tuple:
        group.add_argument(flag(f.name), nargs="+", type=float, metavar="V", help=text)
    else:
        group.add_argument(flag(f.name), type=f.type, choices=choices, metavar=None if choices else "V", help=text)


def _plain(value):
    return " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def _presets():
    lines = ["presets of the data sets, where they differ from the defaults:"]
    for name, changed in PRESETS.items():
        lines.append(f"  {name}: " + " ".join(
            "no " * (value is None) + flag(key) + f" {_plain(value)}" * (not isinstance(value, bool | None))
            for key, value in changed.items()))
    return "\n".join(lines)


def refuse(error):
    """One line on stderr; returns the exit code for it."""
    print(f"badsnn: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
