"""The command line: python badsnn.py COMMAND --options, most of them made from the fields of settings.Settings."""
import argparse
import os
import sys
import time
from dataclasses import fields, replace
from functools import partial

import numpy as np
import torch

import badsnn
from data import hold_out, load_for, poison_indices, to_float, to_uint8
from kit import machine
from kit.files import code_of, replace_file
from kit.machine import say
from kit.sources import need
from lab import ablations, baselines, own, report, results, scan, story, table2
from settings import CHOICES, KNOBS, PRESETS, Settings, flag, preset

COMMANDS = {"story": "one attack, what stops it, what gives it away", "attack": "Table 1's row of a data set",
            "defend": "Table 2's rows of a data set", "ablate": "the studies behind the paper's figures",
            "scan": "is a network backdoored? over many models, or over one of your own",
            "report": "figures and tables, from the results alone"}
ATTACKS = ("badsnn", *baselines.IMAGE_ATTACKS, *baselines.EVENT_ATTACKS)
OWN = {         # the options of one command alone
    "defend": {"--attacks": dict(nargs="+", choices=ATTACKS, help="the last four are on events; all that fit if none"),
               "--defender-at": dict(choices=("S_a", "S_n"), default="S_a", help="the setting at which the defender "
                                     "trains: as shipped, or nominal (default: S_a)")},
    "ablate": {"--study": dict(nargs="+", choices=tuple(ablations.STUDIES), required=True, help="one or more")},
    "scan": {"--models": dict(type=int, default=20, help="digits: so many pairs (default: 20)"),
             "--weights": dict(metavar="FILE", help="a state_dict: scan this network instead"),
             "--build": dict(metavar="MODULE:FUNCTION", help="the function that makes it; --data is then a file of "
                             "images in [0, 1]")},
    "report": {"--publish": dict(action="store_true", help="for maintainers: rewrite results/ from the JSON there")}}


class Parser(argparse.ArgumentParser):
    """Every error in one line on stderr, exit code 2."""
    def error(self, message):
        self.exit(2, f"badsnn: {message}\n")


def parse(argv=None):
    """Command line -> (the command and its own options, the Settings of its data set). Raises ValueError."""
    finder = argparse.ArgumentParser(add_help=False)            # the help page shows the values of the set it names
    finder.add_argument("--dataset", nargs="?")
    named = finder.parse_known_args(argv)[0].dataset
    shown = preset(named if named in PRESETS else "digits", device="cpu")
    parser = Parser(prog="badsnn.py", description="BadSNN: backdoor attacks on spiking neural networks.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=(
            f"{text[0].upper()}{text[1:]}. Defaults are those of --dataset {shown.dataset}."))
        for option, how in OWN.get(name, {}).items():
            command.add_argument(option, **how)
        sections = {group: command.add_argument_group(group) for group, _ in KNOBS.values()}
        for f in fields(Settings):
            if name != "report" or f.name == "results":
                add_option(sections[KNOBS[f.name][0]], f, getattr(shown, f.name))
    given = vars(parser.parse_args(argv))
    chosen = {name: given.pop(name) for name in KNOBS if name in given}
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    return argparse.Namespace(**given), preset(chosen.pop("dataset", "digits"), **chosen)


def add_option(section, f, value):
    """The option of one knob; its help shows the value that the data set really has."""
    text, kind = KNOBS[f.name][1].replace("%", "%%"), dict(type=f.type, choices=CHOICES.get(f.name))
    if value not in (None, "", False):
        default = " ".join(f"{v:g}" for v in value) if f.type is tuple else value
        text += f" (default: {default})"
    if f.type is tuple:
        kind = dict(nargs="+", type=float)
    elif f.type is bool:
        kind = dict(action=argparse.BooleanOptionalAction)
    section.add_argument(flag(f.name), help=text, default=argparse.SUPPRESS, **kind)


def folder_of(data, s):
    return s.results / (f"{data.name}_{s.variant}" if s.variant else data.name)


