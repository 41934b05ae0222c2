"""Grades notebooks/exercises.py:

    python tests/grading.py                             your own, or the file that is named
    python tests/grading.py submissions/ --seed S       every student's NAME.py, or NAME/ with one .py file in it
    python tests/grading.py --task "Ada L." --seed S    a student's own task for the open questions

This process draws the cases and counts the points; students' code never runs in it. An exercise is put to their
function in a process of its own, with limits of time, memory and files, which sends back tensors and numbers. So a
hang, an exit or a change of torch costs its exercise only."""
import argparse
import ast
import contextlib
import copy
import csv
import io
import multiprocessing
import os
import signal
import sys
import types
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from kit.files import fingerprint  # noqa: E402
from kit.training import generator  # noqa: E402
from lab.results import write_json  # noqa: E402

MINE = ROOT / "notebooks" / "exercises.py"
CASES = range(1, 21)                                    # the draws of every check
MEMORY, LONGEST = 1 << 30, 64 << 20                     # bytes: what an answer may need, what it may send

# What a submission may import, and the words with which code would leave its own file.
LIBRARIES = {"torch", "math", "__future__", "collections", "dataclasses", "functools", "itertools", "typing"}
OURS = {"lif.LIF", "lif.neurons"}
DOORS = set("""open eval exec compile globals locals vars getattr setattr delattr breakpoint sys os gc inspect builtins
    importlib ctypes subprocess threading hub package load save from_file tofile utils multiprocessing distributed
    serialization gi_frame cr_frame ag_frame tb_frame f_back f_globals""".split())


class Wrong(Exception):
    """Why an answer, or a whole file, gets no points."""


def examine(source):
    """Raises Wrong for a file that is refused, or what it raises itself when it is imported."""
    for node in ast.walk(ast.parse(source)):
        words = [getattr(node, "id", ""), getattr(node, "attr", "")]
        if isinstance(node, ast.Import | ast.ImportFrom):
            paths = [f"{getattr(node, 'module', '')}.{alias.name}".strip(".") for alias in node.names]
            words = [word for path in paths for word in path.split(".")]
            if wrong := [path for path in paths if path not in OURS and path.split(".")[0] not in LIBRARIES]:
                raise Wrong(f"refused: line {node.lineno} imports {wrong[0]}")
        for word in words:
            if word.strip("_") in DOORS or word.startswith("__") and word not in ("__init__", "__name__", "__future__"):
                raise Wrong(f"refused: line {node.lineno} uses {word}")
    loaded(source)


def loaded(source):
    """A submission as a module, known by its name to what looks there for it, as dataclasses do."""
    module = sys.modules["exercises"] = types.ModuleType("exercises")
    exec(compile(source, "exercises.py", "exec"), vars(module))
    return module


def apart(work, limit):
    """What work() returns, from a process of its own that is killed after `limit` seconds. Raises Wrong."""
    if hasattr(os, "fork"):
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=send, args=(work, there))
        process.start()
        there.close()
        late = not here.poll(limit)
        try:
            report = None if late else here.recv_bytes(LONGEST)
        except (EOFError, OSError):
            report = None
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)      # what the answer has started
            process.join()
        if report is None:
            raise Wrong("not finished in time" if late else "no answer: its process has ended, or sent too much")
    else:
        report = reported(work)                         # Windows: here, without limits
    why, answer = torch.load(io.BytesIO(report), weights_only=True)         # runs nothing of what it reads
    if why:
        raise Wrong(why)
    return answer


def send(work, pipe):
    """The process of an answer: limits, no terminal, then the work."""
    import resource
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))   # writes no file
    if os.path.exists("/proc/self/statm"):              # Linux; elsewhere memory has no limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    pipe.send_bytes(reported(work))


def reported(work):
    """[why it failed or "", what work() returns] as bytes."""
    report = io.BytesIO()
    try:
        torch.save(["", work()], report)
    except BaseException as error:                      # SystemExit and KeyboardInterrupt are wrong answers, too
        why, report = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}", io.BytesIO()
        torch.save([why[:300], None], report)
    return report.getvalue()


