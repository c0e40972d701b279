"""The tar index against Python's tarfile, and against archives that are cut, odd or hostile."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip.data.tar import TarIndex, index_tar, split_name
from medclip.types import UserError

Members = list[tuple[str, bytes]]


def tar_of(members: Members, format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def index(data: bytes, window: int = 4096) -> TarIndex:
    def read(offset: int, length: int) -> bytes:
        assert offset >= 0 and length > 0 and offset + length <= len(data)
        return data[offset : offset + length]

    return index_tar(read, "x.tar", len(data), window=window)


def samples(data: bytes, **options) -> list[tuple[str, dict[str, bytes]]]:
    found = index(data, **options)
    return [
        (
            found.keys[i],
            {
                e: data[found.offsets[e][i] : found.offsets[e][i] + found.sizes[e][i]]
                for e in found.offsets
                if found.offsets[e][i] >= 0
            },
        )
        for i in range(len(found))
    ]


def pair(key: str, image: bytes = b"jpeg", text: bytes = b"words") -> Members:
    return [(f"{key}.jpg", image), (f"{key}.txt", text)]


KEYS = [
    "3-PMC1.2-0-fig.1",
    "a/b.c/plain",
    "n" * 150,  # beyond ustar's 100
    "/".join(["folder" * 5] * 8),  # ustar's prefix, then beyond it
    "Tumör-図",
    "with space",
]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_of_every_kind_in_every_format(format: int) -> None:
    keys = [k for k in KEYS if format != tarfile.USTAR_FORMAT or (len(k.rpartition("/")[2]) < 96 and len(k) < 240)]
    data = tar_of([m for k in keys for m in pair(k, k.encode(), b"t" * len(k))], format)
    assert samples(data) == [(k, {"jpg": k.encode(), "txt": b"t" * len(k)}) for k in keys]


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=140)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
endings = st.sampled_from(["jpg", "txt", "json", "JPG", "npy", "readme", "tar"])
files = st.lists(st.tuples(st.tuples(paths, endings).map(".".join), st.binary(max_size=1500)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(files, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.sampled_from([512, 700, 4096, 1 << 18]))
def test_offsets_are_those_of_tarfile(members: Members, format: int, window: int) -> None:
    data = tar_of(members, format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = [(split_name(info.name), info.offset_data, info.size) for info in tar if info.isfile()]
    expected = [(*split, offset, size) for split, offset, size in files if split is not None]
    found = index(data, window)
    got = [
        (found.keys[i], extension, int(found.offsets[extension][i]), int(found.sizes[extension][i]))
        for extension in found.offsets
        for i in range(len(found))
        if found.offsets[extension][i] >= 0
    ]
    assert sorted(got) == sorted(expected)
    assert not found.truncated and not found.lost


def test_size_in_a_pax_header_counts() -> None:
    """Members of 8 GiB and more have their size there; a small one serves as well."""
    body = b"x" * 700
    info = tarfile.TarInfo("a.jpg")
    info.size = len(body)
    plain = info.tobuf(tarfile.USTAR_FORMAT)
    record = b"12 size=700\n"
    head = tarfile.TarInfo("pax")
    head.type, head.size = tarfile.XHDTYPE, len(record)
    lying = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)  # says 0
    assert plain != lying
    data = head.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + lying + body.ljust(1024, b"\0")
    data += tar_of(pair("b"))
    assert samples(data) == [("a", {"jpg": body}), ("b", {"jpg": b"jpeg", "txt": b"words"})]


def test_base_256_size() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 3
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (3).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert samples(bytes(header) + b"abc".ljust(512, b"\0") + bytes(1024)) == [("a", {"jpg": b"abc"})]


def test_members_apart_and_doubles() -> None:
    apart = [("a.jpg", b"1"), ("b.jpg", b"2"), ("b.txt", b"B"), ("a.json", b"{}"), ("a.txt", b"A")]
    assert samples(tar_of(apart)) == [
        ("a", {"jpg": b"1", "json": b"{}", "txt": b"A"}),
        ("b", {"jpg": b"2", "txt": b"B"}),
    ]
    twice = samples(tar_of([*pair("a", b"1", b"x"), *pair("a", b"2", b"y")]))
    assert twice == [("a", {"jpg": b"1", "txt": b"x"}), ("a", {"jpg": b"2", "txt": b"y"})]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("./a/b.JPG", ("a/b", "jpg")),
        ("3-PMC1.2-0-fig.1.jpg", ("3-PMC1.2-0-fig.1", "jpg")),
        ("x.syn.json", ("x", "syn.json")),
        ("x.pth.gz", ("x", "pth.gz")),
        (".hidden.jpg", None),
        ("a/._b.jpg", None),
        ("__MACOSX/a.jpg", None),
        ("README", None),
        ("a.exe", None),
        ("folder/", None),
    ],
)
def test_split_name(name: str, split: tuple[str, str] | None) -> None:
    assert split_name(name) == split


# Cut archives


def test_cut_within_a_member_loses_that_sample_only() -> None:
    data = tar_of([*pair("a"), *pair("b", b"i" * 2000)])
    cut = data[: 4 * 512 + 512 + 1000]  # a: 4 blocks; b.jpg: header and 1000 of 2000 bytes
    found = index(cut)
    assert [found.keys[i] for i in range(len(found))] == ["a"]
    assert found.truncated and found.lost == ("b",)


def test_cut_within_the_caption_takes_its_image_along() -> None:
    data = tar_of([*pair("a"), *pair("b")])
    found = index(data[: 7 * 512 + 3])
    assert list(found.keys[i] for i in range(len(found))) == ["a"] and found.lost == ("b",)


def test_cut_within_a_header() -> None:
    data = tar_of([*pair("a"), *pair("b")])
    found = index(data[: 4 * 512 + 100])
    assert len(found) == 1 and found.truncated and found.lost == ()
    between = index(data[: 6 * 512 + 100])  # b has its image, its caption's header is cut
    assert [between.keys[i] for i in range(len(between))] == ["a"] and between.lost == ("b",)


def test_cut_after_an_image_is_noticed_but_a_missing_end_mark_alone_is_none() -> None:
    data = tar_of([*pair("a"), *pair("b")])
    whole = index(data[: 8 * 512])
    assert len(whole) == 2 and not whole.truncated
    half = index(data[: 6 * 512])
    assert len(half) == 1 and half.truncated and half.lost == ("b",)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 1 << 14))
def test_any_cut_keeps_what_is_whole(length: int) -> None:
    whole = [(f"k{i}", {"jpg": b"j" * (300 * i), "txt": b"t" * i}) for i in range(6)]
    data = tar_of([(f"{k}.{e}", c) for k, m in whole for e, c in m.items()])
    length = min(length, len(data))
    got = samples(data[:length])
    start, whole_ones = 0, 0
    for _, members in whole:
        for content in members.values():
            end = start + 512 + len(content)
            start += 512 + 512 * -(-len(content) // 512)
        whole_ones += end <= length
    if whole_ones:  # a first sample has none before it to be compared with
        assert got == whole[:whole_ones]  # no half sample, no other bytes


def test_an_empty_file_is_a_cut_tar_and_an_empty_tar_is_not() -> None:
    assert index(b"").truncated and len(index(b"")) == 0
    assert not index(tar_of([])).truncated


# Hostile and wrong files


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_compressed_is_refused_with_the_remedy(pack) -> None:
    with pytest.raises(UserError, match=r"compressed \((gzip|xz)\).*unpack"):
        index(pack(tar_of(pair("a"))))


def test_something_else_is_refused_without_the_secret_of_its_url() -> None:
    page = b"<!doctype html>" * 100
    with pytest.raises(UserError, match="not a tar file") as caught:
        index_tar(lambda o, n: page[o : o + n], "https://host/x.tar?sig=secret", len(page))
    assert "secret" not in str(caught.value)


def test_links_devices_and_folders_are_no_samples_and_dots_only_keys() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("evil.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("../../etc/a.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    assert samples(out.getvalue()) == [("../../etc/a", {"jpg": b"1"})]


def forged(kind: bytes, size: bytes) -> bytes:
    header = bytearray(tarfile.TarInfo("x.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = kind
    header[124:136] = size.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"5", b"Q"])
@pytest.mark.parametrize("size", [b"-0001000", b"-1", b"7_7", b"zzz", b"77777777777", b"\x80" + b"\xff" * 11])
def test_forged_sizes_end_the_index_and_not_the_process(kind: bytes, size: bytes) -> None:
    data = tar_of(pair("a"))[: 4 * 512] + forged(kind, size) + bytes(512) + tar_of(pair("b"))
    found = index(data)  # would run for ever if a negative size led backwards
    assert found.keys[0] == "a"
    assert len(found) <= 2


def test_a_pax_size_of_a_million_digits() -> None:
    digits = b"9" * 8000
    record = b"%d size=%s\n" % (len(digits) + 11, digits)
    head = tarfile.TarInfo("pax")
    head.type, head.size = tarfile.XHDTYPE, len(record)
    data = head.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512) + tar_of(pair("b"))
    assert index(data).keys[0] == "b"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_flipped_bytes_break_it(data: st.DataObject) -> None:
    good = bytearray(tar_of([*pair("a"), *pair("ü" * 120), *pair("b" * 130)]))
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = index(bytes(good))
    except UserError:
        return
    for extension in found.offsets:
        there = found.offsets[extension] >= 0
        assert ((found.offsets[extension] + found.sizes[extension])[there] <= len(good)).all()
