"""The command line: python badsnn.py COMMAND --options. Options are made from the fields of settings.Settings.

    story       one attack, what stops it and what gives it away            story.json
    attack      Table 1's row of a data set                                 attack.json, triggers.npz
    defend      Table 2's rows of a data set                                defend.json
    ablate      the studies behind Figs. 2, 3, 4 and 6                      STUDY.json
    scan        is a network backdoored? over many models, or one's own     scan.json
    report      figures and tables, from the results alone

Results go to RESULTS/DATASET; one that is there already, made from the same data, settings and code, is read. Every
foreseeable error ends in one line on stderr and exit code 2 (--debug: the traceback).
"""
import argparse
import os
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch

import badsnn
from data import hold_out, load_for, poison_indices, to_float, to_uint8
from kit import files, machine
from kit.files import code_of, fingerprint
from kit.machine import say
from lab import ablations, baselines, report, scan, story, table2
from settings import CHOICES, KNOBS, PRESETS, Settings, flag, preset

COMMANDS = {"story": "one attack, what stops it, what gives it away", "attack": "Table 1's row of a data set",
            "defend": "Table 2's rows of a data set", "ablate": "the studies behind the paper's figures",
            "scan": "is a network backdoored? over many models, or over one of your own",
            "report": "figures and tables, from the results"}
PLACES = dict(int="N", float="X", tuple="X", str="NAME", Path="FOLDER")       # what an option's value looks like


class Parser(argparse.ArgumentParser):
    """Every error in one line on stderr, exit code 2."""
    def error(self, message):
        self.exit(2, f"badsnn: {message}\n")


def parse(argv=None):
    """Command line -> (the command and its own options, the Settings of its data set). Raises ValueError."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="badsnn.py", description="BadSNN: backdoor attacks on spiking neural networks.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    shown = preset_on(argv)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, argument_default=argparse.SUPPRESS,
                                      description=f"{text[0].upper()}{text[1:]}. Defaults are those of --dataset "
                                      f"{shown.dataset}.")
        command.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
        add_own_options(command, name)
        for group in dict.fromkeys(group for group, _ in KNOBS.values()) if name != "report" else ():
            section = command.add_argument_group(group)
            for f in fields(Settings):
                if KNOBS[f.name][0] == group:
                    add_option(section, f, getattr(shown, f.name))
    given = vars(parser.parse_args(argv))
    known = {f.name for f in fields(Settings)}
    own = argparse.Namespace(**{name: value for name, value in given.items() if name not in known})
    chosen = {name: value for name, value in given.items() if name in known}
    for name, value in chosen.items():
        chosen[name] = tuple(value) if isinstance(value, list) else value
    return own, preset(chosen.pop("dataset", "digits"), **chosen)


def preset_on(argv):
    """The preset of the data set that a command line names, for the help page."""
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--dataset", default="digits")
    name = finder.parse_known_args(argv)[0].dataset
    return preset(name if name in PRESETS else "digits", device="cpu")


def add_own_options(command, name):
    """What only one command knows."""
    if name == "defend":
        every = ("badsnn", *baselines.IMAGE_ATTACKS, *baselines.EVENT_ATTACKS)
        command.add_argument("--attacks", nargs="+", choices=every, default=None, metavar="ATTACK",
                             help=f"of {', '.join(every)}; the last four are on events (default: all that fit)")
        command.add_argument("--defender-at", choices=("S_a", "S_n"), default="S_a",
                             help="the setting at which the defender trains: as shipped, or nominal (default: S_a)")
    if name == "ablate":
        command.add_argument("--study", choices=tuple(ablations.STUDIES), required=True, nargs="+", metavar="STUDY",
                             help=f"one or more of {', '.join(ablations.STUDIES)}")
    if name == "scan":
        command.add_argument("--models", type=int, default=40, metavar="N",
                             help="digits: so many clean and so many backdoored models (default: 40)")
        command.add_argument("--weights", metavar="FILE", default=None, help="a state_dict: scan this network instead")
        command.add_argument("--build", metavar="MODULE:FUNCTION", default=None,
                             help="the function that makes it; --data is then a file of images in [0, 1]")
    if name == "report":
        command.add_argument("--publish", action="store_true", default=False,
                             help="for maintainers: copy the results to results/ and write its tables")
        command.add_argument("--results", type=Path, default=Path("runs/results"), metavar="FOLDER",
                             help="folder of the results (default: runs/results)")


def add_option(section, f, value):
    """The option of one knob; its help shows the value that the data set really has."""
    text = KNOBS[f.name][1].replace("%", "%%")
    if value not in (None, "", False):
        default = " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value
        text += f" (default: {default})"
    if f.type is bool:
        section.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, help=text)
        return
    kind = dict(nargs="+", type=float) if f.type is tuple else dict(type=f.type)
    place = None if f.name in CHOICES else PLACES[f.type.__name__]
    section.add_argument(flag(f.name), choices=CHOICES.get(f.name), metavar=place, help=text, **kind)


# ----- The commands: each computes, writes and prints

def decided_by(data, s, **more):
    """Everything that decides a result, as plain values."""
    code = code_of("*.py", "kit/*.py", "lab/[!cfrt]*.py", "lab/table2.py")        # not what only prints
    return dict(s.of(), **more, inputs=fingerprint(data.x_train, data.y_train, data.x_test, data.y_test, code))


def describe(data, s):
    """What a result must carry to mean anything."""
    part = hold_out(data)[0]
    n_target = int((part.y_train == s.target).sum())
    n_poison = len(poison_indices(part.y_train, s.target, s.poison_ratio, s.seed))
    unused = dict.fromkeys(("q", "budget", "n_o", "epochs_o") if data.events else ("beta",))
    return dict(s.of() | unused, dataset=data.name, note=data.note, n_train=len(data.y_train),
                n_test=len(data.y_test), poison_ratio=round(n_poison / n_target, 4),
                n_poison=n_poison, device=machine.name_of(s.device), torch=torch.__version__)


def folder_of(data, s):
    """The folder of a data set's results, or of a variant's."""
    return s.results / (f"{data.name}_{s.variant}" if s.variant else data.name)


def kept(name, data, s, compute, **more):
    """compute(data, s)'s result from RESULTS/DATASET/name.json, if it is there, else made and written."""
    path, started = folder_of(data, s) / f"{name}.json", time.time()

    def run():
        result = compute(data, s)
        return dict(describe(data, s) | result, seconds=round(time.time() - started, 1))
    result, earlier = files.kept(path, decided_by(data, s, name=name, **more), run, s.fresh)
    say(f"{'finished earlier, see' if earlier else 'written:'} {path}" + (" (--fresh runs it again)" if earlier else ""))
    return result


