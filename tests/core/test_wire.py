# SPDX-License-Identifier: Apache-2.0
"""The wire form: every value comes back as it was, and no bytes but a whole value's are ever accepted."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import math
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hansa.core import tree as trees
from hansa.core import wire
from hansa.core.lazy import Leaf
from hansa.core.values import Plan, Update
from hansa.errors import ChecksumError, NonFiniteError, StorageError, VersionError, WireError

names = st.text(st.characters(codec="utf-8"), max_size=12)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Any bit pattern of any dtype: NaNs, infinities and subnormals of bfloat16 too."""
    dtype = trees.dtype_of(draw(st.sampled_from(trees.dtype_names())))
    shape = draw(shapes)
    if dtype == np.bool_:
        return draw(hnp.arrays(np.bool_, shape))
    raw = draw(st.binary(min_size=math.prod(shape) * dtype.itemsize, max_size=math.prod(shape) * dtype.itemsize))
    return np.frombuffer(raw, dtype).reshape(shape)


parts_of = st.dictionaries(names, st.dictionaries(names, arrays(), max_size=4), max_size=3)
finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**63 - 1)


def assert_same(left: Any, right: Any) -> None:
    assert [*left] == [*right]
    for part in left:
        assert [*left[part]] == [*right[part]], "the order of tensors is the writer's"
        for name, leaf in left[part].items():
            got = right[part][name]
            assert (got.dtype, got.shape, got.tobytes()) == (leaf.dtype, leaf.shape, leaf.tobytes())


def encode(parts: Any, **changes: Any) -> bytes:
    file = io.BytesIO()
    fields: dict[str, Any] = {"site": "berlin", "round": 3, "version": 2, "weight": 0.5, "sums": {"loss": 1.25}}
    wire.write_update(file, Update(**{**fields, "parts": parts, **changes}))
    return file.getvalue()


def decode(data: bytes) -> Update:
    return wire.read_update(io.BytesIO(data))


SMALL = {
    "delta": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float16([1.5, -2]), "z": np.zeros((0, 3))},
    "control": {"w": np.ones(5, trees.dtype_of("bfloat16")), "flag": np.array([True, False])},
}


def framed(head: Any, payload: bytes = b"", version: int = wire.FORMAT) -> bytes:
    """A value with a hand-made header, and a right checksum over it."""
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<6sHIQ", wire.MAGIC, version, len(raw), xxhash.xxh3_64_intdigest(raw)) + raw + payload


def chunk(tensor: int, offset: int, payload: bytes) -> bytes:
    return struct.pack("<IIQQ", tensor, len(payload), offset, xxhash.xxh3_64_intdigest(payload)) + payload


META = {
    "site": "a",
    "round": 1,
    "version": 0,
    "weight": 1.0,
    "sums": {},
    "completed": 1.0,
    "seconds": 0.0,
}


def update_head(parts: Any = None, **meta: Any) -> dict[str, Any]:
    return {"kind": "update", "meta": {**META, **meta}, "parts": parts or {}}


# --- round trips ---------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    parts=parts_of,
    site=names,
    round=counts,
    version=counts,
    weight=finite,
    sums=st.dictionaries(names, finite, max_size=3),
    completed=st.floats(0, 1, exclude_min=True),
    seconds=st.floats(0, 1e9),
    logged=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=100),
        st.lists(st.tuples(st.none() | st.integers(-(2**63), 2**63 - 1), st.none() | finite), max_size=3),
        max_size=3,
    ),
)
def test_any_update_comes_back_as_it_was(**fields: Any) -> None:
    update = Update(**fields)
    file = io.BytesIO()
    assert wire.write_update(file, update) == len(file.getvalue())
    back = decode(file.getvalue())
    assert_same(update.parts, back.parts)
    assert back.header == update.header


