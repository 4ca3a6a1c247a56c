"""The Record and its file: what goes in comes out, and damage is told, never guessed over."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import stat
import struct
import sys
import warnings
from collections.abc import Mapping
from enum import IntFlag
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.errors import GradscopeWarning, RecordError, RecordInUseError
from gradscope.record import SIGNALS, STATISTICS, Record, RecordWriter, Rows, Step, thin

COLUMNS = [
    "step",
    "replicate",
    "trunk",
    "depth",
    "layer",
    "type",
    "call",
    "signal",
    "statistic",
    "value",
    "status",
]
ROWS = Rows.of(
    [
        ("h", 0.0, "h.0", "Stream", 0, "activation", "l2"),
        ("h", 1.0, "h.0", "Block", 0, "activation", "l2"),
        ("h", 1.5, "h.1.注意", "Attention", 2, "output_grad", "mean"),
        ("", math.nan, "head.weight", "Parameter", 0, "param_grad", "l2"),
    ]
)
OTHER_ROWS = Rows.of([("encoder", 1.0, "encoder.0", "Block", 0, "activation", "absmax")])
HEADER = {
    "model": "Modèle 模型 🙂",
    "loss_denominator": None,
    "replicates": "run",
    "seeds": [0, 1],
    "versions": {"torch": "2.13.0"},
}


def make_step(number: int, *, rows: Rows = ROWS, replicate: int = 0, **others: Any) -> Step:
    values = [number + 1 / (1 + row) for row in range(len(rows))]
    return Step.of(rows, values, others.pop("absent", {}), step=number, replicate=replicate, **others)


def example() -> Record:
    """Every kind of value and of absence, two row tables, two replicates."""
    return Record(
        HEADER,
        (
            Step.of(ROWS, [math.nan, math.inf, -math.inf, -0.0], {}, step=0, replicate=0, loss=math.nan),
            Step.of(
                ROWS,
                [0.0, 1 / 3, 5e-324, 7.0],
                {0: "frozen", 3: "not called"},
                step=0,
                replicate=1,
                loss=math.inf,
                learning_rate=(0.1, 1e-3),
                wall_time_s=0.25,
                loss_scale=1024.0,
                finding="nicht endlich: h.1.注意",
            ),
            Step.of(OTHER_ROWS, [2.0**53 + 2], {}, step=3, replicate=0, learning_rate=0.1),
            Step.of(ROWS, [1e308, 2.0**52, -3.0, 1e-300], {1: "frozen"}, step=4, replicate=0),
        ),
    )


def bits(step: Step) -> list[bytes]:
    """The values exactly: tells -0.0 from 0.0, and any NaN is the NaN."""
    return [b"nan" if v != v else struct.pack("<d", v) for v in step.value.tolist()]


def assert_identical(a: Record, b: Record) -> None:
    assert a == b
    assert dict(a.header) == dict(b.header)
    assert len(a.steps) == len(b.steps)
    for x, y in zip(a.steps, b.steps, strict=True):
        assert bits(x) == bits(y)
        assert x.words().tolist() == y.words().tolist()
        assert list(map(repr, x.rows.entries())) == list(map(repr, y.rows.entries()))
        for name in (
            "step",
            "replicate",
            "wall_time_s",
            "loss",
            "learning_rate",
            "loss_scale",
            "finding",
        ):
            assert repr(getattr(x, name)) == repr(getattr(y, name)), name


# -- the table of statistics -----------------------------------------------------------------


def test_every_statistic_is_of_a_known_signal_and_explained():
    for name, statistic in STATISTICS.items():
        assert statistic.name == name
        assert statistic.signals
        assert set(statistic.signals) <= set(SIGNALS)
        assert statistic.meaning
        assert statistic.unit in {"signal", "signal^2", "elements", "positions", "rad", "1"}
        assert statistic.where in {"all", "stream", "axis", "packed"}
        assert statistic.pooled in {"sum", "norm", "mean", "own"}


# -- steps -----------------------------------------------------------------------------------


def test_absent_measured_nan_and_zero_are_three_things():
    rows = Rows.of([("", math.nan, f"w{i}", "Parameter", 0, "param_grad", "l2") for i in range(3)])
    step = Step.of(rows, [5.0, math.nan, 0.0], {0: "frozen"}, step=0, replicate=0)
    assert np.isnan(step.value).tolist() == [True, True, False]
    assert step.words().tolist() == ["frozen", "ok", "ok"]


def test_a_step_needs_one_value_per_row():
    with pytest.raises(RecordError, match=r"\(3,\) values for 4 rows"):
        Step.of(ROWS, [1, 2, 3], {}, step=0, replicate=0)
    with pytest.raises(RecordError, match=r"\(4,\) values and \(1,\) statuses for 4 rows"):
        Step(step=0, replicate=0, rows=ROWS, value=np.zeros(4), status=np.zeros(1, np.uint8))


@pytest.mark.parametrize("row", [-1, 4])
def test_a_reason_belongs_to_a_row_that_exists(row):
    with pytest.raises(RecordError, match=f"row {row} of 4"):
        Step.of(ROWS, [1, 2, 3, 4], {row: "frozen"}, step=0, replicate=0)


def test_more_reasons_than_codes_still_say_that_the_value_is_absent(tmp_path):
    n = 300
    rows = Rows.of([("", math.nan, f"w{i}", "Parameter", 0, "param_grad", "l2") for i in range(n)])
    reasons = {i: f"error: number {i}" for i in range(n)}
    step = Step.of(rows, np.ones(n), reasons, step=0, replicate=0)
    assert np.isnan(step.value).all()
    assert step.words()[:254].tolist() == [f"error: number {i}" for i in range(254)]
    assert set(step.words()[254:]) == {"error: more than 254 different reasons in one step"}
    assert Record.load(Record({}, (step,)).save(tmp_path / "r.jsonl")).steps == (step,)


def test_equality_sees_every_difference_and_nan_equals_nan():
    step = make_step(1, loss=math.nan, learning_rate=(0.1, math.nan), absent={1: "frozen"})
    assert step == make_step(1, loss=math.nan, learning_rate=(0.1, math.nan), absent={1: "frozen"})
    for change in (
        {"step": 2},
        {"replicate": 1},
        {"loss": 1.0},
        {"learning_rate": (0.1, 0.2)},
        {"learning_rate": (0.1,)},
        {"learning_rate": None},
        {"wall_time_s": 1.0},
        {"loss_scale": 2.0},
        {"finding": "x"},
        {"value": step.value + 1},
        {"status": np.zeros(4, np.uint8)},
    ):
        assert dataclasses.replace(step, **change) != step, change
    assert step != "a step"
    assert ROWS != OTHER_ROWS
    assert ROWS != "rows"
    for key in ("trunk", "layer", "type", "signal", "statistic"):
        assert dataclasses.replace(ROWS, **{key: ("x",) * 4}) != ROWS
    assert dataclasses.replace(ROWS, depth=ROWS.depth + 1) != ROWS
    assert dataclasses.replace(ROWS, call=ROWS.call + 1) != ROWS
    with pytest.raises(RecordError, match="differ in length"):
        dataclasses.replace(ROWS, trunk=("x",) * 5)


# -- immutability ----------------------------------------------------------------------------


def test_nothing_of_a_record_can_be_changed():
    record = example()
    step = record.steps[1]
    for array in (step.value, step.status, step.rows.depth, step.rows.call):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            array.view().flags.writeable = True
    for thing, name in ((record, "steps"), (step, "value"), (step.rows, "layer")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, None)
    header: Any = record.header
    with pytest.raises(TypeError):
        header["model"] = "another"
    with pytest.raises(TypeError):
        header["versions"]["torch"] = "another"
    assert header["seeds"] == (0, 1)


def test_a_record_keeps_what_it_was_given():
    header = {"seeds": [0, 1], "versions": {"torch": "2.13.0"}}
    values, depth = np.ones(1), np.ones(1)
    rows = Rows(("h",), depth, ("h.0",), ("Block",), np.zeros(1, np.int64), ("activation",), ("l2",))
    direct = Step(step=0, replicate=0, rows=rows, value=values, status=np.zeros(1, np.uint8))
    built = Step.of(rows, values, {}, step=1, replicate=0)
    steps = [direct, built]
    record = Record(header, steps)  # type: ignore[arg-type]
    header["seeds"].append(2)  # type: ignore[attr-defined]
    header["versions"]["torch"] = "0"  # type: ignore[index]
    steps.clear()
    values[0] = depth[0] = 9  # the caller's own arrays stay writeable
    assert dict(record.header) == {"schema": 1, "seeds": (0, 1), "versions": {"torch": "2.13.0"}}
    assert [s.value.tolist() for s in record.steps] == [[1.0], [1.0]]
    assert record.steps[0].rows.depth.tolist() == [1.0]


def test_a_read_only_view_of_a_writeable_array_is_copied():
    base = np.ones(4)
    view = base.view()
    view.flags.writeable = False
    step = Step(step=0, replicate=0, rows=ROWS, value=view, status=np.zeros(4, np.uint8))
    base[:] = 2
    assert step.value.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_and_pickles_are_equal_and_immutable(copied):
    record = example()
    again = copied(record)
    assert_identical(again, record)
    assert again.steps[0].rows is again.steps[1].rows  # tables stay shared
    for step in again.steps:
        assert not step.value.flags.writeable
        assert not step.status.flags.writeable
        assert not step.rows.depth.flags.writeable
    with pytest.raises(TypeError):
        again.header["versions"]["torch"] = "0"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"a": {"b": [1, {2, 3}]}}, r"header\['a'\]\['b'\]\[1\] is \{2, 3\} \(set\)"),
        ({"a": math.nan}, r"header\['a'\] is nan"),
        ({"a": -math.inf}, r"header\['a'\] is -inf"),
        ({"a": {1: 2}}, r"header\['a'\] is \{1: 2\}"),
        ({"a": Path("x")}, r"Write str\(\.\.\.\) of it"),
        ({"gradscope": "0.1.0"}, "cannot have a key 'gradscope'"),
    ],
)
def test_a_header_holds_what_a_file_can(tmp_path, bad, said):
    with pytest.raises(RecordError, match=said):
        Record(bad)
    with pytest.raises(RecordError, match=said):
        RecordWriter(tmp_path / "r.jsonl", bad)
    assert list(tmp_path.iterdir()) == []


def test_numbers_and_strings_of_other_types_become_plain_in_a_header(tmp_path):
    class Version(str):  # as torch.__version__ is
        def __eq__(self, other: object) -> bool:
            raise TypeError

        __hash__ = str.__hash__

    given = {"a": np.int64(3), "b": np.float32(0.5), "c": Version("2.13.0"), "d": IntFlag("F", "x").x}
    record = Record({**given, "e": [np.bool_(True)]})
    assert [type(record.header[k]) for k in "abcd"] == [int, float, str, int]
    assert record.header["e"] == (True,)
    assert Record.load(record.save(tmp_path / "r.jsonl")) == record


# -- reading ---------------------------------------------------------------------------------


def test_the_tidy_table_has_one_row_per_value():
    record = example()
    frame = record.to_pandas()
    assert list(frame.columns) == COLUMNS
    assert len(frame) == len(record) == 13
    assert frame["value"].dtype == np.float64
    assert frame["step"].dtype == frame["replicate"].dtype == frame["call"].dtype == np.int64
    row = frame.iloc[6]
    assert row["layer"] == "h.1.注意"
    assert (row["step"], row["replicate"], row["trunk"], row["depth"]) == (0, 1, "h", 1.5)
    assert (row["type"], row["call"], row["signal"]) == ("Attention", 2, "output_grad")
    assert (row["statistic"], row["value"], row["status"]) == ("mean", 5e-324, "ok")
    assert frame["status"].tolist().count("frozen") == 2
    assert frame["depth"].isna().sum() == 3


@pytest.mark.parametrize("record", [Record({}), Record({}, (make_step(0),))])
def test_tables_without_rows_have_the_same_columns_and_types(record):
    empty = record.table(layer="no such layer")
    full = example().table()
    assert list(empty) == list(full) == COLUMNS
    assert {k: v.dtype for k, v in empty.items()} == {k: v.dtype for k, v in full.items()}
    assert {len(v) for v in empty.values()} == {0}


@pytest.mark.parametrize(
    ("where", "mask"),
    [
        ({"step": 0}, lambda t: t.step == 0),
        ({"step": range(1, 4)}, lambda t: t.step.isin([1, 2, 3])),
        ({"step": np.array([0, 3])}, lambda t: t.step.isin([0, 3])),
        ({"replicate": 1}, lambda t: t.replicate == 1),
        ({"layer": "h.0"}, lambda t: t.layer == "h.0"),
        ({"layer": ["h.0", "encoder.0"]}, lambda t: t.layer.isin(["h.0", "encoder.0"])),
        ({"depth": {1.0, 1.5}}, lambda t: t.depth.isin([1.0, 1.5])),
        ({"status": "frozen"}, lambda t: t.status == "frozen"),
        ({"value": 1e308}, lambda t: t.value == 1e308),
        ({"value": -3.0, "status": "ok"}, lambda t: (t.value == -3.0) & (t.status == "ok")),
        ({"call": 2, "trunk": "h"}, lambda t: (t.call == 2) & (t.trunk == "h")),
        (
            {"signal": "activation", "statistic": ("l2", "absmax"), "type": "Block"},
            lambda t: (
                (t.signal == "activation") & t.statistic.isin(["l2", "absmax"]) & (t.type == "Block")
            ),
        ),
    ],
)
def test_table_selects_what_pandas_selects(where, mask):
    record = example()
    frame = record.to_pandas()
    expected = frame[mask(frame)].reset_index(drop=True)
    found = pd.DataFrame(record.table(**where))
    assert 0 < len(expected) < len(frame)
    pd.testing.assert_frame_equal(found, expected)


def test_an_unknown_column_is_named():
    with pytest.raises(RecordError, match=r"no column \['layers'\]; the columns are"):
        example().table(layers="h.0")


def test_repr_trunks_and_size():
    record = example()
    text = repr(record)
    for part in ("Modèle 模型 🙂", "steps 0–4", "2 replicates", "13 values"):
        assert part in text
    assert (
        repr(Record({}))
        == "<Record of a model: no steps, 0 replicates, 0 layers and parameters, 0 values>"
    )
    assert record.trunks == ("h", "encoder")
    assert Record({}).trunks == ()
    more = Record(HEADER, (*record.steps, make_step(9)))
    assert more.nbytes - record.nbytes == more.steps[-1].nbytes  # its row table is shared


# -- files: round trip -----------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    record = example()
    path = record.save(tmp_path / "new" / "folder" / "r.jsonl")
    assert path == tmp_path / "new" / "folder" / "r.jsonl"
    loaded = Record.load(str(path))
    assert_identical(loaded, record)
    assert loaded.steps[0].rows is loaded.steps[1].rows is loaded.steps[3].rows
    assert path.read_text(encoding="utf-8").count('"rows":') == 2
    pd.testing.assert_frame_equal(loaded.to_pandas(), record.to_pandas())
    assert loaded.save(tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


def test_an_empty_record_round_trips(tmp_path):
    assert_identical(Record.load(Record(HEADER).save(tmp_path / "r.jsonl")), Record(HEADER))


def test_equal_row_tables_are_written_once(tmp_path):
    twin = Rows.of(list(ROWS.entries()))
    assert twin == ROWS
    record = Record({}, (make_step(0), make_step(1, rows=twin), make_step(2), make_step(3, rows=twin)))
    path = record.save(tmp_path / "r.jsonl")
    assert path.read_text(encoding="utf-8").count('"rows":') == 1
    assert_identical(Record.load(path), record)


def foreign_reader(path: Path) -> list[tuple[Any, ...]]:
    """What the module's docstring promises: the tidy table from nothing but a JSON parser."""
    keys = ("trunk", "depth", "layer", "type", "call", "signal", "statistic")
    tables, table = {}, []
    with path.open(encoding="utf-8") as file:
        assert json.loads(next(file))["gradscope"] == "record"
        for entry in map(json.loads, file):
            if "rows" in entry:
                tables[entry["rows"]] = list(zip(*(entry[k] for k in keys), strict=True))
            elif "step" in entry:
                status = {row: why for why, rows in entry["status"].items() for row in rows}
                for i, (row, value) in enumerate(zip(tables[entry["of"]], entry["value"], strict=True)):
                    table.append((entry["step"], entry["replicate"], *row, value, status.get(i, "ok")))
    return table


