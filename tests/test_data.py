"What would bore a reader of nbs/api/04_data.ipynb: damaged files, odd encodings, random bytes, readings in parts."

import codecs
import gzip
import json
import os
import tracemalloc

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from truthgpt_nb.core import InputError
from truthgpt_nb.data import Broken, RecordSource, load_image


def zst(data):
    "Compressed as one frame."
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


GOOD = [json.dumps({"text": f"story {n}", "id": n}).encode() for n in range(20)]


def texts(source):
    return [record["text"] for record in source]


def places(source):
    return [row["place"].rpartition("/")[2] for row in source.report().rows]


# lines


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(GOOD)), max_size=30))
def test_random_bytes_are_broken_lines_and_nothing_else(tmp_path, lines):
    path = tmp_path / "random.jsonl"
    path.write_bytes(b"\n".join([GOOD[0], *lines]))
    source = RecordSource(path, broken="skip", schema="text", max_bytes=60)
    read = texts(source)
    kept = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    assert len(read) + source.broken == source.read == len(kept)
    assert len([line for line in kept if line in GOOD]) <= len(read)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": Infinity}', "the constant Infinity"),
        (b'{"text": 7}', "text must be a string that holds something"),
        (b'{"text": "  "}', "text must be a string that holds something"),
        (b'{"text": "\\ud800"}', "text must be text that UTF-8 can hold"),
        (b'{"text": "\xe9t\xe9"}', "the text must be utf-8"),
        (b"[1, 2]", "the record must be an object with named fields"),
        (b"null", "the record must be an object with named fields"),
        (b'{"text": "a"} {"text": "b"}', "the line must be JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "the line must be JSON"),
        (b'{"text": "' + b"x" * 10_000 + b'"}', "the line must have at most 9,000 bytes"),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_read(tmp_path, line, why):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD[0], b"", line, GOOD[1]]))
    source = RecordSource(path, broken="skip", max_bytes=9000)
    assert texts(source) == ["story 0", "story 1"]
    assert places(source) == ["a.jsonl, line 3"]
    assert why in source.report().rows[0]["problem"]
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: "):
        texts(RecordSource(path, max_bytes=9000))


def test_byte_order_marks_and_carriage_returns_go(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b"\r\n".join(GOOD[:3]) + b"\r\n")
    assert texts(RecordSource(path)) == ["story 0", "story 1", "story 2"]
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"one\r\ntwo\r\n\r\nthree")
    assert texts(RecordSource(path)) == ["one", "two", "three"]
    assert texts(RecordSource(path, by="paragraph")) == ["one\ntwo", "three"]
    assert texts(RecordSource(path, by="document")) == ["one\ntwo\n\nthree"]


