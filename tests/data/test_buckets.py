import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import errors
from jaxnets.data import bucket_of, pad_batch, pad_to

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@settings(deadline=None)
@given(length=st.integers(0, 60), buckets=SIZES)
def test_the_smallest_that_holds_it(length, buckets):
    fitting = [bucket for bucket in buckets if bucket >= length]
    if fitting:
        assert bucket_of(length, buckets) == (min(fitting),)
    else:
        with pytest.raises(errors.DataError, match=f"size {length} fits into none of the buckets"):
            bucket_of(length, buckets)


def test_two_axes_take_the_least_volume():
    buckets = ((32, 32), (64, 32), (32, 64), (64, 64))
    assert bucket_of((30, 40), buckets) == (32, 64)
    assert bucket_of((33, 1), buckets) == (64, 32)
    assert bucket_of((32, 32), buckets) == (32, 32)
    assert bucket_of((10, 10), ((16, 64), (32, 24))) == (32, 24)
    with pytest.raises(errors.DataError, match="fits into none"):
        bucket_of((65, 1), buckets)


@pytest.mark.parametrize("buckets", [(), ((8, 8),), (8, (8, 8)), (0,)])
def test_buckets_that_are_none(buckets):
    with pytest.raises(errors.ConfigError, match="buckets for sizes such as 3 can't be"):
        bucket_of(3, buckets)


@settings(deadline=None)
@given(height=st.integers(0, 5), width=st.integers(1, 5), more=st.integers(0, 3))
def test_padding_keeps_everything_and_masks_the_rest(height, width, more):
    x = np.arange(height * width * 2, dtype=np.int16).reshape(height, width, 2) + 1
    padded, mask = pad_to(x, (height + more, width + 1), fill=-1)
    assert padded.shape == (height + more, width + 1, 2)
    assert padded.dtype == np.int16
    np.testing.assert_array_equal(padded[:height, :width], x)
    np.testing.assert_array_equal(mask, (padded != -1).all(-1))
    assert mask.sum() == height * width


@pytest.mark.parametrize("size", [2, (3, 1), (3, 2, 1)])
def test_what_does_not_fit_is_refused(size):
    with pytest.raises(ValueError, match=r"shape \(3, 2\) can't be filled up"):
        pad_to(np.zeros((3, 2)), size)


def test_a_batch_takes_the_bucket_of_its_longest():
    examples = [
        {"token": np.arange(n) + 1, "tag": np.full(n, 7, np.int8), "label": np.int32(n)}
        for n in (2, 5, 1)
    ]
    batch = pad_batch(
        examples, (4, 8, 16), varying=["token", "tag"], mask="token_mask", fill={"tag": -1}
    )
    assert batch["token"].shape == batch["tag"].shape == batch["token_mask"].shape == (3, 8)
    assert batch["token"][0].tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    assert batch["tag"][2].tolist() == [7, *[-1] * 7]
    assert batch["token_mask"].sum(1).tolist() == [2, 5, 1]
    assert batch["label"].tolist() == [2, 5, 1]
    assert batch["label"].dtype == np.int32


def test_images_whose_sides_are_long_in_turn():
    """No image is larger than 32 x 64 or 64 x 32, but the batch is."""
    images = [{"image": np.ones((30, 60, 3))}, {"image": np.ones((60, 30, 3))}]
    buckets = ((32, 64), (64, 32), (64, 64))
    batch = pad_batch(images, buckets, varying=["image"], mask="pixels")
    assert batch["image"].shape == (2, 64, 64, 3)
    assert batch["pixels"].sum((1, 2)).tolist() == [1800, 1800]


def test_arrays_of_one_example_that_differ_in_size():
    with pytest.raises(errors.DataError, match="arrays of one example differ in size"):
        pad_batch([{"a": np.ones(2), "b": np.ones(3)}], (4,), varying=["a", "b"], mask="m")
