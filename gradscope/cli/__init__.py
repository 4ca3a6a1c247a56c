"""The command line: ``study``, ``show``, ``diagnose``, ``compare``, ``check``, ``doctor``, ``--version``.

Exit codes: 0 done, healthy, or the same; 1 ``diagnose`` or ``doctor`` found a fault, ``compare`` or
``check`` a change; 2 wrong usage or input that cannot be used; 130 interrupted by Ctrl-C. Heavy imports
wait until a command needs them, so that ``gradscope --help`` answers at once.

`parser` holds the words, `check` the comparison with a baseline, `output` the signs in ASCII.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gradscope.cli.output import columns, plain_where_needed
from gradscope.cli.parser import command_parser
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: the words after ``gradscope``; None for those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    plain_where_needed()
    try:
        return _run(command_parser().parse_args(words), words)
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


def _run(options: argparse.Namespace, words: Sequence[str]) -> int:
    if options.command == "study":
        return _study(options, words)
    if options.command == "check":
        return _check(options, words)
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
    print(comparison.text(columns()), flush=True)
    if options.markdown is not None:
        options.markdown.write_text(comparison.markdown(), encoding="utf-8")
    return EXIT_OK if comparison.same else EXIT_UNHEALTHY


def _check(options: argparse.Namespace, words: Sequence[str]) -> int:
    from gradscope.cli.check import check_target

    try:
        passed = check_target(
            options.target,
            options.baseline,
            update=options.update,
            fail_on=options.fail_on,
            junit=options.junit,
            markdown=options.markdown,
            words=words,
        )
    except (GradscopeError, OSError):
        raise
    except Exception:  # the target's own: no regression was found, and no code 1 may say so
        traceback.print_exc()
        return EXIT_BAD_INPUT
    return EXIT_OK if passed else EXIT_UNHEALTHY


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