@given(
    params=st.dictionaries(names, arrays(), max_size=4),
    parts=st.dictionaries(names.filter(lambda name: name != "params"), st.dictionaries(names, arrays()), max_size=2),
    job=names,
    round=counts,
    version=counts,
    seed=counts,
    task=st.sampled_from(["train", "evaluate"]),
    inbox=st.none() | names,
    outbox=st.none() | names,
    deadline_s=st.none() | st.floats(0, 1e9),
    acknowledged=st.dictionaries(names, counts, max_size=3),
)
def test_any_plan_comes_back_as_it_was(**fields: Any) -> None:
    plan = Plan(**fields)
    file = io.BytesIO()
    wire.write_plan(file, plan)
    file.seek(0)
    back = wire.read_plan(file)
    assert_same({"params": plan.params, **plan.parts}, {"params": back.params, **back.parts})
    empty: dict[str, Any] = {"params": {}, "parts": {}}
    assert Plan(**{**vars(back), **empty}) == Plan(**{**vars(plan), **empty})


@pytest.mark.parametrize("dtype", trees.dtype_names())
@pytest.mark.parametrize("extra", [-1, 0, 1, trees.BLOCK + 7])
def test_tensors_that_span_several_chunks(dtype: str, extra: int) -> None:
    kind = trees.dtype_of(dtype)
    raw = np.random.default_rng(1).integers(0, 2 if dtype == "bool" else 256, (trees.BLOCK + extra) * kind.itemsize)
    leaf = raw.astype(np.uint8).view(kind)
    back = decode(encode({"delta": {"w": leaf}})).parts["delta"]["w"]
    assert back.dtype == kind
    assert back.tobytes() == leaf.tobytes()


def test_what_is_read_can_be_written_to() -> None:
    back = decode(encode(SMALL)).parts["delta"]["w"]
    back += 1  # an optimiser may work in place
    assert back[0, 1] == 2


@pytest.mark.parametrize(
    "leaf",
    [
        np.arange(24, dtype=np.float32).reshape(4, 6).T,
        np.arange(24, dtype=np.int64)[::-2],
        np.arange(5, dtype=">f4"),
        np.arange(5, dtype=">i8"),
        np.float32(3.5),
    ],
    ids=["transposed", "reversed", "big-endian float", "big-endian int", "scalar"],
)
def test_odd_memory_layouts_keep_their_values(leaf: np.ndarray) -> None:
    back = decode(encode({"delta": {"w": leaf}})).parts["delta"]["w"]
    np.testing.assert_array_equal(back, leaf)
    assert back.shape == leaf.shape


def test_numpy_numbers_are_fine_as_metrics() -> None:
    data = encode({}, weight=np.float32(0.5), sums={"loss": np.float64(2.0), "n": np.int64(3)})
    assert decode(data).sums == {"loss": 2.0, "n": 3.0}


def test_the_encoding_is_a_function_of_the_value() -> None:
    assert encode(SMALL) == encode(SMALL)
    assert encode(SMALL) == encode(decode(encode(SMALL)).parts)


def pieces(path: Path) -> list[bytes]:
    data, places = path.read_bytes(), wire.cuts(path)
    assert places[0] == 0
    assert places[-1] == len(data)
    return [data[begin:end] for begin, end in itertools.pairwise(places)]


def test_a_file_is_cut_by_its_layout_alone(tmp_path: Any) -> None:
    rng = np.random.default_rng(0)
    tree = {
        f"{i:03d}": rng.normal(size=size).astype(np.float32)
        for i, size in enumerate([5, 3_000_000, 0, 1, *[9999] * 99])
    }
    wire.spool(Update("a", 1, 0, {"delta": tree}, 1.0, {}), tmp_path / "a")
    wire.spool(Update("another", 2, 1, {"delta": {**tree, "001": tree["001"] + 1}}, 0.5, {"loss": 1.0}), tmp_path / "b")
    a, b = pieces(tmp_path / "a"), pieces(tmp_path / "b")
    assert len(a) == len(b)
    assert all(0 < len(piece) <= 2 << 20 for piece in a)
    same = [left == right for left, right in zip(a, b, strict=True)]
    assert not same[0]
    assert sum(same) >= 3, "tensors that stay as they were give the same pieces"
    wire.spool(Update("a", 1, 0, {}, 1.0, {}), tmp_path / "empty")
    assert len(pieces(tmp_path / "empty")) == 1