def test_a_file_is_readable_without_gradscope(tmp_path):
    record = example()
    frame = pd.DataFrame(foreign_reader(record.save(tmp_path / "r.jsonl")), columns=COLUMNS)
    frame["depth"] = frame["depth"].astype(float)
    frame["value"] = frame["value"].astype(float)
    pd.testing.assert_frame_equal(frame, record.to_pandas(), check_exact=True)


def test_a_resumed_file_is_readable_without_gradscope(tmp_path):
    path = write_run(tmp_path / "r.jsonl", range(3))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.warns(GradscopeWarning, match="cut off"):
        write_run(path, range(2, 5))
    assert [row[0] for row in foreign_reader(path)] == [s for s in range(5) for _ in range(4)]


NAMES = st.text(st.characters(codec=None), max_size=6)  # all of Unicode, lone surrogates too
FLOATS = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True, width=64)
OPTIONAL = st.none() | FLOATS
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def some_rows(draw: st.DrawFn) -> Rows:
    depth = st.floats(0, 1000) | st.just(math.nan)
    entry = st.tuples(NAMES, depth, NAMES, NAMES, st.integers(0, 2**40), NAMES, NAMES)
    return Rows.of(draw(st.lists(entry, max_size=5)))


@st.composite
def some_record(draw: st.DrawFn) -> Record:
    tables = draw(st.lists(some_rows(), min_size=1, max_size=3))
    steps = []
    for number in range(draw(st.integers(0, 4))):
        rows = draw(st.sampled_from(tables))
        n = len(rows)
        steps.append(
            Step.of(
                rows,
                draw(st.lists(FLOATS, min_size=n, max_size=n)),
                draw(st.dictionaries(st.integers(0, n - 1), NAMES, max_size=3)) if n else {},
                step=number,
                replicate=draw(st.integers(0, 3)),
                wall_time_s=draw(OPTIONAL),
                loss=draw(OPTIONAL),
                learning_rate=draw(OPTIONAL | st.lists(FLOATS, max_size=3).map(tuple)),
                loss_scale=draw(OPTIONAL),
                finding=draw(st.none() | NAMES),
            )
        )
    header = draw(
        st.dictionaries(NAMES.filter(lambda k: k not in ("gradscope", "schema")), JSON, max_size=4)
    )
    return Record(header, tuple(steps))


