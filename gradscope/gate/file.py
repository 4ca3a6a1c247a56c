"""The file of a gradient baseline: JSON, one line per feature, made to be read in a diff.

Schema 2. A row of a feature is ``[mean, sd, x_0, …, x_4]``: mean and standard deviation over all
replicates, then the first five one by one, in nats. ``[x]`` is a value that is the same in all; a word
(``zero``, ``absent``, …) stands where there is none. Blocks and parameters hold their own features; of a
parameter only what is unusual is written besides: ``trained`` false, ``gradient`` other than ``ok``,
``zero rows`` other than 0, ``constant`` true. Nothing in the file is ever executed or unpickled.

Schema 1 was never released and is not read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from gradscope.analysis.gate.features import Feature, role_of
from gradscope.errors import GateError
from gradscope.gate.baseline import PAIRED, Baseline, Expected, ParameterRow
from gradscope.gate.facts import block_of

__all__ = ["SCHEMA", "outdated", "read", "write"]

SCHEMA: Final = 2
_PARAMETER_KINDS: Final = ("rms", "param_grad")
_BLOCK_KINDS: Final = ("flow", "act", "upd", "gup")
_ROWS: Final = (
    "mean and standard deviation over all replicates, then the first 5 one by one; natural logarithms; "
    "one number is the same in all"
)
_ADVICE: Final = (
    "It is not overwritten: restore it from version control, or delete it and take a new one."
)


def write(baseline: Baseline, path: Path) -> Path:
    """See `Baseline.save`."""
    if path.is_dir():
        raise GateError(f"{path} is a folder; a baseline is a file.")
    if path.exists() and path.stat().st_size:
        try:
            if not outdated(path):
                read(path)
        except GateError as error:
            raise GateError(f"{error} {'' if _ADVICE in str(error) else _ADVICE}".rstrip()) from None
        # Root may write everything, and a new file takes the place of the old one: its mode says no.
        if not os.access(path, os.W_OK) or not path.stat().st_mode & 0o222:
            raise GateError(
                f"{path} is read-only and was not changed. Make it writable to accept a change."
            )
    target = path.resolve()
    temporary = target.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(_text(_document(baseline)), encoding="utf-8", newline="\n")
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise GateError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def outdated(path: Path) -> bool:
    """Whether a baseline has an older schema, which is not read and may be replaced by a new one."""
    schema = _document_of(path)["schema"]
    return schema < SCHEMA


def read(path: Path) -> Baseline:
    """See `Baseline.load`."""
    document = _document_of(path)
    if document["schema"] < SCHEMA:
        raise GateError(
            f"{path} has schema {document['schema']}, which this version of gradscope no longer reads. "
            "Replace it by a new one: pytest --gradscope-update, or gradscope check --update."
        )
    try:
        return _baseline(document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise GateError(
            f"{path} is damaged: {type(error).__name__} {error} while reading it. {_ADVICE}"
        ) from None


def _document_of(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise GateError(f"{path} is a folder; a baseline is a file.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise GateError(f"There is no baseline {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise GateError(f"{path} cannot be read: {error}. {_ADVICE}") from error
    if not text.strip():
        raise GateError(f"{path} is damaged: it is empty. {_ADVICE}")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GateError(f"{path} is damaged: {error}. {_ADVICE}") from None
    if not isinstance(document, dict) or document.get("gradscope") != "baseline":
        raise GateError(f"{path} is no gradient baseline. {_ADVICE}")
    schema = document.get("schema")
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise GateError(f"{path} is damaged: its schema is {schema!r}. {_ADVICE}")
    if schema > SCHEMA:
        raise GateError(
            f"{path} has schema {schema}, and this version of gradscope reads {SCHEMA}: a newer one "
            f"wrote it. Upgrade torch-gradscope. {_ADVICE}"
        )
    return cast("dict[str, Any]", document)


def _text(document: Mapping[str, Any]) -> str:
    return "".join(_written(document, "")) + "\n"


def _written(value: Any, indent: str) -> Iterator[str]:
    if not isinstance(value, dict) or not value:
        yield json.dumps(value, ensure_ascii=False, allow_nan=False)
        return
    items = cast("dict[str, Any]", value)
    for i, (key, inner) in enumerate(items.items()):
        yield f"{',' if i else '{'}\n{indent}  {json.dumps(key, ensure_ascii=False)}: "
        yield from _written(inner, f"{indent}  ")
    yield f"\n{indent}}}"


# -- writing -----------------------------------------------------------------------------------------


def _checksums(values: Sequence[float]) -> list[float | None]:
    """Three decimals: two of the same tensor lie within .01. One number if all are the same."""
    found = [round(float(x), 3) + 0.0 if math.isfinite(x) else None for x in values]
    return found[:1] if len(set(found)) == 1 else found


def _row(item: Expected) -> list[float] | str:
    if item.state != "value":
        return item.state
    if not item.spread and set(item.paired) == {item.mean}:
        return [item.mean]
    return [item.mean, item.spread, *item.paired]


def _document(b: Baseline) -> dict[str, Any]:
    blocks: dict[str, dict[str, Any]] = {name: {} for name in b.blocks}
    parameters = {name: _parameter(p) for name, p in b.parameters.items()}
    others: dict[str, Any] = {}
    for item in b.features:
        feature = item.feature
        owner, bracket, part = feature.layer.partition("[")
        if feature.kind in _BLOCK_KINDS and feature.layer in blocks:
            blocks[feature.layer][feature.kind] = _row(item)
        elif feature.kind in _PARAMETER_KINDS and owner in parameters:
            parameters[owner][feature.kind + bracket + part] = _row(item)
            if feature.block != block_of(owner, b.blocks):
                parameters[owner]["block"] = feature.block
        else:
            others[feature.name] = _row(item)
    random = {"random states": list(b.random)} if b.random else {}
    return {
        "gradscope": "baseline",
        "schema": SCHEMA,
        "replicates are": b.kind,
        "rows": _ROWS,
        "fingerprint": dict(b.fingerprint),
        "summary": dict(b.summary),
        "effective depth": [float(f"{x:.4g}") for x in b.effective_depth],
        "seeds": list(b.seeds),
        "batches": list(b.batches),
        **random,
        "not finite": b.nonfinite,
        "skips and norms": dict(b.architecture),
        "blocks": blocks,
        "model": others,
        "parameters": parameters,
        "activation checksums": {name: _checksums(c) for name, c in b.activation.items()},
        "gradient checksums": {name: _checksums(c) for name, c in b.output_grad.items()},
    }


def _parameter(p: ParameterRow) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": list(p.shape)}
    if not p.trained:
        row["trained"] = False
    if p.gradient != "ok":
        row["gradient"] = p.gradient
    if p.zero_rows != 0:
        row["zero rows"] = None if p.zero_rows is None else round(p.zero_rows, 6)
    if p.constant:
        row["constant"] = True
    row["checksum"] = _checksums(p.checksum)
    return row


# -- reading -----------------------------------------------------------------------------------------


def _numbers(values: Any, count: int) -> tuple[float, ...]:
    found = tuple(math.nan if x is None else float(x) for x in values)
    return found * count if len(found) == 1 else found


def _expected(feature: Feature, row: Any, count: int) -> Expected:
    if isinstance(row, str):
        return Expected(feature, row)
    numbers = [float(x) for x in row]
    if len(numbers) == 1:
        return Expected(feature, "value", numbers[0], 0.0, (numbers[0],) * count)
    mean, spread, *paired = numbers
    if len(paired) != count:
        raise ValueError(f"{feature.name} has {len(paired)} replicates one by one instead of {count}")
    return Expected(feature, "value", mean, spread, tuple(paired))


def _features(document: Mapping[str, Any], blocks: tuple[str, ...], count: int) -> Iterator[Expected]:
    def feature(kind: str, layer: str, block: int) -> Feature:
        return Feature(kind, layer, role_of(kind, layer, blocks[block] if block >= 0 else ""), block)

    for i, name in enumerate(blocks):
        for kind, row in document["blocks"][name].items():
            if kind in _BLOCK_KINDS:
                yield _expected(feature(kind, name, i), row, count)
    for name, row in document["model"].items():
        kind, _, layer = name.partition(" ")
        block = block_of(layer, blocks) if kind in _PARAMETER_KINDS else -1
        yield _expected(feature(kind, layer, block), row, count)
    for name, rows in document["parameters"].items():
        block = int(rows.get("block", block_of(name, blocks)))
        for key, row in rows.items():
            kind, bracket, part = key.partition("[")
            if kind in _PARAMETER_KINDS:
                yield _expected(feature(kind, name + bracket + part, block), row, count)


def _baseline(document: Mapping[str, Any]) -> Baseline:
    kind = str(document["replicates are"])
    if kind not in ("initialisation", "batch"):
        raise ValueError(f"replicates are {kind!r}")
    seeds = tuple(int(s) for s in document["seeds"])
    count = min(PAIRED, len(seeds))
    blocks = tuple(str(name) for name in document["blocks"])
    parameters: dict[str, ParameterRow] = {}
    for name, row in document["parameters"].items():
        share = row.get("zero rows", 0.0)
        parameters[str(name)] = ParameterRow(
            shape=tuple(int(n) for n in row["shape"]),
            trained=bool(row.get("trained", True)),
            gradient=str(row.get("gradient", "ok")),
            zero_rows=None if share is None else float(share),
            constant=bool(row.get("constant", False)),
            checksum=_numbers(row["checksum"], count),
        )
    return Baseline(
        kind=kind,
        fingerprint={str(k): str(v) for k, v in document["fingerprint"].items()},
        summary={str(k): str(v) for k, v in document["summary"].items()},
        effective_depth=tuple(float(x) for x in document["effective depth"]),
        seeds=seeds,
        batches=tuple(str(d) for d in document["batches"]),
        blocks=blocks,
        architecture={str(k): str(v) for k, v in document["skips and norms"].items()},
        parameters=parameters,
        features=tuple(_features(document, blocks, count)),
        nonfinite=bool(document["not finite"]),
        random=tuple(str(word) for word in document.get("random states", ())),
        activation={str(k): _numbers(v, count) for k, v in document["activation checksums"].items()},
        output_grad={str(k): _numbers(v, count) for k, v in document["gradient checksums"].items()},
    )
