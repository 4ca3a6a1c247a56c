"""What effective depth and path spectra cost, in forward and backward passes of the same model.

    python tests/benchmarks/path_cost.py [--rounds 7]

GPT-2 with 12 layers of width 384, 4 sequences of 128 tokens, on one thread. The measurements take turns
with the ordinary pass, so that a busy machine slows both; each ratio is that of one turn, and the median
is printed. The bounds are 2.5 for D with its checks, 4 with the contributions of all branches, and
K + 2 for the spectrum to length K.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import gradscope

LENGTHS = (0, 1, 4, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=128, n_embd=384, n_layer=12, n_head=6, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(256, (4, 128))
    batch = {"input_ids": tokens, "labels": tokens}

    def ordinary() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    measured: dict[str, tuple[Callable[[], object], float]] = {
        "effective depth": (lambda: gradscope.effective_depth(model, batch), 2.5),
        "with every branch": (lambda: gradscope.effective_depth(model, batch, branches=True), 4),
    }
    for k in LENGTHS:
        measured[f"spectrum to length {k}"] = (
            lambda k=k: gradscope.path_spectrum(model, batch, max_length=k, progress=False),
            k + 2,
        )
    ratios: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(rounds + 1):
        base = timed(ordinary)
        for name, (run, _) in measured.items():
            took = timed(run)
            if turn:  # the first one warms up
                ratios[name].append(took / base)
    for name, (_, bound) in measured.items():
        print(f"{name:24} {statistics.median(ratios[name]):5.2f}   bound {bound:g}")


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
