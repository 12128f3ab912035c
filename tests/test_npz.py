"""Archives of weights that claim more than they can hold are refused before anything is read."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cache.errors import DataError, MissingDataError
from saes import SAE
from saes.foreign import npz
from saes.foreign.npz import read_npz

D, F = 32, 2048
SHAPES = {"W_enc": ("d", "n"), "b_enc": ("n",), "W_dec": ("n", "d"), "b_dec": ("d",), "threshold": ("n",)}


def weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0).standard_normal
    size = {"d": D, "n": F}
    return {n: draw([size[a] for a in axes]).astype(np.float32) for n, axes in SHAPES.items()}


def header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members.items():
            made.writestr(f"{name}.npy", content)
    return path


def plain(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {n: header(a.shape) + a.tobytes() for n, a in arrays.items()}


@pytest.fixture
def nothing_is_read(monkeypatch) -> None:
    monkeypatch.setattr(npz.np, "load", lambda *_, **__: pytest.fail("the arrays were read"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_honest_archives_are_read_as_they_are(save, tmp_path: Path) -> None:
    want = weights()
    other = want | {"W_dec": np.asfortranarray(want["W_dec"]), "b_dec": want["b_dec"].astype(np.float64)}
    save(tmp_path / "a.npz", **other)
    got = read_npz(tmp_path / "a.npz", SHAPES, {})
    for name, array in want.items():
        assert got[name].dtype == np.float32 and np.array_equal(got[name], array)


def test_a_small_file_that_inflates_to_far_more_is_refused(
    tmp_path: Path, monkeypatch, nothing_is_read
) -> None:
    monkeypatch.setattr(npz, "SLACK", 1 << 16)
    path = archive(tmp_path / "params.npz", plain({n: np.zeros_like(a) for n, a in weights().items()}))
    assert path.stat().st_size * npz.INFLATION < 2 * 4 * D * F
    with pytest.raises(DataError, match="no trained weights do") as e:
        SAE.load(tmp_path)
    assert "\n" not in str(e.value) and "params.npz" in str(e.value)


def test_gigabytes_of_zeros_are_refused_by_the_limits_as_they_stand(tmp_path: Path, nothing_is_read) -> None:
    """The list of the archive says 4 GB an array, and so do the headers; the file has a few hundred bytes."""
    size = 30_000
    shapes = {
        "W_enc": (size, size),
        "W_dec": (size, size),
        "b_enc": (size,),
        "b_dec": (size,),
        "threshold": (size,),
    }
    members = {n: header(s) for n, s in shapes.items()}
    path = archive(tmp_path / "params.npz", members)
    content = bytearray(path.read_bytes())
    for name, shape in shapes.items():
        claim = len(members[name]) + 4 * int(np.prod(shape))
        at = content.rindex(f"{name}.npy".encode()) - 46  # its entry in the central directory
        assert content[at : at + 4] == b"PK\x01\x02"
        content[at + 24 : at + 28] = struct.pack("<I", claim)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"claims 7\.2 GB of weights in a file of 0\.0 MB"):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((10**7, 10**7), "shape"), ((F, D + 1), "shape"), ((F * D,), "shape"), ((F, -D), "shape")],
)
def test_a_header_that_does_not_belong_to_the_others_is_refused(
    shape: tuple[int, ...], words: str, tmp_path: Path, nothing_is_read
) -> None:
    members = plain(weights()) | {"W_dec": header(shape) + b"\0" * (4 * D * F)}
    with pytest.raises(DataError, match=words):
        read_npz(archive(tmp_path / "a.npz", members), SHAPES, {})


def test_headers_that_agree_with_each_other_but_not_with_the_archive_are_refused(
    tmp_path: Path, nothing_is_read
) -> None:
    big = 10**7
    members = {n: header(tuple(big for _ in axes)) + b"\0" * 64 for n, axes in SHAPES.items()}
    with pytest.raises(DataError, match=r"claims 400,000,000,000,[0-9]+ bytes, the archive holds"):
        read_npz(archive(tmp_path / "a.npz", members), SHAPES, {})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        b"\x93NUMPY\x09\x00\x01\x00 ",
        header((F, D), "|O"),
    ],
)
def test_headers_that_are_none_are_refused(content: bytes, tmp_path: Path, nothing_is_read) -> None:
    """Among them one that claims to be four gigabytes long, and an array of objects."""
    path = archive(tmp_path / "a.npz", plain(weights()) | {"W_dec": content})
    with pytest.raises(DataError, match="plain arrays") as e:
        read_npz(path, SHAPES, {})
    assert "\n" not in str(e.value)


def test_other_members_and_a_missing_file_are_named(tmp_path: Path, nothing_is_read) -> None:
    path = archive(tmp_path / "a.npz", plain(weights()) | {"more": b"x"})
    with pytest.raises(DataError, match="expected"):
        read_npz(path, SHAPES, {})
    with (
        zipfile.ZipFile(archive(path, plain(weights())), "a") as twice,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        twice.writestr("W_dec.npy", b"x")
    with pytest.raises(DataError, match="expected"):
        read_npz(path, SHAPES, {})
    with pytest.raises(MissingDataError, match="does not exist"):
        read_npz(tmp_path / "none.npz", SHAPES, {})