# --- what can't be written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [np.zeros(2, np.complex64), np.array(["x"]), np.array([None])], ids=str)
def test_a_dtype_that_no_value_may_hold_is_refused_by_name(leaf: np.ndarray) -> None:
    with pytest.raises(WireError, match=r"'w' is .*can't be sent; cast it to one of: float64"):
        encode({"delta": {"w": leaf}})


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(WireError, match="not valid text"):
        encode({"delta": {"\ud800": np.zeros(1)}})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_the_format_does_not_hold_are_refused_with_the_site(bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"site berlin, round 3: The update's loss is") as caught:
        encode({}, sums={"loss": bad})
    assert caught.value.exit_code == 6
    with pytest.raises(NonFiniteError, match="weight"):
        encode({}, weight=bad)


# --- damage --------------------------------------------------------------------------------------------------


def test_truncation_at_every_byte_is_an_error() -> None:
    data = encode(SMALL)
    for end in range(len(data)):
        with pytest.raises(WireError):
            decode(data[:end])
    decode(data)


def test_any_flipped_byte_is_an_error() -> None:
    data = encode(SMALL)
    for place in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= flip
            with pytest.raises(WireError):
                decode(bytes(damaged))


def test_damage_is_told_from_other_errors() -> None:
    data = bytearray(encode(SMALL))
    data[-1] ^= 1
    with pytest.raises(ChecksumError, match=r"tensor 'z'|tensor 'w' of 'delta'"):
        decode(bytes(data))
    data = bytearray(encode(SMALL))
    data[20] ^= 1
    with pytest.raises(ChecksumError, match="header"):
        decode(bytes(data))


@pytest.mark.parametrize("surplus", [b"\0", b"x" * 100, encode(SMALL)], ids=["byte", "many", "value"])
def test_surplus_bytes_are_an_error(surplus: bytes) -> None:
    with pytest.raises(WireError, match="follow the last chunk"):
        decode(encode(SMALL) + surplus)


def test_chunks_may_not_be_reordered_repeated_or_left_out() -> None:
    block, size = trees.BLOCK, 3 * trees.BLOCK
    head = update_head({"delta": {"w": ["uint8", [size]]}})
    payload = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    a, b, c = (chunk(0, i * block, payload[i * block : (i + 1) * block]) for i in range(3))
    np.testing.assert_array_equal(decode(framed(head, a + b + c)).parts["delta"]["w"], np.frombuffer(payload, np.uint8))
    for wrong in (b + a + c, a + c + b, a + a + b + c, a + b, a + c, a + b + b):
        with pytest.raises(WireError, match=r"out of order|ends inside"):
            decode(framed(head, wrong))


def test_tensors_may_not_be_swapped() -> None:
    head = update_head({"delta": {"a": ["uint8", [2]], "b": ["uint8", [2]]}})
    decode(framed(head, chunk(0, 0, b"aa") + chunk(1, 0, b"bb")))
    with pytest.raises(WireError, match="out of order"):
        decode(framed(head, chunk(1, 0, b"bb") + chunk(0, 0, b"aa")))


@pytest.mark.parametrize("sizes", [[1, 3], [3, 1], [2, 2], [5], [4, 0]])
def test_chunks_have_one_size_only(sizes: list[int]) -> None:
    """So that nobody can make a reader do a million small reads, and a value has one encoding."""
    head = update_head({"delta": {"a": ["uint8", [4]]}})
    decode(framed(head, chunk(0, 0, b"abcd")))
    chunks, offset = b"", 0
    for size in sizes:
        chunks += chunk(0, offset, b"abcde"[offset : offset + size])
        offset += size
    with pytest.raises(WireError):
        decode(framed(head, chunks))


def test_a_boolean_that_is_neither_true_nor_false_is_an_error() -> None:
    head = update_head({"delta": {"a": ["bool", [3]]}})
    decode(framed(head, chunk(0, 0, b"\0\1\1")))
    with pytest.raises(WireError, match="neither 0 nor 1"):
        decode(framed(head, chunk(0, 0, b"\0\1\2")))


# --- hostile headers -----------------------------------------------------------------------------------------


def test_an_unknown_format_version_is_refused() -> None:
    with pytest.raises(VersionError, match=f"format {wire.FORMAT + 1}; this release reads format {wire.FORMAT}"):
        decode(framed(update_head(), version=wire.FORMAT + 1))


def test_something_else_altogether_is_refused() -> None:
    with pytest.raises(WireError, match="magic"):
        decode(b"PK\3\4" + bytes(100))


