# SPDX-License-Identifier: Apache-2.0
"""Bundles: what travels with a job, what counts as code, and every way in which a bundle can lie."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import warnings
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from hansa import bundle
from hansa.core import config
from hansa.errors import AccessError, ChecksumError, HansaError, JobError, VersionError, WireError
from hansa.pki.authority import Authority
from hansa.pki.identity import Role
from hansa.transport.pieces import describe
from members import Members, members
from shell import environment

BLOCK = 1 << 20


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Members:
    return members(tmp_path_factory.mktemp("federation"))


def job(folder: Path, **values) -> config.Job:
    recipe = values.pop("recipe", "tabular-classification")
    return config.parse({"name": "toy", "recipe": recipe, "directory": str(folder), **values})


def write(folder: Path, **files: bytes) -> None:
    for name, data in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def packed(people: Members, folder: Path, **values) -> Path:
    path = folder.parent / "bundle.zip"
    bundle.pack(job(folder, **values), path, people.lead)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    folder.mkdir()
    return folder


class Forger:
    """Makes a bundle that somebody signed, whatever it says."""

    def __init__(self, people: Members, path: Path) -> None:
        self.people = people
        self.path = path
        self.files: list[tuple[str, bytes]] = []
        self.listed: dict[str, tuple[int, str]] = {}
        self.head = {"format": 1, "job": {"name": "toy", "recipe": "script"}, "created": datetime.now(UTC).isoformat()}
        self.kit = people.lead
        self.compress = zipfile.ZIP_STORED

    def add(self, name: str, data: bytes = b"x", *, listed: bool = True) -> Forger:
        self.files.append((name, data))
        if listed:
            self.listed[name] = (len(data), blake3(data).hexdigest())
        return self

    def made(self) -> Path:
        head = json.dumps({"files": self.listed, **self.head}).encode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that come twice
            with zipfile.ZipFile(self.path, "w", self.compress) as archive:
                archive.writestr("bundle.json", head)
                archive.writestr("signature", self.kit.sign(head))
                archive.writestr("certificate.pem", self.kit.certificate_pem())
                for name, data in self.files:
                    archive.writestr(f"files/{name}", data)
        return self.path

    def opened(self, where: Path) -> None:
        where.mkdir()
        bundle.unpack(self.path, bundle.read(self.made(), self.people.authority.roster), where)


@pytest.fixture
def forger(people: Members, tmp_path: Path) -> Forger:
    return Forger(people, tmp_path / "forged.zip")


def test_what_is_packed_is_what_arrives(people, home, tmp_path):
    write(home, **{"train.py": b"print()", "base__config.json": b"{}", "base__deep__w.txt": b"w", "other.txt": b"no"})
    write(home, **{"empty.csv": b"", "__pycache__/x.pyc": b"no"})
    told = job(home, recipe={"name": "script", "path": "train.py"}, files=["base", "*.csv"])
    path = tmp_path / "bundle.zip"
    cuts = bundle.pack(told, path, people.lead)
    assert describe(path, cuts).num_bytes == path.stat().st_size
    found = bundle.read(path, people.authority.roster)
    assert found.signer.name == "ana"
    assert sorted(found.files) == ["base/config.json", "base/deep/w.txt", "empty.csv", "train.py"]
    there = tmp_path / "there"
    there.mkdir()
    arrived = bundle.unpack(path, found, there)
    assert arrived.model_copy(update={"directory": "."}) == told.model_copy(update={"directory": "."})
    assert arrived.path("base/deep/w.txt").read_bytes() == b"w"
    assert (there / "empty.csv").read_bytes() == b""


def test_the_same_files_give_the_same_pieces(people, home, tmp_path):
    """Between two jobs with one base model only what differs is new: the head, and the file that changed."""
    big = b"".join(hashlib.sha256(struct.pack("<I", i)).digest() for i in range(3 * BLOCK // 32 + 1))
    write(home, **{"base__model.safetensors": big, "base__config.json": b"{}", "zz.txt": b"1"})
    manifests = []
    for number, seed in enumerate((1, 2)):
        write(home, **{"zz.txt": b"%d" % seed})
        path = tmp_path / f"{number}.zip"
        cuts = bundle.pack(job(home, seed=seed, files=["base/**", "zz.txt"]), path, people.lead)
        manifests.append(describe(path, cuts))
    first, second = (set(manifest.pieces) for manifest in manifests)
    new = second - first
    assert sum(length for length, _ in new) < 10_000
    assert len(first & second) >= 5


def test_links_travel_under_their_own_names_and_not_out_of_the_folder(people, home, tmp_path):
    write(home, **{"blobs__abc": b"weights", "secret.txt": b"s"})
    (home / "base").mkdir()
    (home / "base" / "model.safetensors").symlink_to("../blobs/abc")
    path = packed(people, home, files=["base"])
    assert list(bundle.read(path, people.authority.roster).files) == ["base/model.safetensors"]
    (tmp_path / "outside.txt").write_bytes(b"o")
    (home / "base" / "link.txt").symlink_to(tmp_path / "outside.txt")
    for files in (["base"], ["../outside.txt"], [str(tmp_path / "outside.txt")], ["base/link.txt"]):
        with pytest.raises(JobError, match="outside the job's folder"):
            packed(people, home, files=files)
    assert not (tmp_path / "bundle.zip").exists() or path.stat().st_size


@pytest.mark.parametrize(
    ("files", "message"),
    [(["nothing/*"], "no such file"), ([""], "files"), (["a\\b.txt"], "can't be called"), (["pipe"], "no plain file")],
)
def test_files_that_cannot_travel(people, home, files, message):
    import os

    write(home, **{"a\\b.txt": b"x"})
    os.mkfifo(home / "pipe")
    if files == [""]:
        home.joinpath("pipe").unlink()
    with pytest.raises(JobError, match=message):
        packed(people, home, files=files)


def test_too_many_files(people, home, monkeypatch):
    monkeypatch.setattr(bundle, "MAX_FILES", 3)
    write(home, **{f"d__{i}.txt": b"" for i in range(4)})
    with pytest.raises(JobError, match="at most 3"):
        packed(people, home, files=["d"])


def test_a_file_that_changes_while_it_is_packed(people, home, monkeypatch, tmp_path):
    write(home, **{"a.txt": b"before"})
    hashed = bundle._hashed

    def late(path: Path) -> tuple[int, str]:
        found = hashed(path)
        path.write_bytes(b"after the hash")
        return found

    monkeypatch.setattr(bundle, "_hashed", late)
    with pytest.raises(JobError, match="changed while it was packed"):
        packed(people, home, files=["a.txt"])
    assert not (tmp_path / "bundle.zip").exists()


def test_a_good_forgery_is_read(forger, tmp_path):
    forger.add("a.txt").opened(tmp_path / "there")
    assert (tmp_path / "there" / "a.txt").read_bytes() == b"x"


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/evil",
        "a/../../evil",
        ".",
        "",
        "a//b",
        "./a",
        "a/",
        "a\\b",
        "a\0b",
        "a\nb",
        "x" * 300,
        "a/" * 600,
        "\udce4",
    ],
)
def test_names_that_lead_elsewhere(forger, tmp_path, name):
    forger.listed[name] = (1, blake3(b"x").hexdigest())
    with pytest.raises(WireError):
        forger.opened(tmp_path / "there")
    assert not (tmp_path / "evil").exists()
    assert list((tmp_path / "there").iterdir()) == []


def test_a_link_becomes_a_plain_file(forger, people, tmp_path):
    forger.add("link", b"/etc/passwd").made()
    data = forger.path.read_bytes()
    with zipfile.ZipFile(forger.path) as archive:
        assert archive.getinfo("files/link").external_attr >> 28 != 0o12
    begin = data.rindex(b"PK\1\2")  # the entry in the directory, whose attributes say what kind of file it is
    forger.path.write_bytes(data[: begin + 38] + struct.pack("<L", 0o120777 << 16) + data[begin + 42 :])
    found = bundle.read(forger.path, people.authority.roster)
    (tmp_path / "there").mkdir()
    bundle.unpack(forger.path, found, tmp_path / "there")
    assert not (tmp_path / "there" / "link").is_symlink()


def test_entries_that_are_twice_there_extra_or_missing(forger, tmp_path):
    with pytest.raises(WireError, match="other files than were signed"):
        forger.add("a.txt", b"1").add("a.txt", b"2").opened(tmp_path / "1")
    forger.files = [("a.txt", b"2"), ("b.txt", b"extra")]
    with pytest.raises(WireError, match="other files than were signed"):
        forger.opened(tmp_path / "2")
    forger.files = []
    with pytest.raises(WireError, match="other files than were signed"):
        forger.opened(tmp_path / "3")


def test_a_file_inside_a_file(forger, tmp_path):
    with pytest.raises(WireError, match="files inside it"):
        forger.add("a", b"1").add("a/b", b"2").opened(tmp_path / "1")


def test_compressed_entries(forger, tmp_path):
    forger.compress = zipfile.ZIP_DEFLATED
    with pytest.raises(WireError, match="compressed"):
        forger.add("a.txt", bytes(1 << 20)).opened(tmp_path / "1")


def test_other_bytes_or_sizes_than_signed(forger, tmp_path):
    forger.add("a.txt", b"good")
    forger.listed["a.txt"] = (4, blake3(b"evil").hexdigest())
    with pytest.raises(ChecksumError, match="hash"):
        forger.opened(tmp_path / "1")
    assert not (tmp_path / "1" / "a.txt").exists()
    forger.listed["a.txt"] = (3, blake3(b"goo").hexdigest())
    with pytest.raises(WireError, match="not what was signed"):
        forger.opened(tmp_path / "2")
    forger.listed["a.txt"] = (1 << 50, "0" * 64)
    with pytest.raises(WireError, match="more than it can hold"):
        forger.opened(tmp_path / "3")
    forger.listed["a.txt"] = (-1, "0" * 64)
    with pytest.raises(WireError, match="malformed"):
        forger.opened(tmp_path / "4")


def test_entries_that_lie_over_each_other(forger, people, tmp_path):
    """Ten thousand names for one large file would fill the disk; what is listed must fit into the archive."""
    data = bytes(1000)
    for i in range(50):
        forger.add(f"{i}.txt", data)
    path = forger.made()
    found = bundle.read(path, people.authority.roster)
    assert len(found.files) == 50
    forger.files = forger.files[:1]
    with pytest.raises(WireError, match="more than it can hold"):
        bundle.read(forger.made(), people.authority.roster)


def test_a_directory_of_millions_is_not_read(forger, people):
    path = forger.add("a.txt").made()
    data = bytearray(path.read_bytes())
    struct.pack_into("<HH", data, len(data) - 22 + 8, 65535, 65535)
    path.write_bytes(data)
    with pytest.raises(WireError, match="65535 entries"):
        bundle.read(path, people.authority.roster)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 5, 5, 1 << 40, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(data) - 22, 1)
    path.write_bytes(data[:-22] + record + locator + b"PK\5\6" + bytes(18))
    with pytest.raises(WireError, match="at most"):
        bundle.read(path, people.authority.roster)


def test_more_than_the_head_may_be(forger, people, monkeypatch):
    monkeypatch.setattr(bundle, "MAX_HEAD_BYTES", 500)
    forger.head["job"] = {"name": "toy", "recipe": "script", "files": ["x" * 600]}
    with pytest.raises(WireError, match="too large"):
        bundle.read(forger.made(), people.authority.roster)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"format": 2}, VersionError),
        ({"format": "1"}, WireError),
        ({"surplus": 1}, WireError),
        ({"created": "2026-01-01T00:00:00"}, WireError),
        ({"created": "yesterday"}, WireError),
        ({"created": (datetime.now(UTC) - timedelta(days=3650)).isoformat()}, AccessError),
        ({"created": (datetime.now(UTC) + timedelta(days=3650)).isoformat()}, AccessError),
        ({"job": {"name": "../toy", "recipe": "script"}}, JobError),
        ({"job": {"name": "toy"}}, JobError),
        ({"job": []}, WireError),
        ({"job": {"name": "toy", "recipe": "script", "stratgy": "fedavg"}}, JobError),
    ],
)
def test_heads_that_say_nonsense(forger, people, change, kind):
    forger.head |= change
    with pytest.raises(kind):
        bundle.read(forger.made(), people.authority.roster)


def test_the_folder_that_a_job_names_is_not_used(forger, people):
    forger.head["job"] = {"name": "toy", "recipe": "script", "directory": "/etc"}
    assert bundle.read(forger.made(), people.authority.roster).job.directory == "."


def test_who_may_not_sign(forger, people, tmp_path):
    for kit in (people.observer, people.site, people.server):
        forger.kit = kit
        with pytest.raises(AccessError):
            bundle.read(forger.made(), people.authority.roster)
    forger.kit = Authority.create(tmp_path / "other", "lab").issue(tmp_path / "eve", Role.LEAD, "ana")
    with pytest.raises(AccessError, match="authority"):
        bundle.read(forger.made(), people.authority.roster)


def test_a_signature_over_other_bytes(forger, people):
    forger.made()
    altered = forger.path.read_bytes().replace(b'"toy"', b'"tox"')
    with zipfile.ZipFile(forger.path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["bundle.json"] = parts["bundle.json"].replace(b'"toy"', b'"tox"')
    with zipfile.ZipFile(forger.path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(AccessError, match="altered"):
        bundle.read(forger.path, people.authority.roster)
    forger.path.write_bytes(altered)  # the archive's own checksum notices
    with pytest.raises(WireError):
        bundle.read(forger.path, people.authority.roster)


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\5\6" + bytes(18), b"x" * 1000, bytes(100)])
def test_bytes_that_are_no_bundle(people, tmp_path, data):
    path = tmp_path / "b.zip"
    path.write_bytes(data)
    with pytest.raises(WireError):
        bundle.read(path, people.authority.roster)


@pytest.fixture(scope="module")
def sound(people, tmp_path_factory) -> bytes:
    home = tmp_path_factory.mktemp("sound") / "job"
    write(home, **{"a.txt": b"alpha", "d__b.json": b"{}"})
    return packed(people, home, files=["a.txt", "d"]).read_bytes()


@given(st.data())
def test_fuzz_only_hansa_errors(people, sound, tmp_path_factory, data):
    """Whatever bytes of a bundle are changed, cut or added, the outcome is a Hansa error or the files as signed."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "bundle.zip"
    whole = bytearray(sound)
    match data.draw(st.sampled_from(["change", "cut", "add", "directory"])):
        case "change":
            for _ in range(data.draw(st.integers(1, 8))):
                whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        case "cut":
            begin = data.draw(st.integers(0, len(whole) - 1))
            del whole[begin : data.draw(st.integers(begin, len(whole)))]
        case "add":
            place = data.draw(st.integers(0, len(whole)))
            whole[place:place] = data.draw(st.binary(max_size=100))
        case "directory":
            begin = whole.index(b"PK\1\2")
            for _ in range(data.draw(st.integers(1, 8))):
                whole[data.draw(st.integers(begin, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    there = folder / "there"
    there.mkdir()
    try:
        found = bundle.read(path, people.authority.roster)
        bundle.unpack(path, found, there)
    except HansaError:
        return
    assert (there / "a.txt").read_bytes() == b"alpha"
    assert (there / "d" / "b.json").read_bytes() == b"{}"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        _nested := (lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)),
    )
)
def test_fuzz_signed_jobs(people, tmp_path_factory, value):
    """A signer may be hostile too: a job of any form is refused as one."""
    forger = Forger(people, tmp_path_factory.mktemp("fuzz") / "b.zip")
    forger.head["job"] = {"name": "toy", "recipe": "script", "model": value}
    try:
        found = bundle.read(forger.made(), people.authority.roster)
    except HansaError:
        return
    assert found.job.name == "toy"


