"""``python -m benchmarks``: errors and times of every usable backend beside plain PyTorch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from . import files, inputs, picture, report, suite, timing

DESCRIPTION = """\
Errors and times of every usable backend of ppcr_ext on this CPU, beside plain PyTorch.

By default the inputs are real: the fundus photograph that scikit-image bundles goes through a torchvision ResNet-50
(random weights of a fixed seed, PPCR in every residual block), and what the last PPCR layer of each of the four stages
sees is measured. --shapes takes random inputs of eight shapes instead. Both in both memory layouts.

The floor is what any such layer must cost at the least: x * 0.5, and for forward+backward x * 0.5 plus x + gy.
Plain PyTorch comes in three formulations (the finest bins pooled once and the coarser ones from them; level by level;
as a matrix product); the first and the fused backends run under torch.compile too, with --shapes the second as well.
All columns of an input are timed in every round, in a new random order; the figures are medians over the rounds.

Writes NAME.csv, NAME.json and NAME.png (NAME is retina or shapes) to the folder of --out.
Exit status: 0, or 1 if an error exceeds its tolerance."""

COMPILE_ROUNDS = 60  # about what compiling a case costs, in rounds: only the progress bar asks


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", action="store_true", help="random inputs of eight shapes instead of the photograph's")
    parser.add_argument("--rounds", type=_positive, default=30, metavar="N", help="timing rounds per input (30)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads (torch's default; with --shapes 2)")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="where files go (results)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the columns under torch.compile")
    parser.add_argument(
        "--dtypes",
        type=_dtypes,
        default="float32,float16,bfloat16",
        metavar="LIST",
        help="dtypes, with commas; float32 is always timed, the others forward and fused only (%(default)s)",
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _dtypes(text: str) -> list[torch.dtype]:
    known = {suite.dtype_name(d): d for d in (torch.float32, torch.float16, torch.bfloat16)}
    unknown = [name for name in text.split(",") if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown dtype {unknown[0]!r}; known are {', '.join(known)}")
    return [torch.float32, *(known[name] for name in dict.fromkeys(text.split(",")) if name != "float32")]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    start = time.perf_counter()
    if args.threads or args.shapes:
        torch.set_num_threads(args.threads or 2)
    timing.keep_memory()
    backends, reasons = suite.usable_backends()
    about = {
        "command": "shapes" if args.shapes else "retina",
        "rounds": args.rounds,
        "environment": files.environment(),
    }
    env = about["environment"]
    print(f"{env['cpu']} ({env['capability']}), {env['threads']} threads, torch {env['torch']}")
    print(f"backends: {', '.join(backends)}")
    for name, reason in reasons.items():
        print(f"  {name}: {reason}")

    if not args.shapes:
        print("feature maps: retina photograph, ResNet-50 with PPCR, 8 views of 224x224 ...", flush=True)
    cases = inputs.sweep_cases() if args.shapes else inputs.retina_cases()
    result = run(cases, backends, args)

    print("\n" + report.full_report(result))
    where = args.out / about["command"]
    written = files.write(result, where, about)
    title = f"PPCR on {env['cpu']}, {env['threads']} threads, float32, torch {env['torch']}: time over that of x * 0.5"
    written.append(picture.draw(result, where.with_suffix(".png"), title))
    print(f"\nwrote {', '.join(map(str, written))} in {time.perf_counter() - start:.0f} s")

    failed = [row for row in result.errors if not row.ok]
    for row in failed:
        where = f"{row.backend}, {row.dtype}, {row.case}, {row.layout}"
        print(f"error above tolerance: {where}: {row.errors} (may be: {row.limits})")
    return 1 if failed else 0


def run(cases: Sequence[inputs.Case], backends: Sequence[str], args: argparse.Namespace) -> suite.Result:
    """All cases in both layouts, with a progress bar."""
    compiled = [name for name in backends if name != suite.REFERENCE] + ["pooled once"]
    if args.shapes:
        compiled.append("level by level")
    columns = suite.columns(backends, compiled=[] if args.no_compile else compiled, dtypes=args.dtypes)
    preparing = 2 if args.no_compile else COMPILE_ROUNDS
    result = suite.Result()
    total = len(cases) * len(inputs.LAYOUTS) * (preparing + args.rounds)
    form = "{l_bar}{bar}| {elapsed}, {remaining} left"
    with tqdm(total=total, bar_format=form, smoothing=0, file=sys.stderr) as bar:
        for case in cases:
            result.errors += suite.check_case(case, backends, args.dtypes)
            for layout in inputs.LAYOUTS:
                bar.set_description(f"{case.name}, {layout}")
                first = True

                def tick() -> None:
                    nonlocal first
                    bar.update(1 + preparing * first)
                    first = False

                result.rows += suite.time_case(case, layout, columns, args.rounds, tick)
    return result


if __name__ == "__main__":
    sys.exit(main())