HOSTILE = {
    "no JSON": b"{",
    "not UTF-8": b'{"kind": "\xff"}',
    "lone surrogate": b'{"kind": "\\ud800", "meta": {}, "parts": {}}',
    "deep JSON": b'{"kind": "update", "parts": {}, "meta": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "deep list": b'{"kind": "update", "parts": {}, "meta": {"a": ' + b"[" * 100_000,
    "a list": [],
    "an unknown key": {**update_head(), "more": 1},
    "no parts": {"kind": "update", "meta": META},
    "parts a list": {**update_head(), "parts": []},
    "another kind": {**update_head(), "kind": "plan"},
    "unknown metadata": update_head(more=1),
    "missing metadata": {"kind": "update", "meta": {}, "parts": {}},
    "a number for a name": update_head(site=5),
    "text for a number": update_head(round="1"),
    "a negative round": update_head(round=-1),
    "a fraction of a round": update_head(round=1.5),
    "an endless round": update_head(round=10**30),
    "no weight": update_head(weight=None),
    "an infinite weight": json.dumps(update_head(weight="@")).replace('"@"', "1e999").encode(),
    "NaN": json.dumps(update_head(weight=math.nan)).encode(),
    "too many names logged": update_head(logged={str(number): [] for number in range(33)}),
    "too long a name logged": update_head(logged={"n" * 101: []}),
    "no name logged": update_head(logged={"": []}),
    "too many numbers logged": update_head(logged={"n": [[0, 1.0]] * 65}),
    "text logged": update_head(logged={"n": [[0, "1.0"]]}),
    "an endless step logged": update_head(logged={"n": [[1 << 63, 1.0]]}),
    "NaN logged": json.dumps(update_head(logged={"n": [[0, math.nan]]})).encode(),
    "infinity logged": json.dumps(update_head(logged={"n": [[0, "@"]]})).replace('"@"', "1e999").encode(),
    "nothing completed": update_head(completed=0.0),
    "too much completed": update_head(completed=1.5),
    "negative time": update_head(seconds=-1.0),
    "an unknown dtype": update_head({"p": {"t": ["float128", [1]]}}),
    "an object dtype": update_head({"p": {"t": ["object", [1]]}}),
    "a structured dtype": update_head({"p": {"t": ["f4,f4", [1]]}}),
    "a negative side": update_head({"p": {"t": ["float32", [-1]]}}),
    "two negative sides": update_head({"p": {"t": ["float32", [-1, -1]]}}),
    "a fraction of a side": update_head({"p": {"t": ["float32", [1.5]]}}),
    "a true side": update_head({"p": {"t": ["float32", [True]]}}),
    "an endless side": update_head({"p": {"t": ["float32", [2**63]]}}),
    "an endless product": update_head({"p": {"t": ["float32", [2**31, 2**31]]}}),
    "an endless side beside an empty one": update_head({"p": {"t": ["float32", [0, 10**30]]}}),
    "an endless product beside an empty one": update_head({"p": {"t": ["float64", [0, 2**62, 8]]}}),
    "too many sides": update_head({"p": {"t": ["float32", [1] * 33]}}),
    "a million sides": update_head({"p": {"t": ["float32", [2] * 1_000_000]}}),
    "no shape": update_head({"p": {"t": ["float32"]}}),
    "more than a shape": update_head({"p": {"t": ["float32", [1], 0]}}),
}


@pytest.mark.parametrize("head", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_end_in_a_short_wire_error(head: Any) -> None:
    for payload in (b"", chunk(0, 0, bytes(4))):
        with pytest.raises(WireError) as caught:
            decode(framed(head, payload))
        assert len(str(caught.value)) < 500


def test_a_header_of_the_largest_size_claims_no_memory_it_does_not_have() -> None:
    claim = struct.pack("<6sHIQ", wire.MAGIC, wire.FORMAT, wire.MAX_HEADER_BYTES + 1, 0)
    with pytest.raises(WireError, match="claims"):
        decode(claim)


@pytest.mark.parametrize("shape", [[1 << 40], [1 << 20, 1 << 20], [1 << 60]])
def test_a_size_bomb_allocates_nothing(shape: list[int]) -> None:
    bomb = framed(update_head({"delta": {"w": ["float32", shape]}}), chunk(0, 0, bytes(trees.BLOCK * 4)))
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="ends inside"):
            decode(bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_a_size_bomb_is_harmless_under_a_hard_memory_limit() -> None:
    """The same by the operating system's count, in a process that may map 300 MiB more than it has."""
    code = """
import io, resource, sys
from hansa.core import wire
from hansa.errors import WireError
data = sys.stdin.buffer.read()
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
try:
    wire.read_update(io.BytesIO(data))
except WireError as error:
    print(error)
"""
    bomb = framed(update_head({"delta": {"w": ["float64", [1 << 50]]}}), chunk(0, 0, bytes(trees.BLOCK * 8)))
    done = subprocess.run([sys.executable, "-c", code], input=bomb, capture_output=True, check=True)
    assert b"ends inside" in done.stdout


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "..", "", "C:\\x", "a\0b", "\n"])
def test_path_like_names_are_only_names(name: str, tmp_path: Any) -> None:
    update = Update(name, 1, 0, {name: {name: np.ones(3)}}, 1.0, {name: 1.0})
    handle = wire.spool(update, tmp_path / "spooled")
    assert handle.header == update.header
    assert [path.name for path in tmp_path.rglob("*")] == ["spooled"]


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_end_in_wire_error(data: bytes) -> None:
    for bytes_ in (data, framed(data), framed(update_head({"d": {"w": ["int16", [3]]}}), data)):
        with pytest.raises(WireError):
            decode(bytes_)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=300)
