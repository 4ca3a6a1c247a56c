"""The depth axis that gradscope finds in every architecture of the transformers library, as a table.

    python tests/benchmarks/architectures.py [--out FILE]

Each is built from its configuration with few layers, on the meta device, and the axis is compared with
what the configuration says, or the code (tests/architecture_axes.py). One that differs is marked as
wrong, and the exit status is 1. It takes about five minutes.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import architectures
import transformers
from architecture_axes import NO_AXIS, expected

from gradscope.layers import find_trunks

HEAD = """# The depth axis of every architecture

What `gradscope.watch` finds by itself in the {total} model types of transformers {version}: {right}
right, {asked} asked for (no block is a module, and the error says what to write), {wrong} wrong. The
library itself does not build {unbuilt} of them from their default configuration here; they stand at the
end. Each has few layers, another number for every stack, so that the configuration says which list is
which. *Checked*: `forward` where plain hooks also saw every block run in order, each on the output of
the one before, in a forward pass on the meta device; `configuration` where no input was at hand that the
model takes, or another step lies between the blocks. Branches are proposals by name, which the autograd
graph of the first recorded forward pass proves or drops; where there are none, the blocks alone are on
the axis. Made by `python tests/benchmarks/architectures.py --out figures/architectures.md`.

| model type | containers and blocks | branches | checked |
| --- | --- | --- | --- |
"""


def row(model_type: str) -> tuple[str, str]:
    """What became of it (right, asked, wrong, unbuilt), and its line."""
    try:
        model, counts = architectures.build(model_type)
    except Exception as error:
        package = re.search(r"requires the (\S+) library", str(error))
        why = f"needs {package[1]}" if package else f"{type(error).__name__} at its default configuration"
        return "unbuilt", f"- `{model_type}`: {why}"
    trunks = find_trunks(model)
    right = expected(model_type, model, counts)
    if {t.name: len(t.blocks) for t in trunks} != right:
        found = ", ".join(f"`{t.name}` {len(t.blocks)}" for t in trunks)
        return "wrong", f"| {model_type} | **wrong**: {found} | | |"
    if model_type in NO_AXIS:
        return (
            "asked",
            f"| {model_type} | asked for: blocks are parts in several lists | | code |",
        )
    places: Counter[str] = Counter()
    branches: dict[str, None] = {}
    for trunk in trunks:
        places[re.sub(r"\.\d+(?=\.|$)", ".*", trunk.name)] += 1
        for names, block in zip(trunk.branches, trunk.blocks, strict=True):
            branches.update(dict.fromkeys(n.removeprefix(f"{block}.") for n in names))
    blocks = {
        place: [len(t.blocks) for t in trunks if re.sub(r"\.\d+(?=\.|$)", ".*", t.name) == place]
        for place in places
    }
    said = "; ".join(f"`{place}` {', '.join(map(str, n))}" for place, n in blocks.items())
    seen = []
    for trunk in trunks:
        calls = architectures.observe(model, trunk.blocks)
        whole = calls is not None and len(set(calls.numbers)) == len(trunk.blocks)
        seen.append(whole and calls is not None and calls.in_order and all(calls.links))
    checked = "forward" if all(seen) else "forward in part" if any(seen) else "configuration"
    return "right", f"| {model_type} | {said} | {', '.join(f'`{b}`' for b in branches)} | {checked} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    lines: dict[str, list[str]] = {"right": [], "asked": [], "wrong": [], "unbuilt": []}
    table: list[str] = []
    for model_type in architectures.MODEL_TYPES:
        became, line = row(model_type)
        lines[became].append(line)
        if became != "unbuilt":
            table.append(line)
    text = HEAD.format(
        version=transformers.__version__,
        total=len(architectures.MODEL_TYPES),
        **{became: len(found) for became, found in lines.items()},
    )
    text += "\n".join(table) + "\n\n## Not built\n\n" + "\n".join(lines["unbuilt"]) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")
    return 1 if lines["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
