"""Files in folders and behind URIs."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydisp import storage
from raydisp.errors import OutputError


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    storage.check_writable(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_check_writable_refuses_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match=r"taken is a file; choose another place"):
        storage.check_writable(str(tmp_path / "taken" / "study"))


def test_check_writable_refuses_a_place_that_takes_no_file() -> None:
    with pytest.raises(OutputError, match="/proc/raydisp cannot be written"):
        storage.check_writable("/proc/raydisp")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be written: it is a folder; name a file"):
        storage.write_bytes(str(tmp_path), b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["foo://bar/x", "a\0b"])
def test_places_that_are_none(place: str) -> None:
    with pytest.raises(OutputError):
        storage.resolve(place)


@pytest.mark.parametrize(
    "place",
    [
        "s3://AKIDEXAMPLE:geheim%2Fsecret@bucket/results",
        "s3://AKIDEXAMPLE:geheim/secret@bucket/results",
        "abfs://container@account.dfs.core.windows.net/x?sas_token=geheim",
        "hdfs://me:geheim@namenode:9000/results",
    ],
)
def test_no_secret_belongs_into_a_place(place: str) -> None:
    with pytest.raises(OutputError, match=r"holds a password or a key.*by the environment") as told:
        storage.resolve(place)
    assert "geheim" not in str(told.value)
    assert "AKID" not in str(told.value)


@pytest.mark.parametrize("place", ["/a:b@c/x", "/a?key=1", "file:///a:b/c@d"])
def test_names_with_odd_signs_are_no_secret(place: str) -> None:
    assert storage.resolve(place)[1] == place.removeprefix("file://")


@pytest.mark.parametrize(
    ("location", "joined"),
    [("a", "a/b/c"), ("a/", "a/b/c"), ("/", "//b/c"), ("", "b/c"), ("s3://x/", "s3://x/b/c")],
)
def test_places_below(location: str, joined: str) -> None:
    assert storage.join(location, "b", "c") == joined


def test_uris_go_through_arrow(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/deep/er"
    storage.write_bytes(storage.join(uri, "x.bin"), b"abc")
    assert storage.read_bytes(storage.join(uri, "x.bin")) == b"abc"
    assert storage.exists(storage.join(uri, "x.bin"))
    storage.delete_dir(uri)
    assert not storage.exists(uri)