@given(kind=json_values, parts=json_values, tensor=json_values, meta=json_values, payload=st.binary(max_size=40))
def test_random_json_headers_end_in_wire_error_or_a_value(
    kind: Any, parts: Any, tensor: Any, meta: Any, payload: bytes
) -> None:
    heads = [
        {"kind": kind, "meta": META, "parts": parts},
        {"kind": "update", "meta": META, "parts": {"p": {"t": tensor}}},
        {"kind": "update", "meta": {**META, **(meta if isinstance(meta, dict) else {"sums": meta})}, "parts": {}},
        {"kind": "update", "meta": META, "parts": {"p": {"t": ["float32", tensor]}}},
    ]
    for head in heads:
        for read in (wire.read_update, wire.read_plan):
            with contextlib.suppress(WireError):
                read(io.BytesIO(framed(head, payload)))


def test_random_splices_of_good_values_never_pass_for_another_value() -> None:
    rng = random.Random(7)
    good = [encode(SMALL), encode({"delta": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}}), encode({})]
    for _ in range(3000):
        a, b = rng.choice(good), rng.choice(good)
        spliced = a[: rng.randrange(len(a) + 1)] + b[rng.randrange(len(b) + 1) :]
        try:
            decode(spliced)
        except WireError:
            continue
        assert spliced in good


# --- large values, read when they are asked for --------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(trees, "LARGE", 0)
    rng = np.random.default_rng(0)
    tree = {
        "w": rng.normal(size=(3, trees.BLOCK)).astype(np.float32),
        "odd": rng.normal(size=trees.BLOCK + 5),
        "flags": np.array([True, False, True]),
        "none": np.zeros((0, 3), np.float16),
        "scalar": np.array(4.0),
    }
    with (tmp_path / "plan").open("wb") as file:
        wire.write_plan(file, Plan("job", 1, "train", 0, tree, {"control": {"w": tree["w"] * 2}}))
    return tmp_path / "plan"


def test_a_plan_read_when_it_is_asked_for_is_the_plan_read_whole(stored: Path) -> None:
    with stored.open("rb") as file:
        whole = wire.read_plan(file)
    lazy = wire.open_plan(stored)
    assert isinstance(lazy.params, trees.Lazy)
    stored.unlink()  # the file is held open
    assert_same({"params": whole.params, **whole.parts}, {"params": lazy.params, **lazy.parts})
    held = trees.leaves(lazy.params)["w"]
    np.testing.assert_array_equal(held[5 : trees.BLOCK + 9], whole.params["w"].reshape(-1)[5 : trees.BLOCK + 9])


