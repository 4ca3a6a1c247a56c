"""The words of the command line: every command, its options and its help."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from gradscope import __version__

__all__ = ["command_parser"]

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

_CHECK = """\
Compare the gradients of a model with a baseline file: exact facts first, then the same seeds, then
the noise of other seeds. Exit code 0 where they pass, 1 where they depart or the baseline is of
something else, 2 where there is no baseline, it cannot be used (it is then never overwritten), or the
target fails.

TARGET is package.module:function or file.py:function. The function takes no arguments and returns
(make_model, batch) or (make_model, batch, loss); the batch must be the same every time. With a model
instead of a function that makes one, batch is a list of batches.

  gradscope check check.py:gpt2 --baseline gradients.json --update     the first time, and to accept
  gradscope check check.py:gpt2 --baseline gradients.json              from then on
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


def command_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
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
    check = commands.add_parser(
        "check",
        help="compare a model's gradients with a baseline file",
        description=_CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    check.add_argument("target", metavar="TARGET", help="package.module:function, or file.py:function")
    check.add_argument(
        "--baseline", type=Path, required=True, metavar="FILE", help="the baseline file (JSON)"
    )
    check.add_argument(
        "--update",
        action="store_true",
        help="accept: write a missing baseline, replace one that the model departs from",
    )
    check.add_argument(
        "--fail-on",
        metavar="SPEC",
        help="the smallest change worth failing for, such as flow:20%%,delta:.5nat,effective_depth:10%%; "
        "kinds: flow, act, upd, gup, endpoint, delta, param_grad, rms, mean, mean rms, effective_depth",
    )
    check.add_argument("--junit", type=Path, metavar="FILE", help="also write a JUnit XML report there")
    check.add_argument(
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
