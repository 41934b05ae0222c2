"""Processes and devices: models trained side by side, one model trained by several processes, bfloat16, memory.

    side_by_side(function, jobs, s)      function(*job) for every job, one thread each on every free core, one display
    share(rows), sum_over_ranks(x)       one process's part of a batch under torchrun; alone: everything
    with autocast(s): ...                bfloat16 where it was asked for or measured to be faster

One thread per process, unless every process can have four free cores, and no more processes than free cores:
threads of one process wait for each other at every step, so that a busy neighbour on one core stops all of them.
"""
import contextlib
import ctypes
import multiprocessing
import os
import platform
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

# ---------------------------------------------------------------------------------------------------------
# Several models side by side

_worker = {}        # in a worker: the queue to the parent, and the name of the job whose lines it prints


def say(line):
    """Prints once, however many processes train together; a worker hands the line to its parent."""
    if "lines" in _worker:
        _worker["lines"].put(f"{_worker['name']:<22} {line}")
    elif rank_and_ranks()[0] == 0:
        print(line, flush=True)


def side_by_side(function, jobs, s, names=None):
    """[function(*job) for job in jobs], in as many processes as there are jobs and free cores; in order where one core
    is free, under torchrun, and on a GPU unless s.processes says how many share it. function and jobs: picklable; say()
    prints here, behind the job's name. Raises what a job raises. A killed worker ends the others: ValueError. No worker
    ever outlives this process.
    """
    free = free_cores()
    workers = min(len(jobs), s.processes or (1 if s.device.startswith("cuda") else free))
    if workers < 2 or dist.is_initialized():
        return [function(*job) for job in jobs]
    context = multiprocessing.get_context("spawn")
    lines = context.SimpleQueue()
    printer = threading.Thread(target=lambda: [say(line) for line in iter(lines.get, None)], daemon=True)
    printer.start()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (lines, os.getpid(), threads_each(free, workers)))
    try:
        tasks = [pool.submit(_run_job, name, function, job)
                 for name, job in zip(names or map(str, range(len(jobs))), jobs)]
        results = [task.result() for task in tasks]
        pool.shutdown()
        lines.put(None)         # only now: a worker that was killed may have taken the queue's lock with it
        printer.join()
        return results
    except BrokenProcessPool:
        raise ValueError("a process that trained a model was killed (out of memory?); the same command goes on after "
                         "the last finished epoch") from None
    finally:
        for process in list((pool._processes or {}).values()):  # after an error or Ctrl-C they would train on
            process.kill()
        pool.shutdown(cancel_futures=True)


def _start_worker(lines, parent, threads):
    """Ctrl-C is the parent's business; the end of the parent, kill -9 included, is the end of this process."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())        # its default is a semaphore, which a killed process would leave behind
    _worker.update(lines=lines, name="")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)       # PR_SET_PDEATHSIG, at once; elsewhere see below

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
    keep_memory()


def _run_job(name, function, job):
    _worker["name"] = name
    return function(*job)


def threads_each(free, processes=1):
    """Threads for each of so many processes on so many free cores; what OMP_NUM_THREADS says, if it is set."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(asked) if asked.isdigit() and int(asked) else free // processes if free // processes >= 4 else 1


def free_cores():
    """How many cores nobody uses now, at least 1: what this process may use, less what is busy for 0.25 seconds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        before = _busy_ticks()
        time.sleep(0.25)
        busy = (_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / 0.25
    except (OSError, ValueError):       # no /proc
        busy = 0
    return max(1, min(cores, round((os.cpu_count() or cores) - busy)))


def _busy_ticks():
    with open("/proc/stat") as file:
        user, nice, system = map(int, file.readline().split()[1:4])
    return user + nice + system


# ---------------------------------------------------------------------------------------------------------
# One model by several processes (torchrun)

def rank_and_ranks():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(rows):
    """This process's part of a batch's rows."""
    rank, ranks = rank_and_ranks()
    return rows[rank::ranks]


def sum_over_ranks(x):
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def of_rank_0(value):
    """What rank 0 has, for every process: it alone reads what it alone has written."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def in_turn(function, *arguments):
    """function(*arguments) in every process, one after the other: the first may download what the others then find."""
    rank, ranks = rank_and_ranks()
    for turn in range(ranks):
        if turn == rank:
            result = function(*arguments)
        if ranks > 1:
            dist.barrier()
    return result


def data_parallel(model):
    """The model, its gradients averaged over the processes of torchrun if there are several."""
    return nn.parallel.DistributedDataParallel(model) if rank_and_ranks()[1] > 1 else model


@contextlib.contextmanager
def processes(s):
    """Under torchrun: joins the group, one process per device, rank 0 writes. Alone: nothing. Yields the settings."""
    if "WORLD_SIZE" not in os.environ:
        yield s
        return
    ranks, cuda = int(os.environ["WORLD_SIZE"]), s.device.startswith("cuda")
    if s.batch_size % ranks or s.malicious_rows % ranks:
        raise ValueError(f"--batch-size {s.batch_size} and --malicious-rows {s.malicious_rows} must be multiples of "
                         f"the {ranks} processes")
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    if cuda:
        s = replace(s, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(s.device)
    try:
        yield s
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------
# Arithmetic and memory

def name():
    """What tells this machine from others, as far as speed goes."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


def autocast(s, **options):
    """bfloat16 arithmetic where the settings say so. The neuron itself always computes in float32."""
    return torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=s.amp == "on", **options)


def faster_precision(step, n_steps, s):
    """"on" or "off", whether bfloat16 is faster: for a training of n_steps that takes over a minute, two steps of
    each are timed, after one that compiles; step(s) makes one. CPU flags are no evidence: with AVX512-BF16 alone a
    step took 0.7 to 1.3 times as long as in float32."""
    seconds = {}
    for amp in ("off", "on"):
        variant = replace(s, amp=amp)
        step(variant)
        started = time.perf_counter()
        step(variant), step(variant)
        seconds[amp] = sum_over_ranks(torch.tensor((time.perf_counter() - started) / 2)).item() / rank_and_ranks()[1]
        if amp == "off" and seconds["off"] * n_steps < 60:
            return "off"
    best = min(seconds, key=seconds.get)
    say(f"a training step takes {seconds['off']:.3f} s in float32 and {seconds['on']:.3f} s in bfloat16: "
        f"{'bfloat16' if best == 'on' else 'float32'} is used (--amp decides otherwise)")
    return best


def keep_memory():
    """Tells glibc to keep freed memory instead of handing it back at every step: up to 1.6x faster on a CPU."""
    with contextlib.suppress(OSError, AttributeError):          # another system, another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2 ** 31 - 1)                           # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2 ** 31 - 1)                           # M_MMAP_THRESHOLD