def test_steps_that_are_not_the_files_read_each_block_once(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a masked vector's are, in which a few numbers stand before the tensors."""
    with stored.open("rb") as file:
        whole = wire.read_plan(file).params["w"].reshape(-1)
    held = trees.leaves(wire.open_plan(stored).params)["w"]
    reads = []
    pread = wire.os.pread
    monkeypatch.setattr(wire.os, "pread", lambda *given: reads.append(given) or pread(*given))
    edges = [0, *range(7, whole.size, trees.BLOCK), whole.size]
    found = [held[start:stop] for start, stop in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(found), whole)
    assert len(reads) == 3


def test_damage_is_found_when_it_is_read_and_only_there(stored: Path) -> None:
    data = bytearray(stored.read_bytes())
    data[-100] ^= 1  # in the last block of the last tensor, "w" of "params"
    stored.write_bytes(data)
    plan = wire.open_plan(stored)
    assert plan.params["odd"].size == trees.BLOCK + 5
    assert trees.leaves(plan.params)["w"][: 2 * trees.BLOCK].size == 2 * trees.BLOCK
    with pytest.raises(ChecksumError, match="tensor 'w' of 'params'"):
        np.asarray(plan.params["w"])
    with pytest.raises(ChecksumError), (stored.parent / "copy").open("wb") as file:
        wire.write_plan(file, plan)


def test_every_flipped_byte_is_found_by_the_time_all_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "LARGE", 0)
    data = encode(SMALL)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x80
        (tmp_path / "u").write_bytes(damaged)
        with pytest.raises(WireError):
            [dict(tree) for tree in wire.open_parts(tmp_path / "u")[1].values()]


@pytest.mark.parametrize("change", [-1, 1, -100_000])
def test_a_file_that_is_too_short_or_too_long_is_found_at_once(stored: Path, change: int) -> None:
    data = stored.read_bytes()
    stored.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(WireError, match="ends"):
        wire.open_plan(stored)


def test_a_file_cut_while_it_is_open_is_an_error(stored: Path) -> None:
    plan = wire.open_plan(stored)
    with stored.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(WireError, match="ends inside"):
        np.asarray(plan.params["w"])


def descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def test_descriptors_are_closed_with_the_last_leaf(stored: Path) -> None:
    before = descriptors()
    plans = [wire.open_plan(stored) for _ in range(20)]
    leaf = trees.leaves(plans[0].params)["w"]
    assert descriptors() == before + 20
    del plans
    gc.collect()
    assert descriptors() == before + 1
    assert leaf[:3].size == 3


def test_a_large_update_that_is_not_finite_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = NonFiniteError("Tensor 'w' is not finite.")
    parts = {"delta": trees.checked({"w": Leaf.of(np.array([1.0, np.nan]))}, lambda name: error)}
    with pytest.raises(NonFiniteError):
        wire.spool(Update("berlin", 1, 0, parts, 1.0, {}), tmp_path / "u")
    assert not [*tmp_path.iterdir()]


# --- spooled updates -----------------------------------------------------------------------------------------


def test_a_spooled_update_can_be_read_twice_and_is_gone_after_release(tmp_path: Any) -> None:
    update = Update("berlin", 1, 0, SMALL, 2.0, {"loss": 1.0})
    handle = wire.spool(update, tmp_path / "u")
    for _ in range(2):
        got = [(c.part, c.tensor, c.start, c.values.tobytes()) for c in handle.chunks()]
        assert got == [(c.part, c.tensor, c.start, c.values.tobytes()) for c in update.chunks()]
    handle.release()
    handle.release()
    assert not [*tmp_path.iterdir()]
    with pytest.raises(StorageError, match="Can't read the spooled update"):
        next(handle.chunks())


def test_a_full_disk_ends_in_a_storage_error_that_says_what_to_do(tmp_path: Any) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from hansa.core import wire
from hansa.core.values import Update
from hansa.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    wire.spool(Update("berlin", 1, 0, {"delta": {"w": np.zeros(1_000_000)}}, 1.0, {}), Path(sys.argv[1]))
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "u"], capture_output=True, check=True, text=True)
    assert "Can't spool the update of site 'berlin'" in done.stdout
    assert "output.dir" in done.stdout
    assert not [*tmp_path.iterdir()], "no half a file is left behind"