@settings(max_examples=150)
@given(record=some_record())
def test_saving_and_loading_is_the_identity(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("identity") / "r.jsonl"
    assert_identical(Record.load(record.save(path)), record)
    assert path.read_bytes().endswith(b"\n")
    path.unlink()
    writer = RecordWriter(path, record.header)
    for step in record.steps:
        writer.write(step)
    writer.close()
    assert_identical(Record.load(path), record)
    assert_identical(pickle.loads(pickle.dumps(record)), record)


# -- files: interruption and damage ----------------------------------------------------------


def write_run(path: Path, numbers: Any, *, header: Mapping[str, Any] = HEADER) -> Path:
    writer = RecordWriter(path, header)
    for number in numbers:
        writer.write(make_step(number, absent={1: "frozen"}))
    writer.close()
    return path


def test_any_cut_through_the_last_line_costs_that_step_only(tmp_path):
    whole = write_run(tmp_path / "whole.jsonl", range(3)).read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    path = tmp_path / "cut.jsonl"
    expected = [make_step(n, absent={1: "frozen"}) for n in range(3)]
    for end in range(last, len(whole) + 1):
        path.write_bytes(whole[:end])
        if end == last:  # cut between two lines: nothing shows that there was more
            loaded, steps = Record.load(path), expected[:2]
        elif end >= len(whole) - 1:  # only the newline is missing, or nothing
            loaded, steps = Record.load(path), expected
        else:
            with pytest.warns(GradscopeWarning, match=r"line 5 is half-written .* the 2 whole steps"):
                loaded, steps = Record.load(path), expected[:2]
        assert list(loaded.steps) == steps, end
        assert loaded.header["model"] == HEADER["model"]


def test_any_cut_can_be_resumed(tmp_path):
    whole = write_run(tmp_path / "whole.jsonl", range(3)).read_bytes()
    first = whole.index(b"\n") + 1
    ends = {i + 1 for i, byte in enumerate(whole) if byte == ord("\n")}
    path = tmp_path / "cut.jsonl"
    for end in range(first, len(whole) + 1):
        path.write_bytes(whole[:end])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            kept = Record.load(path).steps
            writer = RecordWriter(path, {"model": "resumed"})
        assert writer.last_step == max((s.step for s in kept), default=-1)
        torn = not ends & {end, end + 1}
        assert [w.category for w in said] == [GradscopeWarning] * 2 * torn, (end, said)
        assert all("half-written" in str(w.message) for w in said)
        new = [make_step(writer.last_step + 1), make_step(writer.last_step + 2, rows=OTHER_ROWS)]
        for step in new:
            writer.write(step)
        writer.close()
        loaded = Record.load(path)  # without a warning
        assert loaded.steps == (*kept, *new), end
        assert loaded.header["sessions"] == ({"model": "resumed"},)
        assert loaded.header["model"] == HEADER["model"]


def test_an_interrupted_resume_is_resumed(tmp_path):
    path = write_run(tmp_path / "r.jsonl", range(2))
    path.write_bytes(path.read_bytes()[:-5])
    for _ in range(3):  # killed within the session's own line, again and again
        with pytest.warns(GradscopeWarning, match="cut off"):
            RecordWriter(path, {"model": "resumed"}).close()
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(GradscopeWarning, match="cut off"):
        write_run(path, [1, 2])
    assert [s.step for s in Record.load(path).steps] == [0, 1, 2]


def test_several_sessions_are_kept_in_order_also_through_a_save(tmp_path):
    path = write_run(tmp_path / "r.jsonl", [0])
    write_run(path, [1], header={"run": 1})
    write_run(path, [2], header={"run": 2})
    Record.load(path).save(path)
    write_run(path, [3], header={"run": 3})
    loaded = Record.load(path)
    assert [s["run"] for s in loaded.header["sessions"]] == [1, 2, 3]
    assert [s.step for s in loaded.steps] == [0, 1, 2, 3]


def test_a_torn_file_can_be_saved_over(tmp_path):
    path = write_run(tmp_path / "r.jsonl", range(3))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(GradscopeWarning):
        record = Record.load(path)
    record.save(path)
    assert_identical(Record.load(path), record)


def damaged(whole: bytes, line: int, damage: str) -> bytes:
    lines = whole.splitlines(keepends=True)
    text = lines[line - 1]
    lines[line - 1] = {
        "cut": text[: len(text) // 2] + b"\n",
        "cut, run on": text[: len(text) // 2],
        "not json": b"garbage\n",
        "empty": b"\n",
        "bytes": text[:20] + b"\xff\xfe" + text[22:],
        "zeros": b"\0" * (len(text) - 1) + b"\n",
        "not an object": b"[1,2]\n",
        "not a line of ours": b'{"a":1}\n',
        "another kind of value": text.replace(b'"value":[', b'"value":[{},'),
        "one value too few": text.replace(b'"value":[', b'"value":[1],"was":['),
        "an unknown table": text.replace(b'"of":0', b'"of":7'),
        "a reason for no row": text.replace(b'"frozen":[1]', b'"frozen":[-1]'),
        "infinitely late": text.replace(b'"step":', b'"step":1e999,"was":'),
    }[damage]
    assert lines[line - 1] != text
    return b"".join(lines)


@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        "cut, run on",
        "not json",
        "empty",
        "bytes",
        "zeros",
        "not an object",
        "not a line of ours",
        "another kind of value",
        "one value too few",
        "an unknown table",
        "a reason for no row",
        "infinitely late",
    ],
)
def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path, damage):
    path = write_run(tmp_path / "r.jsonl", range(4))
    content = damaged(path.read_bytes(), 4, damage)
    path.write_bytes(content)
    said = r"damaged at line 4 .*the 1 steps before it are intact.*keep only the 3 lines before it"
    for attempt in (
        lambda: Record.load(path),
        lambda: RecordWriter(path, HEADER),
        lambda: example().save(path),
    ):
        with pytest.raises(RecordError, match=said):
            attempt()
        assert path.read_bytes() == content  # nothing is overwritten or added
    # what the message advises works
    path.write_bytes(b"".join(content.splitlines(keepends=True)[:3]))
    assert [s.step for s in Record.load(path).steps] == [0]