@dataclass
class Exercise:
    draw: callable          # draws the arguments of a case; its name is that of the exercise
    right: callable         # a right answer
    notebook: str           # number and section that explain it
    parts: dict             # {part of the answer: points}
    drive: callable = None  # calls an answer in another way than once with the arguments

    def answers(self, function, cases):
        """A function's answers to copies of the arguments, which it must leave as they are, networks included."""
        answers = []
        for number, arguments in enumerate(cases, 1):
            given = copy.deepcopy(arguments)
            try:
                answers.append(self.drive(function, *given) if self.drive else function(*given))
            except Exception as error:
                raise Wrong(f"case {number}: {type(error).__name__}: {error}") from None
            if fingerprint(*given) != fingerprint(*arguments):
                raise Wrong(f"case {number}: leave the arguments as they are")
        return answers

    def lost(self, function, run, seed, numbers):
        """The parts in which one of these cases shows a mistake: {part: what is said}. function() is a student's
        function; run (as apart) runs what needs it."""
        cases, lost = [self.draw(generator(seed, "exercise", self.draw.__name__, n)) for n in numbers], {}
        try:
            answers = run(lambda: self.answers(function(), cases))
            wanted = run(lambda: self.answers(self.right, cases))       # only now, so that it cannot be found
            for number, *both in zip(numbers, answers, wanted, strict=True):
                for part, *pair in zip(self.parts, *(both if len(self.parts) > 1 else zip(both)), strict=True):
                    try:
                        torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4, check_dtype=False)
                    except AssertionError as error:
                        lost.setdefault(part, f"case {number}, {part}: {' '.join(str(error).split())[:200]}")
        except Exception as error:
            why = str(error) if isinstance(error, Wrong) else f"not the form that was asked for ({error})"
            lost = dict.fromkeys(self.parts, why)
        return lost

    def grade(self, source, refusal, seed, limit):
        """A row of a result: a part counts if no case shows a mistake in it; the first that does is told."""
        name, lost = self.draw.__name__, dict.fromkeys(self.parts, refusal)
        if not refusal:
            lost = self.lost(lambda: getattr(loaded(source), name), lambda work: apart(work, limit), seed, CASES)
        said = "; ".join(dict.fromkeys(lost.values())) + f". See notebook {self.notebook}" if lost else "right"
        return dict(name=name, score=sum(n for part, n in self.parts.items() if part not in lost),
                    max_score=sum(self.parts.values()), output=said, message=said)


def grade(path, exercises, seed, limit):
    """The result of a file, or of the only one in a folder, with the keys that Gradescope and GitHub Classroom read.
    Each exercise has `limit` seconds."""
    source = refusal = ""
    try:
        files = list(path.glob("*.py")) if path.is_dir() else [path]
        if len(files) != 1 or not files[0].is_file() or files[0].stat().st_size > 1 << 20:
            raise Wrong("nothing readable: one Python file of at most 1 MB was wanted")
        source = files[0].read_text(encoding="utf-8-sig")
        apart(lambda: examine(source), limit)
    except (Wrong, OSError, ValueError) as error:
        refusal = str(error)
    tests = [exercise.grade(source, refusal, seed, limit) for exercise in exercises]
    score, most = (sum(test[key] for test in tests) for key in ("score", "max_score"))
    return dict(version=1, score=score, max_score=most, output=refusal, tests=tests)


def task(name, seed):
    """What the lecturer's seed and a student's name decide for the open questions: target class, V_t, data split."""
    draw = generator(seed, "task", name.strip().lower())
    target, step, part, split = (int(torch.randint(n, (), generator=draw)) for n in (10, 7, 5, 1000))
    return f"target={target}, v_thr_t={1.3 + 0.05 * step:.2f}, n_train={1000 + 100 * part}, seed={split}"


def main(exercises):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=MINE)
    parser.add_argument("--seed", default="0", help="a word that draws the cases and the tasks (default: 0)")
    parser.add_argument("--limit", type=float, default=30, help="seconds for each exercise (default: 30)")
    parser.add_argument("--out", type=Path, default=Path("grades"), help="folder of the results (default: grades)")
    parser.add_argument("--task", metavar="NAME", help="print a student's own task, and end")
    options = parser.parse_args()
    if options.task is not None:
        return print(task(options.task, options.seed))
    if not options.path.exists():
        parser.exit(2, f"grading: there is no {options.path}\n")
    if not hasattr(os, "fork"):
        print("On Windows answers have no limits of time and memory, and run in this process.")
    torch.set_num_threads(1)                            # a forked process has no pool of threads
    alone, table = not options.path.is_dir(), [["name", "points", *(e.draw.__name__ for e in exercises), "why", "task"]]
    for path in [options.path] if alone else sorted(options.path.glob("[!.]*")):
        name, result = path.name.removesuffix(".py"), grade(path, exercises, options.seed, options.limit)
        write_json(options.out / ("results.json" if alone else f"{name}.json"), result)
        lost = [f"{test['name']}: {test['output']}" for test in result["tests"] if test["output"] != "right"]
        why = [result["output"]] if result["output"] else lost or ["right"]
        print(f"{name:20} {result['score']:2}", "\n".join(["", *why]) if alone else why[0][:90], flush=True)
        scores = [test["score"] for test in result["tests"]]
        table.append([name, result["score"], *scores, "\n".join(why), task(name, options.seed)])
    with open(options.out / "grades.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)


if __name__ == "__main__":
    from test_exercises import EXERCISES, grading  # there, this file is the module "grading"
    grading.main(EXERCISES)