def kept(name, data, s, compute, **more):
    """compute(data, s)'s result from RESULTS/DATASET/name.json, if it is there and was made from the same data,
    settings and code, else made and written, with what it must carry to mean anything."""
    code = code_of("*.py", "kit/*.py", "lab/[!cfrt]*.py", "lab/table2.py")        # not what only prints
    path, started, labels = folder_of(data, s) / f"{name}.json", time.time(), hold_out(data)[0].y_train
    gpu = f", {torch.cuda.get_device_name(s.device)}" if s.device.startswith("cuda") else ""
    n_poison = len(poison_indices(labels, s.target, s.poison_ratio, s.seed))
    about = dict(s.of(), dataset=data.name, note=data.note, n_train=len(data.y_train), n_test=len(data.y_test),
                 poison_ratio=round(n_poison / int((labels == s.target).sum()), 4), n_poison=n_poison,
                 device=s.device + gpu, torch=torch.__version__)
    about |= dict.fromkeys(("q", "budget", "n_o", "epochs_o") if data.events else ("beta",))      # not used

    def run():
        return about | compute(data, s) | dict(seconds=round(time.time() - started, 1))
    result, earlier = results.kept(path, data, s, code, run, **more)
    say(f"finished earlier (--fresh runs it again): {path}" if earlier else f"written: {path}")
    return result


def run(options, data, s):
    """One command, with its own options."""
    again = replace(s, fresh=False)         # what a first step has just made
    if options.command == "attack":
        result = kept("attack", data, s, badsnn.attack)
        if not data.events:
            write_triggers(data, again, result["runs"][0]["at_chosen"]["v_thr"])
        report.print_attack(result)
    elif options.command == "story":
        attack = kept("attack", data, s, badsnn.attack)
        report.print_story(kept("story", data, again, partial(story.story, attack=attack)), folder_of(data, s))
    elif options.command == "defend":
        chosen = dict(attacks=options.attacks, defender_at=options.defender_at)
        kept("defend", data, s, partial(table2.defend, **chosen), **chosen)
    elif options.command == "ablate":
        for study in dict.fromkeys(options.study):
            kept(study, data, s, partial(ablations.ablate, study=study))
    elif options.command == "scan":
        compute = partial(scan.scan, n_models=options.models)
        report.print_scan(kept("scan", data, s, compute, models=options.models))


def write_triggers(data, s, v_thr):
    """Fig. 5: test images of up to eight classes, clean and under both triggers of the first seed, and its answers."""
    model, path, arrays = badsnn.train(data, s, "badsnn"), folder_of(data, s) / "triggers.npz", {}
    t_o = badsnn.train_trigger(model, data, s, v_thr)[0]
    if t_o is None:
        path.unlink(missing_ok=True)        # an earlier run's
        return
    classes = data.y_test[data.y_test != s.target].unique()[:8]
    stored = torch.stack([data.x_test[data.y_test == k][0] for k in classes])
    for name, t in dict(clean=lambda x: x, t_p=badsnn.simple_triggers(data, s)["asr_p"], t_o=t_o).items():
        arrays[name] = to_uint8(t(to_float(stored.to(s.device), s))).permute(0, 2, 3, 1).cpu().numpy()
        arrays[f"answers_{name}"] = badsnn.predict(model, stored, s, v_thr, s.tau_a, t).numpy()
    with replace_file(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays)


def main(argv=None):
    """Runs one command. Exits with 2 and one line for every foreseeable error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")        # a terminal that lacks a letter ends no training
    try:
        options, s = parse(argv)
        if options.command == "report":
            return report.report(report.SHIPPED if options.publish else s.results, options.publish)
        if options.command == "scan" and (options.weights or options.build):
            return own.own(options.weights, options.build, s.data)
        for folder in (s.results, s.runs):          # before hours are spent
            there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
            need(there.is_dir() and os.access(there, os.W_OK), f"--runs, --results: {there} is not a writable folder")
        machine.keep_memory()
        machine.set_threads()
        with machine.processes(s) as s:
            data = load_for(s) if machine.rank() == 0 else None         # alone: it may download
            machine.wait_for_all()
            run(options, data or load_for(s), s)
    except BrokenPipeError:         # `... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):     # torch's; any other is a bug
            raise
        print(f"badsnn: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("badsnn: stopped; the same command goes on after the last finished epoch")