CODE = [
    ({"recipe": {"name": "mine:build"}}, "recipe"),
    ({"recipe": {"name": "script", "path": "t.py"}}, "recipe"),
    ({"recipe": {"name": "script", "path": "run.txt", "python": "/bin/sh", "env": {"LD_PRELOAD": "x"}}}, "recipe"),
    ({"strategy": {"name": "os:system"}}, "strategy"),
    ({"workflow": "mine:workflow"}, "workflow"),
    ({"partition": {"name": "mine:split"}}, "partition"),
    ({"filters": ["clip", "mine:filter"]}, "filters.1"),
    ({"model": {"factory": "net.py:Net"}}, "model.factory"),
    ({"model": {"factory": "net:Net"}}, "model.factory"),
    ({"model": {"config": {"model_type": "bert", "auto_map": {"AutoModel": "x--y.Z"}}}}, "model.config.auto_map"),
    ({"model": {"config": {"nested": [{"trust_remote_code": True}]}}}, "model.config.nested.0.trust_remote_code"),
    ({"model": {"adapter": {"method": "lora", "megatron_core": "os"}}}, "model.adapter.megatron_core"),
    ({"recipe": {"name": "causal-lm", "trust_remote_code": True}}, "recipe.trust_remote_code"),
]


@pytest.mark.parametrize(("values", "where"), CODE)
def test_what_counts_as_code(people, forger, values, where):
    forger.head["job"] = {"name": "toy", "recipe": "causal-lm", **values}
    assert where in bundle.read(forger.made(), people.authority.roster).code


