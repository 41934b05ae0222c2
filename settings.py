"""Every setting of an experiment, written once: its meaning, unit and range, the data sets' presets, and the command line.

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
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from lif import TAU_N, check_setting
from models import NEURONS, WIDTHS

ATTACKS = ("badnets", "blend", "wanet", "clean_label")                      # Table 2's other attacks
STUDIES = ("threshold", "heatmap", "poison", "magnitude", "power", "trigger", "plif")

# Ranges: how an error message says them, and the check. NaN fails every comparison, infinity is never asked for.
POSITIVE = "greater than 0", lambda v: 0 < v < math.inf
SHARE = "greater than 0 and at most 1", lambda v: 0 < v <= 1


def at_least(least):
    return f"at least {least}", lambda v: least <= v < math.inf


def setting(default, text, allowed=None, choices=None):
    """A field: its default, the text that documents it here and in --help, its range, or the only values it may have."""
    return field(default=default, metadata=dict(text=text, allowed=allowed, choices=choices))


@dataclass(frozen=True)
class Settings:
    """All settings of a run. Fields are grouped; a group's name stands in GROUPS, and `of` returns the values of groups."""
    # data
    dataset: str = setting("digits", "digits, ndigits, cifar10, cifar100, gtsrb, nmnist, or a path to an .npz file")
    n_train: int = setting(None, "use only so many training samples", at_least(2))
    n_test: int = setting(None, "use only so many test samples", at_least(1))
    frames: str = setting("counts", "event frames: counts, or clamped to [0, 1] from the start", choices=("counts", "binary"))
    # network
    model: str = setting("resnet19", "network", choices=tuple(WIDTHS))
    width: int = setting(None, "channels of the first stage (16 unless given; the paper has 128, 64, 128)", at_least(1))
    T: int = setting(4, "time steps", at_least(1))
    neuron: str = setting("lif", "neuron; plif learns its tau", choices=tuple(NEURONS))
    # training
    epochs: int = setting(30, "passes over the training samples", at_least(1))
    batch_size: int = setting(128, "nominal samples per step, over all processes", at_least(1))
    lr: float = setting(0.1, "peak learning rate of the one-cycle schedule", POSITIVE)
    optimizer: str = setting("sgd", "optimiser", choices=("sgd", "adam"))
    loss: str = setting("ce", "cross-entropy, or squared error between firing rates and labels", choices=("ce", "mse"))
    augment: bool = setting(True, "random shifts, flips and contrast")
    pad: int = setting(4, "largest random shift, in pixels", at_least(0))
    flip: bool = setting(False, "random mirroring")
    contrast: float = setting(0.0, "lift black by up to this share, scale the rest by 1 minus it or more",
                              ("at least 0 and less than 1", lambda v: 0 <= v < 1))
    seed: int = setting(0, "first seed", at_least(0))
    amp: str = setting("auto", "bfloat16: auto is on for a GPU that has it, or a CPU with AMX", choices=("auto", "on", "off"))
    # attack (Sec. 3.3.1)
    target: int = setting(0, "target class y_t", at_least(0))
    poison_ratio: float = setting(0.05, "P, the share of the target class that is also trained maliciously", SHARE)
    v_thr_t: float = setting(1.5, "malicious threshold V_t")
    tau_t: float = setting(0.5, "malicious decay per step tau_t")
    malicious_rows: int = setting(8, "malicious samples per step, drawn with replacement", at_least(1))
    malicious_weight: float = setting(0.3, "weight of their loss", at_least(0))
    warmup: int = setting(2, "epochs before the first malicious sample", at_least(0))
    # baselines
    baseline_ratio: float = setting(0.05, "share of the training set that a baseline attack poisons", SHARE)
    # deployment (Sec. 3.3.4)
    v_thr_a: tuple = setting((1.0, 1.05, 1.1, 1.15, 1.2), "deployed thresholds V_a to try")
    tau_a: float = setting(TAU_N, "deployed decay per step tau_a")
    margin: float = setting(8.0, "the chosen V_a may cost so many points of CA", at_least(0))
    v_thr_d: float = setting(1.1, "threshold at which defend deploys BadSNN")
    # triggers (Secs. 3.3.2, 3.3.3)
    q: float = setting(2.0, "exponent of T_p", POSITIVE)
    beta: float = setting(0.03, "strength of T_s", at_least(0))
    v_thr_o: float = setting(1.1, "threshold at which T_o is trained")
    adversarial_setting: str = setting("S_a", "neuron setting of T_o's adversarial loss", choices=("S_a", "S_n"))
    lambdas: tuple = setting((1.0, 0.1, 1.0), "weights of T_o's three losses (Eq. 5)")
    epochs_o: int = setting(8, "epochs of T_o's U-Net", at_least(1))
    n_o: int = setting(600, "training images that T_o learns from", at_least(1))
    magnitude: float = setting(1.0, "factor on T_o's output", at_least(0))
    # defences (Sec. 4.3)
    defense_lr: float = setting(0.01, "learning rate of the defences fine-tuning and NAD", POSITIVE)
    # averaging
    seeds: int = setting(1, "number of seeds to average", at_least(1))
    # run: where and how, which decides no result
    device: str = setting("auto", "auto, cpu, cuda, ... (auto: cuda if there is one)")
    data: Path = setting(Path("data"), "folder of the data sets")
    runs: Path = setting(Path("runs"), "folder of the checkpoints")
    results: Path = setting(Path("results"), "folder of the results")
    fresh: bool = setting(False, "train anew; the default goes on with what is in the folder of the checkpoints")
    debug: bool = setting(False, "show the traceback of an error")

    def __post_init__(self):
        """Checks every field's range, and fills in what depends on the machine. Raises ValueError."""
        for f in fields(self):
            value, choices, allowed = getattr(self, f.name), f.metadata["choices"], f.metadata["allowed"]
            if choices and value not in choices:
                raise ValueError(f"{flag(f.name)} must be one of {', '.join(choices)}, not {value!r}")
            if allowed and value is not None and not allowed[1](value):
                raise ValueError(f"{flag(f.name)} must be {allowed[0]}, not {value}")
        for v_thr, tau in ((self.v_thr_t, self.tau_t), (torch.tensor(self.v_thr_a), self.tau_a), (self.v_thr_o, None), (self.v_thr_d, None)):
            check_setting(v_thr, tau)
        if len(self.lambdas) != 3 or not all(0 <= v < math.inf for v in self.lambdas):
            raise ValueError(f"--lambdas must be three numbers of at least 0, not {self.lambdas}")
        filled = dict(width=self.width or WIDTHS[self.model], v_thr_a=tuple(sorted(set(self.v_thr_a))), lambdas=tuple(self.lambdas),
                      device=usable_device(self.device))
        if self.amp == "auto":
            filled["amp"] = "on" if bfloat16_pays(filled["device"]) else "off"
        for name, value in filled.items():
            object.__setattr__(self, name, value)       # the one place where a frozen object is still being made

    def of(self, *groups):
        """The settings of some GROUPS (none: of all that decide a result) as plain values that JSON can hold: {name: value}."""
        groups = groups or [group for group in GROUPS if group != "run"]
        values = {name: getattr(self, name) for group in groups for name in GROUPS[group]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


GROUPS = {"data": "dataset n_train n_test frames", "network": "model width T neuron",
          "training": "epochs batch_size lr optimizer loss augment pad flip contrast seed amp",
          "attack": "target poison_ratio v_thr_t tau_t malicious_rows malicious_weight warmup", "baselines": "baseline_ratio",
          "deployment": "v_thr_a tau_a margin v_thr_d",
          "triggers": "q beta v_thr_o adversarial_setting lambdas epochs_o n_o magnitude", "defences": "defense_lr",
          "averaging": "seeds", "run": "device data runs results fresh debug"}
GROUPS = {group: names.split() for group, names in GROUPS.items()}


def flag(name):
    """A field's option on the command line."""
    return {"augment": "--no-augment"}.get(name, "--" + name.replace("_", "-"))


def usable_device(name):
    """The device's name, checked by putting a number there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not usable here ({str(error).splitlines()[0]})") from None
    return name


def bfloat16_pays(device):
    """Whether a GPU has bfloat16, or this CPU matrix units for it."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


IMAGES = Settings()
EVENTS = replace(IMAGES, model="nmnist_net", poison_ratio=0.03, batch_size=32, lr=1e-3, optimizer="adam", loss="mse", pad=1)
PRESETS = {
    # contrast: T_p makes images grey and pale, and what a network says of grey is chance unless it has seen some in training
    "digits": replace(IMAGES, dataset="digits", epochs=16, batch_size=32, pad=1, contrast=0.6, malicious_rows=32,
                      lambdas=(1.0, 1.0, 1.0), q=32.0, epochs_o=32, magnitude=0.9, v_thr_o=1.125, v_thr_d=1.125, margin=4.0,
                      defense_lr=0.1, v_thr_a=(1.0, 1.05, 1.1, 1.125, 1.15, 1.2)),
    "cifar10": replace(IMAGES, dataset="cifar10", poison_ratio=0.02, flip=True, epochs=20, lambdas=(1.0, 1.0, 1.0), epochs_o=16,
                       v_thr_t=1.2, v_thr_o=1.07, v_thr_d=1.07, v_thr_a=(1.0, 1.05, 1.06, 1.07, 1.08, 1.1, 1.15, 1.2)),
    "cifar100": replace(IMAGES, dataset="cifar100", model="vgg16", poison_ratio=0.01, flip=True),
    "gtsrb": replace(IMAGES, dataset="gtsrb", model="vgg16", tau_t=0.8, epochs=20, lambdas=(1.0, 1.0, 1.0), epochs_o=16,
                     magnitude=0.7, v_thr_d=1.2),
    "nmnist": replace(EVENTS, dataset="nmnist"),
    "ndigits": replace(EVENTS, dataset="ndigits", poison_ratio=0.05, epochs=15),
}


def preset(dataset, **changes):
    """The preset of a data set, or of images or events for an .npz file of one's own, with changes. Raises ValueError."""
    known = {f.name for f in fields(Settings)}
    for name in changes:
        if name not in known:
            raise ValueError(f"there is no setting {name!r}; known: {', '.join(sorted(known))}")
    base = PRESETS.get(dataset) or (EVENTS if _holds_events(dataset) else IMAGES)
    return replace(base, dataset=str(dataset), **changes)


def _holds_events(path):
    """Whether the .npz file at path holds event frames, from the header of x_train alone. data.load() names what is wrong with it."""
    with contextlib.suppress(OSError, KeyError, ValueError, zipfile.BadZipFile):
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


def parse(argv=None):
    """Command line -> (the command and its own options, the Settings of its data set). Raises ValueError for a bad value."""
    parser = Parser(prog="badsnn.py", description="BadSNN: backdoor attacks on spiking neural networks.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, text in (("attack", "Table 1's row of a data set"), ("defend", "Table 2's rows of a data set"),
                       ("ablate", "one of the paper's figures")):
        command = commands.add_parser(name, help=text, argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
                                      epilog=_presets_differ())
        if name == "defend":
            every = ("badsnn", *ATTACKS)
            command.add_argument("--attacks", nargs="+", choices=every, default=every, metavar="V", help=f"rows: {', '.join(every)}")
        if name == "ablate":
            command.add_argument("--study", choices=STUDIES, required=True,
                                 help="Fig. 2: threshold, 3: heatmap, 4a: poison, 4b: magnitude, 6: plif; power: q of T_p; trigger: "
                                      "T_o's presets")
        _add_options(command)
    command = commands.add_parser("report", help="figures and tables, from the results alone", argument_default=argparse.SUPPRESS)
    for f in fields(Settings):
        if f.name in ("results", "debug"):
            _add_option(command, f)
    given = vars(parser.parse_args(argv))
    own = argparse.Namespace(**{name: given.pop(name) for name in ("command", "attacks", "study") if name in given})
    return own, preset(given.pop("dataset", "digits"), **given)


def _add_options(command):
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    groups = {group: command.add_argument_group(group) for group in GROUPS}
    for f in fields(Settings):
        _add_option(groups[group_of[f.name]], f)


def _add_option(group, f):
    text = f.metadata["text"].replace("%", "%%") + (f" (default: {_plain(f.default)})" if f.default is not None and f.type is not bool else "")
    if f.name == "augment":
        group.add_argument("--no-augment", action="store_false", dest="augment", help=f"no {text}")
    elif f.type is bool:
        group.add_argument(flag(f.name), action="store_true", help=text)
    elif f.type is tuple:
        group.add_argument(flag(f.name), nargs="+", type=float, metavar="V", help=text)
    else:
        group.add_argument(flag(f.name), type=f.type, choices=f.metadata["choices"], metavar=None if f.metadata["choices"] else "V", help=text)


def _plain(value):
    return " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def _presets_differ():
    """Which defaults a data set changes, for the end of --help."""
    lines = ["presets of the data sets, where they differ from the defaults:"]
    for name, s in PRESETS.items():
        changed = [f"{flag(f.name)} {_plain(getattr(s, f.name))}" for f in fields(Settings)
                   if f.name != "dataset" and getattr(s, f.name) != getattr(IMAGES, f.name)]
        lines.append(f"  {name}: {' '.join(changed)}")
    return "\n".join(lines)


def refuse(error):
    """One line on stderr; returns the exit code for it."""
    print(f"badsnn: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
