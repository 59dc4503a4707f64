"""Compares PPCR with other attention layers, and with none, on images of one's own.

    python examples/compare.py --out results/compare         # digits, a small network
    python examples/compare.py --data pneumoniamnist.npz --model small-resnet18 --augment \\
        --attention none,se,eca,cbam,ppcr --seeds 5 --epochs 20 --out results/pneumonia
    torchrun --nproc-per-node=4 examples/compare.py ...      # every run on four processes
    python examples/compare.py --jobs 4 ...                  # four runs at a time

All methods of a seed see the same batches, and start from the same weights outside the attention
layer. They take turns, seed by seed. The same command goes on with what was stopped, also in the
middle of a run, to the same tables. docs/comparing.md says how to read them.
"""

import argparse
import fcntl
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

import comparison
import cost
import files
import report
import torch
import train
from comparison import BASELINE, Comparison
from data import Data, load
from files import BadInput
from models import ATTENTION
from tqdm import tqdm

import ppcr_ext

# What a comparison that goes on must share with its beginning, beside the trainer's own.
SETTINGS = {*train.IDENTITY, "channels_last", "compile", "threads"} - {"seed", "attention"}


def arguments() -> Any:
    parser = train.parser("Compares PPCR with other attention layers, and with none.")
    parser.add_argument(
        "--attention",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=["none", "se", "eca", "cbam", "ppcr"],
        help="methods with commas between them, none among them (none,se,eca,cbam,ppcr)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 (5)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process")
    parser.add_argument(
        "--threads", type=int, help="threads of a run on a CPU (the cores over --jobs)"
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds that measure time; 0 for none (15)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/compare"))
    found = train.check(parser.parse_args())
    for name in ("seeds", "jobs", "threads"):
        value = getattr(found, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} must be at least 1, got {value}")
    if found.rounds != 0 and found.rounds < 6:  # fewer have no 95 % interval
        raise BadInput(f"--rounds must be 0 or at least 6, got {found.rounds}")
    for name in found.attention:
        if name not in ATTENTION:
            raise BadInput(f"--attention: {name!r} is none of {', '.join(ATTENTION)}")
        if found.attention.count(name) > 1:
            raise BadInput(f"--attention: {name!r} is there twice, and runs have one name each")
    if BASELINE not in found.attention or len(found.attention) < 2:
        raise BadInput("--attention needs none, the baseline of all differences, and a layer")
    if found.jobs > 1 and "RANK" in os.environ:
        raise BadInput("--jobs: under torchrun all processes work on the same run")
    return found


def settings_of(options: Any) -> dict[str, Any]:
    """Those of this comparison; they are written down when it begins, and must not change."""
    path = options.out / "settings.json"
    recorded: dict[str, Any] = {}
    if path.exists() and any(options.out.glob("runs/*/*/checkpoint.pt")):
        try:
            recorded = dict(json.loads(path.read_text()))
        except ValueError:
            raise BadInput(f"{path} is not what this program wrote") from None
    if options.threads is None:
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", options.jobs))
        options.threads = recorded.get("threads") or max(1, (os.cpu_count() or 1) // beside)
    found = {name: getattr(options, name) for name in sorted(SETTINGS)}
    found["processes"] = int(os.environ.get("WORLD_SIZE", 1))  # each normalizes by its own images
    for name, value in found.items():
        if recorded and recorded.get(name) != value:
            option = name if name == "processes" else f"--{name.replace('_', '-')}"
            raise BadInput(f"{options.out} was made with {option} {recorded.get(name)}")
    return found


def run_options(options: Any, seed: int, attention: str) -> Any:
    """The trainer's options for one of the runs."""
    out = comparison.folder(options.out, seed, attention)
    own = {"seed": seed, "attention": attention, "out": out, "stop_after": None}
    return argparse.Namespace(
        **(vars(options) | own | {"resume": (out / "checkpoint.pt").exists()})
    )


def start_worker(count: Any) -> None:
    """In a process of the pool: ends with its parent, and takes the next GPU."""

    def end_with_parent() -> None:
        connection.wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with count.get_lock():
        index, count.value = count.value, count.value + 1
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(index % torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def work(options: Any) -> None:
    torch.backends.cudnn.deterministic = True
    torch.set_num_threads(options.threads)
    train.train(options, quiet=True)


def run_all(options: Any, data: Data, first: bool, seed_done: Callable[[], object]) -> None:
    """All runs that are not finished, seed by seed."""
    queue = [
        run_options(options, seed, method)
        for seed in range(options.seeds)
        for method in options.attention
        if not comparison.finished(options.out, seed, method)
    ]
    total = options.epochs * options.seeds * len(options.attention)
    behind = total - options.epochs * len(queue)
    with tqdm(total=total, initial=behind, unit="epoch", disable=None if first else True) as bar:
        if options.jobs == 1:
            for _, runs in itertools.groupby(queue, key=lambda one: one.seed):
                for one in runs:
                    bar.set_description(f"seed {one.seed}, {one.attention}")
                    train.train(one, data, quiet=True, done=bar.update)
                seed_done()
        else:
            _run_in_pool(options, queue, bar, seed_done)


def _run_in_pool(options: Any, queue: list[Any], bar: Any, seed_done: Callable[[], object]) -> None:
    context = multiprocessing.get_context("spawn")
    started = (context.Value("i", 0),)
    with ProcessPoolExecutor(options.jobs, context, start_worker, started) as pool:
        futures = {pool.submit(work, one): one.seed for one in queue}
        try:
            for future in as_completed(futures):
                future.result()
                bar.update(options.epochs)
                if all(other.done() for other in futures if futures[other] == futures[future]):
                    seed_done()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise BadInput("a process was killed; the same command goes on") from None
            raise


def write(options: Any, settings: dict[str, Any], notes: list[str]) -> None:
    """All tables and pictures, of the seeds for which every method is finished."""
    out, methods = options.out, options.attention
    found = Comparison(comparison.read(out, methods, range(options.seeds)), methods)
    if not found.runs:
        return
    tables = {
        "runs": (found.run_rows(), comparison.RUNS),
        "summary": (found.summary(), comparison.SUMMARY),
        "differences": (found.differences(), comparison.DIFFERENCES),
    }
    for name, (rows, columns) in tables.items():
        files.write_csv(out / f"{name}.csv", rows, columns)
    measured = out / "cost.csv"
    cost_rows = files.read_csv(measured) if measured.exists() else []
    content = {
        "settings": settings | {"attention": methods, "seeds": found.seeds},
        "environment": environment(),
        **{name: rows for name, (rows, _) in tables.items()},
        "cost": cost_rows,
        "notes": notes + found.notes(),
        "verdict": found.verdict(),
    }
    files.write_text(out / "comparison.json", json.dumps(content, indent=1) + "\n")
    lines = [report.table(found, cost_rows), *content["notes"], content["verdict"]]
    files.write_text(out / "comparison.md", "\n\n".join(lines) + "\n")
    title = f"{Path(settings['data']).stem}, {settings['model']}"
    report.draw_differences(out / "differences.png", found, title)
    report.draw_learning_curves(out / "learning_curves.png", found, title)


def notes_on(data: Data) -> list[str]:
    return [
        f"The {split} images hold none of class {', '.join(map(str, classes))}"
        + (": there is no AUC" if split == "test" else "")
        for split, classes in data.missing_classes().items()
    ]


def environment() -> dict[str, str]:
    device = f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "device": device,
        "torch": torch.__version__,
        "ppcr_ext": ppcr_ext.__version__,
    }


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Two comparisons at work in one folder would write the same files."""
    files.make_folder(out)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"another comparison is at work in {out}") from None
        yield


def compare(options: Any, data: Data, first: bool) -> None:
    settings, notes = settings_of(options), notes_on(data)
    if first:
        files.write_text(options.out / "settings.json", json.dumps(settings, indent=1) + "\n")
        for line in notes:
            print(line, flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    torch.set_num_threads(options.threads)

    def write_all() -> None:
        if first:
            write(options, settings, notes)

    run_all(options, data, first, write_all)
    measured, methods = options.out / "cost.csv", options.attention
    known = [row["attention"] for row in files.read_csv(measured)] if measured.exists() else []
    if options.rounds and known != methods:
        ticks = cost.steps(options.rounds, len(methods))
        with tqdm(total=ticks, desc="time and memory", disable=None if first else True) as bar:
            chosen = {method: run_options(options, 0, method) for method in methods}
            rows = cost.measure(chosen, data, options.rounds, BASELINE, bar.update)
        if first:
            files.write_csv(measured, rows, cost.COLUMNS)
    write_all()
    if first:
        print((options.out / "comparison.md").read_text(), end="")


def main() -> None:
    options = arguments()
    with train.processes():
        data = load(options.data, options.augment, options.image_size)
        for method in options.attention:  # whatever cannot work is found now, not after hours
            train.Trainer(run_options(options, 0, method), data)
        if os.environ.get("RANK", "0") == "0":
            with alone_in(options.out):
                compare(options, data, True)
        else:
            compare(options, data, False)


if __name__ == "__main__":
    files.run(main)
