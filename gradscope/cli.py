"""The command line: ``gradscope study``, ``show``, ``diagnose``, ``compare``, ``doctor``, ``--version``.

Exit codes: 0 done, healthy, or the same; 1 ``diagnose`` or ``doctor`` found a fault, or ``compare`` a
difference; 2 wrong usage or input that cannot be used; 130 interrupted by Ctrl-C. Heavy imports wait
until a command needs them, so that ``gradscope --help`` answers at once.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gradscope import __version__
from gradscope.errors import GradscopeError

if TYPE_CHECKING:
    from gradscope.record import Record

__all__ = ["main"]

EXIT_OK: Final = 0
EXIT_UNHEALTHY: Final = 1
EXIT_BAD_INPUT: Final = 2
EXIT_INTERRUPTED: Final = 130
#: From this width on the table has bars.
WIDE_COLUMNS: Final = 100

_STUDY = """\
Measure what skip connections and norms do to the gradient over depth, on this machine.

Two parts. At initialisation, in float64: every reference variant, several depths, five seeds.
Then short training runs on real text with the watch on: learning rates are searched for each
variant alike, and the best is run with three seeds. Everything is written to one folder:

  study.md      what was found: text and tables computed from the data
  *.png         the pictures
  table.csv     the numbers, seed by seed
  records/      every measurement, one Record per part (gradscope show FILE)

The default takes about four minutes on two cores. Ctrl-C keeps what is finished, and the same
command resumes. A changed setting or a changed version measures again what depends on it.
"""

_SHOW = """\
Print the layers of a Record: gradient flow, activation variance, largest value, non-finite
counts and parameter gradients over depth, at one step.
"""

_DIAGNOSE = """\
Say what is wrong in a Record, where, since when, why, and what to do: every health rule, and the
verdict on the gradient and the activation over depth. Exit code 0 where nothing is worse than a
note, 1 where something is, or where nothing was recorded that a rule could judge.
"""

_COMPARE = """\
Say which layer of a Record departs first from a baseline Record, at which step, by how many nats
and, with replicates, with what probability. Exit code 0 where they are the same, 1 where
something departs.
"""

_DOCTOR = """\
Check gradscope itself on your model, batch and machine: every recorded value against autograd's own
on an unwatched copy; losses and parameters with and without the watch, bit for bit; that closing it
restores every hook; that nothing is retained; peak memory; overhead. Exit code 0 where everything is
right or absent with a reason, 1 where something is wrong.

TARGET is package.module:function or file.py:function. The function takes no arguments and returns
(model, batch) or (model, batch, loss), with loss(model, batch) a scalar tensor; without it the loss is
model(**batch).loss. For example, in check.py:

  def gpt2():
      model = GPT2LMHeadModel(GPT2Config(n_layer=2))
      tokens = torch.randint(50257, (2, 64))
      return model, {"input_ids": tokens, "labels": tokens}

  gradscope doctor check.py:gpt2
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: the words after ``gradscope``; None for those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(_parser().parse_args(words), words)
    except SystemExit as exit_request:  # argparse: help, version, wrong usage
        return exit_request.code if isinstance(exit_request.code, int) else EXIT_BAD_INPUT
    except GradscopeError as error:
        print(f"gradscope: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"gradscope: {error.strerror or error}{where}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradscope", description="Gradient-flow diagnostics for PyTorch.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"gradscope {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    study = commands.add_parser(
        "study",
        help="measure and train the reference transformers, and draw the pictures",
        description=_STUDY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    study.add_argument(
        "--out", type=Path, default=Path("figures"), metavar="DIR", help="write there (default: figures)"
    )
    study.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="train on this file, byte by byte (default: the language reference that ships with Python)",
    )
    study.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="worker processes of one thread each (default: the number of cores)",
    )
    size = study.add_mutually_exclusive_group()
    size.add_argument(
        "--full",
        action="store_const",
        const="full",
        dest="plan",
        help="measure to 96 blocks and train up to 48, more variants, three seeds at every rate: "
        "over an hour on two cores",
    )
    size.add_argument(
        "--tiny",
        action="store_const",
        const="tiny",
        dest="plan",
        help="seconds instead of minutes, to see that everything works; its numbers mean nothing",
    )
    study.set_defaults(plan="default")

    show = commands.add_parser(
        "show",
        help="print a Record's layers, or plot a quantity over depth",
        description=_SHOW,
        allow_abbrev=False,
    )
    show.add_argument("record", type=Path, metavar="RECORD", help="a Record file (JSON Lines)")
    show.add_argument(
        "--step", type=int, metavar="N", help="the step to show (default: the last that was recorded)"
    )
    show.add_argument(
        "--plot", type=Path, metavar="FILE", help="also plot a quantity over depth to this picture"
    )
    show.add_argument(
        "--quantity",
        metavar="NAME",
        help="the quantity to plot, such as grad_l2 (the default), act_var or token_cosine; "
        "a wrong name lists them all",
    )
    diagnose = commands.add_parser(
        "diagnose",
        help="say what is wrong in a Record, where, why, and what to do",
        description=_DIAGNOSE,
        allow_abbrev=False,
    )
    diagnose.add_argument("record", type=Path, metavar="RECORD", help="a Record file (JSON Lines)")
    diagnose.add_argument("--trunk", metavar="NAME", help="only this trunk (default: all)")
    compare = commands.add_parser(
        "compare",
        help="say which layer of a Record departs first from another",
        description=_COMPARE,
        allow_abbrev=False,
    )
    compare.add_argument("record", type=Path, metavar="RECORD", help="a Record file: what is judged")
    compare.add_argument("baseline", type=Path, metavar="BASELINE", help="a Record file: how it was")
    compare.add_argument(
        "--tolerance",
        type=_nats,
        metavar="NATS",
        help="the smallest change that departs (default: .02 for one seed; else .05, parameters .20)",
    )
    compare.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write it there, for a pull-request comment"
    )
    doctor = commands.add_parser(
        "doctor",
        help="check every recorded value on your own model against plain autograd",
        description=_DOCTOR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    doctor.add_argument("target", metavar="TARGET", help="package.module:function, or file.py:function")
    doctor.add_argument(
        "--layers",
        metavar="GLOB",
        help="what to watch (default: blocks and branches; values: every module)",
    )
    doctor.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        metavar="S",
        help="how long to time the overhead; 0 leaves it out (default: 5)",
    )
    return parser


