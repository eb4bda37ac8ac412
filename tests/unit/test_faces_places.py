"""Where a source lies: absolute paths, and nothing written among faces."""

import pytest

from common.errors import ConfigError
from common.faces.places import absolute, local_path, overlap, refuse_among


def test_paths_become_absolute_and_the_rest_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert absolute("mine") == str(tmp_path / "mine")
    assert absolute("hf:mine,split=test") == f"hf:{tmp_path}/mine,split=test"
    for same in ("", "utkface", "procedural:persons=3", "skimage:lfw_subset", "hf:somebody/faces", "sklearn:lfw"):
        assert absolute(same) == same
    assert local_path("hf:somebody/faces") is None


def test_overlap_is_found_through_links_and_schemes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces" / "ann").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("faces")
    for one, other in (
        ("faces", "link/ann"),
        ("faces/ann", "faces"),
        ("hf:faces", "link"),
        ("sklearn:lfw", "sklearn:lfw"),
    ):
        assert overlap(one, other)
    for one, other in (("faces", "other"), ("faces/ann", "other"), ("hf:a/b", "faces"), ("sklearn:lfw", "faces")):
        assert not overlap(one, other)


def test_nothing_is_written_among_faces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    for out in ("faces/held.png", "faces"):
        with pytest.raises(ConfigError, match="lies among the faces"):
            refuse_among(tmp_path / out, "faces")
    refuse_among(tmp_path / "held.png", "faces")
    refuse_among(tmp_path / "held.png", "procedural:persons=3")
