"""The file of a gradient baseline: JSON, one line per layer, made to be read in a diff.

Schema 1. Numbers are in nats unless the name says otherwise; ``mean`` and ``sd`` are over all replicates,
``same seeds`` holds the first five one by one. Nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gradscope.analysis.gate.features import Feature, role_of
from gradscope.errors import GateError
from gradscope.gate.baseline import Baseline, Expected, ParameterRow

__all__ = ["SCHEMA", "read", "write"]

SCHEMA: Final = 1
_ADVICE: Final = (
    "It is not overwritten: restore it from version control, or delete it and take a new one."
)


def write(baseline: Baseline, path: Path) -> Path:
    """See `Baseline.save`."""
    if path.is_dir():
        raise GateError(f"{path} is a folder; a baseline is a file.")
    if path.exists() and path.stat().st_size:
        try:
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
        temporary.write_text(_text(_document(baseline)), encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise GateError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def read(path: Path) -> Baseline:
    """See `Baseline.load`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise GateError(f"There is no baseline {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise GateError(f"{path} cannot be read: {error}. {_ADVICE}") from error
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GateError(f"{path} is damaged: {error}. {_ADVICE}") from None
    if not isinstance(document, dict) or document.get("gradscope") != "baseline":
        raise GateError(f"{path} is no gradient baseline. {_ADVICE}")
    schema = document.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise GateError(
            f"{path} has schema {schema!r}, and this version of gradscope reads {SCHEMA} and older: a "
            f"newer one wrote it. Upgrade torch-gradscope. {_ADVICE}"
        )
    try:
        return _baseline(document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise GateError(
            f"{path} is damaged: {type(error).__name__} {error} while reading it. {_ADVICE}"
        ) from None


def _text(document: Mapping[str, Any]) -> str:
    def plain(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    parts: list[str] = []
    for key, value in document.items():
        if isinstance(value, dict) and value:
            rows = [f"    {plain(name)}: {plain(row)}" for name, row in value.items()]
            parts.append(f"  {plain(key)}: {{\n" + ",\n".join(rows) + "\n  }")
        else:
            parts.append(f"  {plain(key)}: {plain(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _four(values: Any) -> list[float | None]:
    return [round(float(x), 4) if math.isfinite(x) else None for x in values]


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(math.nan if x is None else float(x) for x in values)


def _document(b: Baseline) -> dict[str, Any]:
    features: dict[str, Any] = {}
    for item in b.features:
        row: dict[str, Any] = {}
        if item.state == "value":
            row = {"mean": item.mean, "sd": item.spread, "same seeds": list(item.paired)}
        else:
            row = {"state": item.state}
        if item.feature.block >= 0:
            row["block"] = item.feature.block
        features[item.feature.name] = row
    parameters = {
        name: {
            "shape": list(p.shape),
            "trained": p.trained,
            "gradient": p.gradient,
            "zero rows": p.zero_rows if p.zero_rows is None else round(p.zero_rows, 6),
            "constant": p.constant,
            "checksum": _four(p.checksum),
        }
        for name, p in b.parameters.items()
    }
    return {
        "gradscope": "baseline",
        "schema": SCHEMA,
        "replicates are": b.kind,
        "fingerprint": dict(b.fingerprint),
        "summary": dict(b.summary),
        "effective depth": _four(b.effective_depth),
        "seeds": list(b.seeds),
        "batches": list(b.batches),
        "blocks": list(b.blocks),
        "not finite": b.nonfinite,
        "architecture": dict(b.architecture),
        "features": features,
        "parameters": parameters,
        "activation checksums": {name: _four(c) for name, c in b.activation.items()},
        "gradient checksums": {name: _four(c) for name, c in b.output_grad.items()},
    }


def _baseline(document: Mapping[str, Any]) -> Baseline:
    blocks = tuple(str(name) for name in document["blocks"])
    kind = str(document["replicates are"])
    if kind not in ("initialisation", "batch"):
        raise ValueError(f"replicates are {kind!r}")
    features: list[Expected] = []
    for name, row in document["features"].items():
        what, _, layer = name.partition(" ")
        block = int(row.get("block", -1))
        feature = Feature(what, layer, role_of(what, layer, blocks[block] if block >= 0 else ""), block)
        if "state" in row:
            features.append(Expected(feature, str(row["state"])))
        else:
            mean, spread = float(row["mean"]), float(row["sd"])
            features.append(Expected(feature, "value", mean, spread, _numbers(row["same seeds"])))
    parameters = {
        str(name): ParameterRow(
            shape=tuple(int(n) for n in row["shape"]),
            trained=bool(row["trained"]),
            gradient=str(row["gradient"]),
            zero_rows=None if row["zero rows"] is None else float(row["zero rows"]),
            constant=bool(row["constant"]),
            checksum=_numbers(row["checksum"]),
        )
        for name, row in document["parameters"].items()
    }
    return Baseline(
        kind=kind,
        fingerprint={str(k): str(v) for k, v in document["fingerprint"].items()},
        summary={str(k): str(v) for k, v in document["summary"].items()},
        effective_depth=_numbers(document["effective depth"]),
        seeds=tuple(int(s) for s in document["seeds"]),
        batches=tuple(str(d) for d in document["batches"]),
        blocks=blocks,
        architecture={str(k): str(v) for k, v in document["architecture"].items()},
        parameters=parameters,
        features=tuple(features),
        nonfinite=bool(document["not finite"]),
        activation={str(k): _numbers(v) for k, v in document["activation checksums"].items()},
        output_grad={str(k): _numbers(v) for k, v in document["gradient checksums"].items()},
    )