@pytest.mark.parametrize(
    "name", ["a.py", "lib.so", "w.bin", "w.pt", "w.pkl", "x.pyc", "sub/run.sh", "run", "A.PY", "m.h5"]
)
def test_files_that_count_as_code(people, forger, name):
    forger.head["job"] = {"name": "toy", "recipe": "causal-lm"}
    assert list(bundle.read(forger.add(name).made(), people.authority.roster).code) == [f"files.{name}"]


def test_what_is_no_code(people, forger):
    forger.head["job"] = {
        "name": "toy",
        "recipe": "causal-lm",
        "strategy": "scaffold",
        "filters": [{"name": "clip", "max_norm": 1.0}],
        "model": {"base": "base", "factory": "w.safetensors", "config": {"trust_remote_code": False}},
        "data": {"train": "site:notes"},
    }
    for name in (
        "base/model.safetensors",
        "base/config.json",
        "base/LICENSE",
        "base/README.md",
        "t.JSONL",
        "merges.txt",
    ):
        forger.add(name)
    assert bundle.read(forger.made(), people.authority.roster).code == {}


def test_large_files_take_little_memory(people, home, tmp_path):
    """A bundle of 300 MB is packed, read and unpacked by a process that may not hold it."""
    with (home / "w.safetensors").open("wb") as file:
        file.truncate(300 << 20)
    code = """
import resource, sys
from pathlib import Path
from hansa import bundle
from hansa.core import config
from hansa.pki.kit import Kit
kit = Kit(Path(sys.argv[1]))
home, path, there = map(Path, sys.argv[2:])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
job = config.parse({"name": "toy", "recipe": "causal-lm", "directory": str(home), "files": ["w.safetensors"]})
bundle.pack(job, path, kit)
there.mkdir()
bundle.unpack(path, bundle.read(path, kit.roster()), there)
assert (there / "w.safetensors").stat().st_size == 300 << 20
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    places = [str(people.lead.directory), str(home), str(tmp_path / "b.zip"), str(tmp_path / "there")]
    done = subprocess.run([sys.executable, "-c", code, *places], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50_000, "KiB"
