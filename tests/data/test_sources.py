import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxnets import errors
from jaxnets.data.sources import (
    ArrayRecords,
    Arrays,
    decode_example,
    encode_example,
    read_example,
    read_rows,
    read_rows_leaving_out,
    write_array_records,
)

KINDS = st.sampled_from([np.uint8, np.int32, np.int64, np.float32, np.float64, np.bool_])


class Listed:
    """A source of what it is given."""

    def __init__(self, *examples):
        self.examples = examples
        self.asked = []

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.examples[i]


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text(max_size=5), hnp.arrays(KINDS, hnp.array_shapes(min_dims=0)), max_size=3))
def test_examples_as_bytes_and_back(example):
    back = decode_example(encode_example(example))
    assert back.keys() == example.keys()
    for name, array in example.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_bytes_that_are_cut_off():
    with pytest.raises(ValueError, match=r"expected|smaller"):
        decode_example(encode_example({"x": np.arange(4)})[:-1])
    with pytest.raises(ValueError, match="expected"):
        decode_example(encode_example({"x": np.arange(4)}) + b"!")


def test_an_example_of_words_is_not_written():
    with pytest.raises(errors.DataError, match="numbers only"):
        encode_example({"text": "abc"})


def test_rows_are_the_examples_stacked_with_their_dtypes():
    examples = [{"x": np.full((2, 3), i, np.float32), "label": np.int32(i)} for i in range(4)]
    rows = read_rows(Listed(*examples), [2, 0, 3])
    assert {name: (x.dtype.name, x.shape) for name, x in rows.items()} == {
        "x": ("float32", (3, 2, 3)),
        "label": ("int32", (3,)),
    }
    assert rows["label"].tolist() == [2, 0, 3]


def test_padding_reads_example_0_once():
    source = Listed(*({"x": i} for i in range(4)))
    assert read_rows(source, np.array([3, 0, 0, 0], np.int32))["x"].tolist() == [3, 0, 0, 0]
    assert source.asked == [3, 0]


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"x": np.zeros(3)}, r"example 1 is x float64 \(3,\) and example 0 x float64 \(2,\)"),
        ({"x": np.zeros(2, np.float32)}, r"example 1 is x float32"),
        ({"y": np.zeros(2)}, r"example 1 is y float64"),
    ],
)
def test_examples_that_differ(odd, message):
    with pytest.raises(errors.DataError, match=message):
        read_rows(Listed({"x": np.zeros(2)}, odd), [0, 1])


def test_examples_that_are_not_numbers():
    with pytest.raises(errors.DataError, match="text of example 0 is not of numbers"):
        read_rows(Listed({"text": "abc"}), [0])


def test_arrays_are_taken_a_batch_at_a_time():
    source = Arrays({"x": np.arange(6).reshape(3, 2)})
    assert read_rows(source, [2, 0])["x"].tolist() == [[4, 5], [0, 1]]
    assert source[2]["x"].tolist() == [4, 5]
    assert len(source) == 3
    with pytest.raises(errors.ConfigError, match=r"lengths \[2, 3\]"):
        Arrays({"x": np.zeros(2), "y": np.zeros(3)})
    with pytest.raises(errors.ConfigError, match="lengths"):
        Arrays({})


def write(path, labels):
    return write_array_records(path, ({"label": np.int32(i), "x": np.full(3, i)} for i in labels))


def test_array_records_one_file_after_another(tmp_path):
    paths = [tmp_path / "b.array_record", tmp_path / "a.array_record"]
    assert [write(paths[0], range(5)), write(paths[1], range(5, 7))] == [5, 2]
    source = ArrayRecords(paths)
    assert len(source) == 7
    assert [int(source[i]["label"]) for i in range(7)] == list(range(7))
    assert read_rows(source, [6, 1])["x"].tolist() == [[6, 6, 6], [1, 1, 1]]


def test_array_records_are_written_whole_or_not(tmp_path):
    path = tmp_path / "x.array_record"
    write(path, range(5))

    def labels():
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write(path, labels())
    assert len(ArrayRecords([path])) == 5
    assert [each.name for each in tmp_path.iterdir()] == ["x.array_record"]


def test_array_records_that_somebody_else_encoded(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "x"), "group_size:1")
    writer.write(b"\x07\x08")
    writer.close()
    source = ArrayRecords([tmp_path / "x"], decode=lambda record: {"x": np.frombuffer(record, np.uint8)})
    assert source[0]["x"].tolist() == [7, 8]
    with pytest.raises(errors.DataError, match=r"x: record 0 can't be read"):
        ArrayRecords([tmp_path / "x"])[0]


def test_array_records_that_cannot_be_read(tmp_path):
    write(tmp_path / "good", range(3))
    (tmp_path / "bad").write_bytes(b"not at all such a file" * 50)
    (tmp_path / "void").write_bytes(b"")
    write(tmp_path / "none", [])
    for paths, message in [
        ([], "no ArrayRecord files"),
        ([tmp_path / "good", tmp_path / "gone"], "gone: there is no such file"),
        ([tmp_path / "good", tmp_path / "bad"], "bad: not an ArrayRecord file"),
        ([tmp_path / "void"], "void: "),
        ([tmp_path / "none"], "none: no records"),
    ]:
        with pytest.raises(errors.DataError, match=message) as caught:
            ArrayRecords(paths)
        assert "\n" not in str(caught.value)


class Holes:
    """Examples of which some can't be read; `take` reads all or nothing."""

    def __init__(self, *holes):
        self.holes = holes

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i in self.holes:
            raise OSError(5, "I/O error")
        return {"x": np.int32(i)}

    def take(self, index):
        return {"x": np.array([self[i]["x"] for i in index])}


def test_the_next_example_stands_in_for_one_that_cannot_be_read():
    rows, unreadable = read_rows_leaving_out(Holes(3, 4, 7), [7, 3, 1, 3, 4], 3)
    assert rows["x"].tolist() == [0, 5, 1, 5, 5]
    assert unreadable == dict.fromkeys((7, 3, 4), "OSError: [Errno 5] I/O error")
    assert read_rows_leaving_out(Holes(), [2, 5], 3)[1] == {}
    with pytest.raises(errors.DataError, match="3 examples in a row can't be read, more than the 2"):
        read_rows_leaving_out(Holes(*range(8)), [1], 2)
    with pytest.raises(OSError, match="I/O error"):
        read_example(Holes(3), 3)


def test_memory_that_ran_out_is_no_matter_of_an_example():
    class Large(Holes):
        def __getitem__(self, i):
            raise MemoryError

    with pytest.raises(MemoryError):
        read_rows_leaving_out(Large(), [1], 2)