def _positive(word: str) -> int:
    try:
        number = int(word)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number above 0")
    return number


def _nats(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of nats, 0 or more")
    return number


def _run(options: argparse.Namespace, words: Sequence[str]) -> int:
    if options.command == "study":
        return _study(options, words)
    commands = {"show": _show, "diagnose": _diagnose, "compare": _compare, "doctor": _doctor}
    return commands[options.command](options)


def _study(options: argparse.Namespace, words: Sequence[str]) -> int:
    from gradscope.study import PLANS, run_study

    again = shlex.join(["gradscope", *words])
    run_study(PLANS[options.plan], options.out, text=options.text, jobs=options.jobs, again=again)
    return EXIT_OK


def _show(options: argparse.Namespace) -> int:
    from gradscope.errors import QuantityError
    from gradscope.record import Record
    from gradscope.show import terminal

    if options.quantity is not None and options.plot is None:
        raise QuantityError("--quantity says what to plot: add --plot FILE.png")
    record = Record.load(options.record)
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        console.print(terminal.layer_table(record, options.step, wide=console.width >= WIDE_COLUMNS))
    else:
        print(terminal.render(record, step=options.step), end="", flush=True)
    if options.plot is not None:
        _plot(record, options)
    return EXIT_OK


def _diagnose(options: argparse.Namespace) -> int:
    from gradscope.analysis import diagnose, verdict
    from gradscope.errors import QuantityError
    from gradscope.record import Record
    from gradscope.show import findings

    record = Record.load(options.record)
    diagnosis = diagnose(record, trunk=options.trunk)
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(findings.findings_tree(diagnosis))
    else:
        print(findings.render(diagnosis), end="")
    for trunk in record.trunks if options.trunk is None else (options.trunk,):
        for quantity in ("grad_l2", "act_mean_square"):
            try:
                print(f"\n{verdict(record, quantity, trunk=trunk)}", flush=True)
            except QuantityError as error:
                print(f"\n{quantity} over {trunk}: no verdict. {error}", flush=True)
    return EXIT_OK if diagnosis.healthy else EXIT_UNHEALTHY


def _compare(options: argparse.Namespace) -> int:
    from gradscope.analysis import compare
    from gradscope.record import Record

    record, baseline = Record.load(options.record), Record.load(options.baseline)
    comparison = compare(record, baseline, tolerance=options.tolerance)
    print(comparison, flush=True)
    if options.markdown is not None:
        options.markdown.write_text(comparison.markdown(), encoding="utf-8")
    return EXIT_OK if comparison.same else EXIT_UNHEALTHY


def _doctor(options: argparse.Namespace) -> int:
    from gradscope.experiment.doctor import doctor
    from gradscope.target import load_target

    target = load_target(options.target)
    report = doctor(
        target.build(), target.batch, target.loss, layers=options.layers, seconds=options.seconds
    )
    print(report, flush=True)
    return EXIT_OK if report.ok else EXIT_UNHEALTHY


def _plot(record: Record, options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("agg")  # a picture file needs no display
    from matplotlib import pyplot
    from matplotlib.backend_bases import FigureCanvasBase

    from gradscope.errors import QuantityError
    from gradscope.show import plots

    supported = FigureCanvasBase.get_supported_filetypes()
    if options.plot.suffix.lstrip(".").lower() not in supported:
        raise QuantityError(
            f"--plot {options.plot}: the name's ending says the format; pictures are written as "
            f"{', '.join(sorted(supported))}."
        )
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    plots.depth(record, options.quantity or "grad_l2", step=options.step, ax=axes)
    figure.savefig(options.plot, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