def run_attack(own, data, s):
    result = kept("attack", data, s, badsnn.attack)
    if not data.events:
        write_triggers(data, s, result)
    report.print_attack(result)


def write_triggers(data, s, result):
    """Fig. 5: test images of eight classes under both triggers of the first seed, and what the network answers."""
    s, v_thr = replace(s, fresh=False), result["runs"][0]["at_chosen"]["v_thr"]
    model = badsnn.train(data, s, "badsnn")
    t_o = badsnn.train_trigger(model, data, s, v_thr)[0]
    path = folder_of(data, s) / "triggers.npz"
    if t_o is None:
        path.unlink(missing_ok=True)        # an earlier run's
        return
    classes = [k for k in range(data.num_classes) if k != s.target and (data.y_test == k).any()][:8]
    stored = torch.stack([data.x_test[data.y_test == k][0] for k in classes])
    triggers = dict(clean=None, t_p=badsnn.simple_triggers(data, s)["asr_p"], t_o=t_o)
    guesses = {f"answers_{name}": badsnn.predict(model, stored, s, v_thr, s.tau_a, t) for name, t in triggers.items()}
    x = to_float(stored.to(s.device), s)
    images = {name: t(x) if t else x for name, t in triggers.items()}
    files.write_arrays(path, **guesses, **{name: to_uint8(image).permute(0, 2, 3, 1).cpu()
                                           for name, image in images.items()})


def run_story(own, data, s):
    report.print_story(kept("story", data, s, story.story), folder_of(data, s))


def run_defend(own, data, s):
    compute = partial(table2.defend, attacks=own.attacks, defender_at=own.defender_at)
    kept("defend", data, s, compute, attacks=own.attacks, defender_at=own.defender_at)


def run_ablate(own, data, s):
    for study in dict.fromkeys(own.study):
        kept(study, data, s, lambda data, s: ablations.ablate(data, s, [study])[study])


def run_scan(own, data, s):
    report.print_scan(kept("scan", data, s, partial(scan.scan, n_models=own.models), models=own.models))


RUN = dict(attack=run_attack, story=run_story, defend=run_defend, ablate=run_ablate, scan=run_scan)


def main(argv=None):
    """Runs one command. Exits with 2 and one line for every foreseeable error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")        # a terminal that lacks a letter ends no training
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        own, s = parse(argv)
        if own.command == "report":
            return report.report(own.results, own.publish)
        if own.command == "scan" and (own.weights or own.build):
            return scan.own(own.weights, own.build, s.data)
        files.check_writable(s.results, s.runs)
        machine.keep_memory()
        torch.set_num_threads(machine.threads_each(machine.cores()))
        with machine.processes(s) as s:
            data = machine.first_alone(load_for, s)
            RUN[own.command](own, data, s)
    except BrokenPipeError:         # `... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if debug or isinstance(error, RuntimeError) and "memory" not in str(error):     # torch's; any other is a bug
            raise
        print(f"badsnn: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("badsnn: stopped; the same command goes on after the last finished epoch")