def test_other_encodings_are_read_when_named_and_refused_when_not(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("été\nun\n".encode("latin-1"))
    assert texts(RecordSource(path, encoding="latin-1")) == ["été", "un"]
    with pytest.raises(InputError, match=r"a\.txt, line 1: the text must be utf-8"):
        RecordSource(path)
    path.write_text("été", encoding="utf-16")
    with pytest.raises(InputError, match="The file is UTF-16"):
        RecordSource(path)
    for encoding in ("utf-16", "nonsense", None):
        with pytest.raises(InputError, match="encoding must be one that Python knows"):
            RecordSource(path, encoding=encoding)


def test_a_huge_line_is_passed_over_without_being_held(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b"x" * 2**20)
        file.write(b"\n" + GOOD[0])
    tracemalloc.start()
    source = RecordSource(path, broken="skip", max_bytes=2**16)
    assert texts(source) == ["story 0"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert places(source) == ["a.jsonl.gz, line 1"]
    assert peak < 4 * 2**20


def test_a_large_paragraph_or_document_is_broken(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("line\n" * 30 + "\nshort\n")
    source = RecordSource(path, by="paragraph", max_bytes=100, broken="skip")
    assert texts(source) == ["short"] and places(source) == ["a.txt, line 1"]
    with pytest.raises(InputError, match="the document must have at most 100 bytes"):
        RecordSource(path, by="document", max_bytes=100)


# files


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_ends_too_early_is_an_error(tmp_path, suffix, policy):
    data = b"\n".join(json.dumps({"text": os.urandom(40).hex()}).encode() for _ in range(5000))
    packed = gzip.compress(data) if suffix == ".gz" else zst(data)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    assert len(texts(RecordSource(path))) == 5000
    for cut in (len(packed) // 2, len(packed) - 3):
        path.write_bytes(packed[:cut])
        with pytest.raises(InputError, match="must be a file that can be read to its end"):
            texts(RecordSource(path, broken=policy))
    path.write_bytes(b"not compressed at all, but a line of text")
    with pytest.raises(InputError, match="must be a file that can be read to its end"):
        RecordSource(path, broken=policy)


def test_files_compressed_in_pieces_are_read_to_their_end(tmp_path):
    halves = [b"\n".join(GOOD[:10]) + b"\n", b"\n".join(GOOD[10:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zst, halves)))
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    for name in ("a.jsonl.zst", "a.jsonl.gz"):
        assert texts(RecordSource(tmp_path / name)) == [f"story {n}" for n in range(20)]


def test_globs_folders_and_lists_give_each_file_once_in_order(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    (tmp_path / "notes.pdf").write_text("something else")
    assert texts(RecordSource(tmp_path)) == texts(RecordSource(f"{tmp_path}/*.jsonl")) == ["a", "b"]
    assert texts(RecordSource([tmp_path / "b.jsonl", str(tmp_path / "a.jsonl"), tmp_path])) == ["b", "a"]
    with pytest.raises(InputError, match="data must name files that exist"):
        RecordSource("a text and not a path")


def test_a_broken_table_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"a\.parquet must be a parquet file that can be read to its end"):
        RecordSource(path, broken="skip")
    path = tmp_path / "a.csv"
    path.write_text('text,id\n"one",1\n"two",2,3,4\n')
    with pytest.raises(InputError, match=r"a\.csv must be a csv file that can be read to its end"):
        texts(RecordSource(path, broken="skip"))


def test_the_digest_is_of_the_content_and_of_what_changes_the_records(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_bytes(GOOD[0])
    two.write_bytes(GOOD[1])
    digest = RecordSource([one, two]).digest()
    assert RecordSource([two, one]).digest() != digest
    (tmp_path / "other").mkdir()
    moved = [path.rename(tmp_path / "other" / path.name.upper().replace("JSONL", "jsonl")) for path in (one, two)]
    assert RecordSource(moved).digest() == digest
    assert RecordSource(moved, schema="text", columns={"title": "id"}).digest() != digest
    assert RecordSource(moved, max_bytes=100).digest() != digest
    assert RecordSource([{"text": "a"}]).digest() != RecordSource([{"text": "b"}]).digest()
    assert RecordSource(lambda: ["a"]).digest() is None


def test_a_file_that_changes_while_it_is_read_is_noticed_at_the_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(GOOD))
    records = iter(RecordSource(path))
    next(records)
    with path.open("ab") as file:
        file.write(b"\n" + GOOD[0])
    with pytest.raises(InputError, match="data must not change while it is used"):
        list(records)
    source = RecordSource(path)
    path.unlink()
    with pytest.raises(InputError, match="data must not change while it is used"):
        list(source)


def test_what_was_set_aside_is_whole_and_written_only_when_all_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    broken = b'{"text": "' + b"y" * 1000
    path.write_bytes(b"\n".join([GOOD[0], broken, GOOD[1]]))
    source = RecordSource(path, broken="aside", aside=tmp_path / "aside.jsonl")
    records = iter(source)
    next(records), next(records)
    assert not source.aside.exists()
    list(records)
    (kept,) = map(json.loads, source.aside.read_text().splitlines())
    assert kept["content"] == broken.decode() and kept["place"] == f"{path}, line 2"


# parts


def test_parts_are_the_records_whatever_their_size_and_what_is_skipped_is_not_parsed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*GOOD[:7], b"broken", *GOOD[7:]]))
    source = RecordSource(path, broken="skip")
    for size in (1, 4, 30):
        source.rewind()
        parts = []
        while part := source.part(size):
            parts += part
        assert [p["text"] for p in parts if not isinstance(p, Broken)] == [f"story {n}" for n in range(20)]
        assert [n for n, p in enumerate(parts) if isinstance(p, Broken)] == [7]
    made = []
    source.rewind()
    source.part(3, skip=9, make=made.append)
    assert [record["id"] for record in made] == [8, 9, 10]


# pictures


def test_pictures_are_found_beside_the_file_that_names_them(tmp_path):
    Image.new("L", (3, 2), 255).save(tmp_path / "white.png")
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "white.png", "text": "white"}\n{"file_name": "gone.png", "text": "gone"}\n')
    source = RecordSource(path, columns={"image": "file_name"}, broken="skip")
    (record,) = source
    assert source.schema == "image" and load_image(record["image"]).getpixel((0, 0)) == (255, 255, 255)
    assert "gone.png" in source.report().rows[0]["problem"]


def test_pictures_of_a_data_set_stay_bytes_until_they_are_asked_for():
    rows = datasets.Dataset.from_list([{"image": Image.new("RGB", (3, 2), "red"), "text": "red"}])
    for data in (rows, rows.to_iterable_dataset()):
        (record,) = RecordSource(data)
        assert isinstance(record["image"]["bytes"], bytes)
        assert load_image(record["image"]).getpixel((0, 0)) == (255, 0, 0)