def test_a_whole_but_damaged_last_line_is_no_interruption(tmp_path):
    path = write_run(tmp_path / "r.jsonl", range(2))
    path.write_bytes(damaged(path.read_bytes(), 4, "cut"))
    with pytest.raises(RecordError, match="damaged at line 4"):
        Record.load(path)


def test_one_number_for_two_row_tables_is_damage(tmp_path):
    # Two processes that write one file at once; values would be given to the wrong layers.
    path, other = tmp_path / "r.jsonl", tmp_path / "other.jsonl"
    for file, step in ((path, make_step(0)), (other, make_step(1, rows=OTHER_ROWS))):
        writer = RecordWriter(file, HEADER)
        writer.write(step)
        writer.close()
    with path.open("ab") as both:
        both.write(b"".join(other.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(RecordError, match="row table 0 is defined twice, differently"):
        Record.load(path)


def test_a_file_has_one_writer_at_a_time(tmp_path):
    path = tmp_path / "r.jsonl"
    first = RecordWriter(path, HEADER)
    first.write(make_step(4))
    before = path.read_bytes()
    with pytest.raises(RecordInUseError, match="being written by another watch") as refused:
        RecordWriter(path, HEADER)
    assert refused.value.last_step == 4
    assert path.read_bytes() == before
    first.write(make_step(5))
    first.close()
    second = RecordWriter(path, HEADER)
    second.write(make_step(6))
    second.close()
    assert [s.step for s in Record.load(path).steps] == [4, 5, 6]


NOT_RECORDS = {
    "no header": b"step,loss\n1,2\n",
    "other json": b'{"a": 1}\n',
    "a list": b"[1, 2]\n",
    "a number": b"1\n",
    "another tool's": b'{"gradscope": "baseline", "schema": 1}\n',
    "no schema": b'{"gradscope": "record"}\n',
    "schema of no version": b'{"gradscope": "record", "schema": 0}\n',
    "schema not a number": b'{"gradscope": "record", "schema": "new"}\n',
    "infinite schema": b'{"gradscope": "record", "schema": 1e999}\n',
    "half a header": b'{"gradscope": "rec',
    "binary": b"\x80\x04\x95\xff\xfe\x00",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", NOT_RECORDS.values(), ids=NOT_RECORDS.keys())
def test_other_files_are_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(RecordError, match="is not a gradscope Record: its first line is no header"):
        Record.load(path)
    with pytest.raises(RecordError, match="is not a gradscope Record"):
        RecordWriter(path, HEADER)
    with pytest.raises(RecordError, match="not overwritten: delete it, or save elsewhere"):
        example().save(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_newer_schema_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "r.jsonl"
    content = b'{"gradscope": "record", "schema": 2, "model": "x"}\n{"new": "things"}\n'
    path.write_bytes(content)
    newer = r"schema 2, this gradscope reads up to 1\. Update it: pip install --upgrade torch-gradscope"
    with pytest.raises(RecordError, match=newer):
        Record.load(path)
    with pytest.raises(RecordError, match=newer):
        RecordWriter(path, HEADER)
    with pytest.raises(RecordError, match=newer + r".*not overwritten"):
        example().save(path)
    assert path.read_bytes() == content


def test_missing_files_folders_and_empty_files(tmp_path):
    with pytest.raises(RecordError, match=r"none\.jsonl does not exist"):
        Record.load(tmp_path / "none.jsonl")
    for attempt in (Record.load, lambda p: RecordWriter(p, HEADER), example().save):
        with pytest.raises(RecordError, match="is a folder, not a Record file"):
            attempt(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(RecordError, match="no header but ''"):
        Record.load(empty)
    example().save(empty)  # nothing is lost
    assert Record.load(empty) == example()
    empty.write_bytes(b"")
    write_run(empty, range(2))
    assert len(Record.load(empty).steps) == 2


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for attempt in (example().save, lambda p: RecordWriter(p, HEADER)):
        with pytest.raises(RecordError, match="cannot be written"):
            attempt(tmp_path / "file" / "r.jsonl")


# -- files: writing --------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_record_and_no_rest(tmp_path, monkeypatch):
    old = Record(HEADER, (make_step(0),))
    path = old.save(tmp_path / "r.jsonl")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(_: int, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", fail)
            with pytest.raises((RecordError, KeyboardInterrupt)):
                example().save(path)
        assert Record.load(path) == old
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions and links are those of POSIX")
def test_a_saved_file_has_the_usual_permissions_and_a_link_stays_one(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    path = example().save(tmp_path / "r.jsonl")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    Record(HEADER).save(link)
    assert link.is_symlink()
    assert Record.load(path) == Record(HEADER)


def test_steps_are_on_disk_as_they_come(tmp_path):
    path = tmp_path / "new" / "r.jsonl"
    writer = RecordWriter(path, HEADER)
    assert Record.load(path) == Record(HEADER)
    for number in range(3):
        writer.write(make_step(number))
        assert [s.step for s in Record.load(path).steps] == list(range(number + 1))
    writer.close()
    writer.close()
    with pytest.raises(RecordError, match="is closed"):
        writer.write(make_step(3))


def test_a_resumed_file_reuses_its_row_tables(tmp_path):
    path = tmp_path / "r.jsonl"
    for start in (0, 2):
        writer = RecordWriter(path, HEADER)
        assert writer.last_step == start - 1
        writer.write(make_step(start, rows=OTHER_ROWS))
        writer.write(make_step(start + 1))
        writer.close()
    assert path.read_text(encoding="utf-8").count('"rows":') == 2
    rows = [s.rows for s in Record.load(path).steps]
    assert rows[0] is rows[2] and rows[1] is rows[3]
    assert (rows[0], rows[1]) == (OTHER_ROWS, ROWS)


def test_a_step_that_fails_halfway_leaves_no_trace(tmp_path):
    """As on a full disk: part of the line is written, then the error comes."""
    path = tmp_path / "r.jsonl"
    writer = RecordWriter(path, HEADER)
    writer.write(make_step(0))
    real = writer._file
    assert real is not None

    class FullDisk:
        calls = 0

        def write(self, data: memoryview) -> int:
            self.calls += 1
            if self.calls > 1:
                raise OSError(28, "No space left on device")
            return real.write(data[: len(data) // 2])

        truncate = real.truncate

    writer._file = FullDisk()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        writer.write(make_step(1, rows=OTHER_ROWS))
    writer._file = real
    assert [s.step for s in Record.load(path).steps] == [0]
    writer.write(make_step(2, rows=OTHER_ROWS))  # its row table is written again
    writer.close()
    assert Record.load(path).steps == (make_step(0), make_step(2, rows=OTHER_ROWS))


# -- combining -------------------------------------------------------------------------------


def test_append_joins_steps_and_keeps_the_header():
    first = Record(HEADER, (make_step(0), make_step(1)))
    second = Record({"model": "other"}, (make_step(2), make_step(0, replicate=1)))
    joined = first.append(second)
    assert joined.steps == first.steps + second.steps
    assert joined.header == first.header
    assert first.append(Record({})) == first
    assert Record(HEADER).append(second).steps == second.steps


def test_append_refuses_an_overlap_and_says_what_to_write():
    first = Record(HEADER, (make_step(4), make_step(5)))
    second = Record(HEADER, (make_step(5), make_step(6)))
    with pytest.raises(RecordError, match=r"both Records hold step 5 of replicate 0 \(1 steps overlap\)"):
        first.append(second)
    with pytest.raises(RecordError, match=r"record\.append\(other, renumber=True\)"):
        first.append(second)
    joined = first.append(second, renumber=True)
    assert [s.step for s in joined.steps] == [4, 5, 6, 7]
    assert joined.steps[2] == dataclasses.replace(second.steps[0], step=6)
    assert first.append(Record({}), renumber=True) == first


# -- thinning --------------------------------------------------------------------------------


@given(
    numbers=st.lists(st.integers(0, 60), min_size=1, max_size=40, unique=True).map(sorted),
    found=st.sets(st.integers(0, 60), max_size=6),
    replicates=st.integers(1, 3),
)
def test_thinning_keeps_first_last_and_findings(numbers, found, replicates):
    steps = [
        make_step(n, replicate=r, finding="NaN" if n in found and r == replicates - 1 else None)
        for n in numbers
        for r in range(replicates)
    ]
    kept = thin(steps)
    assert [s for s in steps if s in kept] == kept  # a part, in the same order
    left = {s.step for s in kept}
    assert left >= {numbers[0], numbers[-1]} | (found & set(numbers))
    for number in left:  # all replicates of a step, or none
        assert [s.replicate for s in kept if s.step == number] == list(range(replicates))
    plain = [n for n in numbers if n not in found]
    assert len([n for n in left if n not in found]) <= len(plain) // 2 + 1


def test_thinning_by_two_again_and_again():
    steps = [make_step(n, finding="spike" if n == 5 else None) for n in range(17)]
    once = thin(steps)
    assert [s.step for s in once] == [0, 2, 4, 5, 7, 9, 11, 13, 15, 16]
    for _ in range(10):
        once = thin(once)
    assert [s.step for s in once] == [0, 5, 16]
    assert thin([]) == []
