import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.train import augment

B, H, W, C = 64, 9, 7, 2
KEY = jax.random.key(3)
POSITION = np.arange(1000, 1000 + B, dtype=np.uint32)


def images():
    return np.random.default_rng(0).normal(size=(B, H, W, C)).astype(np.float32)


EVERY = {
    "crop": lambda x, position: augment.random_crop(x, 2, key=KEY, position=position),
    "flip": lambda x, position: augment.random_flip(x, key=KEY, position=position),
    "alternate": lambda x, position: augment.alternating_flip(
        x, key=KEY, index=position, position=position, num_examples=10_000
    ),
    "cutout": lambda x, position: augment.cutout(x, 4, key=KEY, position=position),
}


@pytest.mark.parametrize("name", EVERY)
def test_what_happens_to_a_row_follows_from_its_position_alone(name):
    x = images()
    change = jax.jit(EVERY[name])
    whole = np.asarray(change(x, POSITION))
    assert whole.dtype == x.dtype
    order = np.random.default_rng(1).permutation(B)
    np.testing.assert_array_equal(change(x[order], POSITION[order]), whole[order])
    np.testing.assert_array_equal(change(x[8:24], POSITION[8:24]), whole[8:24])
    assert (whole != x).any(axis=(1, 2, 3)).mean() > 0.3
    assert (np.asarray(change(x, POSITION + B)) != whole).any()


def test_crop_moves_within_a_reflected_border_and_reaches_every_place():
    x = images()
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    found = np.asarray(EVERY["crop"](x, POSITION))
    seen = set()
    for i in range(B):
        places = [
            (r, c)
            for r in range(5)
            for c in range(5)
            if np.array_equal(padded[i, r : r + H, c : c + W], found[i])
        ]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) > 15  # of 25, with 64 draws
    assert augment.random_crop(x, 0, key=KEY, position=POSITION) is x
    with pytest.raises(ValueError, match="can't be moved by 7 pixels"):
        augment.random_crop(jnp.asarray(x), 7, key=KEY, position=POSITION)


def test_windows_are_cut_from_every_place():
    x = images()
    found = np.asarray(augment.random_window(jnp.asarray(x), 5, key=KEY, position=POSITION))
    assert found.shape == (B, 5, 5, C)
    seen = set()
    for i in range(B):
        places = [
            (r, c)
            for r in range(5)
            for c in range(3)
            if np.array_equal(x[i, r : r + 5, c : c + 5], found[i])
        ]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) > 12  # of 15, with 64 draws
    part = augment.random_window(jnp.asarray(x[8:24]), 5, key=KEY, position=POSITION[8:24])
    np.testing.assert_array_equal(part, found[8:24])
    whole = augment.random_window(jnp.asarray(x[:, :7]), 7, key=KEY, position=POSITION)
    np.testing.assert_array_equal(whole, x[:, :7])
    for side in (0, 8):
        with pytest.raises(ValueError, match=f"no window of {side} pixels"):
            augment.random_window(jnp.asarray(x), side, key=KEY, position=POSITION)


def test_flip_mirrors_left_to_right():
    x = images()
    found = np.asarray(EVERY["flip"](x, POSITION))
    is_flipped = (found == x[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (is_flipped | (found == x).all(axis=(1, 2, 3))).all()
    assert 0.25 < is_flipped.mean() < 0.75


def test_alternating_flip_shows_the_other_side_in_the_next_epoch():
    x, index = images(), np.arange(B, dtype=np.int32)

    def epoch(number):
        position = (number * 100 + index[::-1]).astype(np.uint32)
        return np.asarray(
            augment.alternating_flip(x, key=KEY, index=index, position=position, num_examples=100)
        )

    np.testing.assert_array_equal(epoch(1), epoch(0)[:, :, ::-1])
    np.testing.assert_array_equal(epoch(2), epoch(0))
    assert 0.25 < (epoch(0) == x).all(axis=(1, 2, 3)).mean() < 0.75


def test_cutout_blanks_a_square_around_any_pixel():
    x = np.ones((2000, H, W, C), np.float32)
    position = np.arange(2000, dtype=np.uint32)
    blank = np.asarray(augment.cutout(x, 3, key=KEY, position=position)) == 0
    assert (blank.any(-1) == blank.all(-1)).all()  # all channels together
    rows, columns = blank[..., 0].any(2), blank[..., 0].any(1)
    np.testing.assert_array_equal(blank[..., 0], rows[:, :, None] & columns[:, None])
    for side, size in ((rows, H), (columns, W)):
        count = side.sum(1)
        assert set(count) == {2, 3}  # cut off at the border, never empty
        assert side.any(0).all()
        # The middle is uniform: at either border a third more or less would show.
        np.testing.assert_allclose((count == 2).mean(), 2 / size, atol=0.05)
    assert not (np.asarray(augment.cutout(x[:4], 0, key=KEY, position=position[:4])) == 0).any()


def test_mixup_weights_follow_their_distribution():
    position = np.arange(4000, dtype=np.uint32)
    for alpha in (0.4, 1.0):
        weights = np.asarray(augment.mixup_weights(alpha, key=KEY, position=position))
        assert weights.min() >= 0
        assert weights.max() <= 1
        np.testing.assert_allclose(weights.mean(), 0.5, atol=0.03)
        np.testing.assert_allclose(weights.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.08)
    again = augment.mixup_weights(1.0, key=KEY, position=position[5:7])
    np.testing.assert_array_equal(again, weights[5:7])
    with pytest.raises(ValueError, match="above 0"):
        augment.mixup_weights(0.0, key=KEY, position=position)
