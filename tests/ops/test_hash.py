import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxnets import ops
from jaxnets.ops import hash

IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")
UINT32 = st.integers(0, 2**32 - 1)
# Compiled, or each of their operations is compiled alone; one test compares with the eager ones.
mix, row_bits = jax.jit(hash.mix), jax.jit(ops.row_bits, static_argnums=2)


def by_hand(x):
    """The hash in Python's integers."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
    x = (x ^ (x >> 15)) * 0xD35A2D97 % 2**32
    return x ^ (x >> 15)


def inverse(x):
    """Undo it, so no two inputs can have the same output."""
    x ^= x >> 15 ^ x >> 30
    x = x * pow(0xD35A2D97, -1, 2**32) % 2**32
    x ^= x >> 15 ^ x >> 30
    x = x * pow(0x21F0AAAD, -1, 2**32) % 2**32
    return x ^ (x >> 16)


def mix_ints(values):
    return np.asarray(mix(jnp.asarray(np.asarray(values, np.uint32)))).tolist()


def row_by_hand(first, second, row, places):
    """`row_bits` of one flat row, from the two words of a key."""
    row_hash = by_hand((by_hand(row % 2**32 ^ first) + second) % 2**32)
    return [by_hand(by_hand((place + second) % 2**32) ^ row_hash) for place in range(places)]


def test_mix_has_the_values_written_down():
    values = [0, 1, 2, 3, 0xDEADBEEF, 2**31, 2**32 - 1]
    expected = [0, 114555507, 229111015, 225435386, 2318109426, 3233617010, 3652544131]
    assert [by_hand(value) for value in values] == expected
    assert mix_ints(values) == expected


@settings(max_examples=50, deadline=None)
@given(values=st.lists(UINT32, min_size=8, max_size=8))
def test_mix_can_be_undone(values):
    hashed = mix_ints(values)
    assert hashed == [by_hand(value) for value in values]
    assert [inverse(value) for value in hashed] == values


def test_mix_has_no_collision_in_a_million():
    hashed = np.asarray(mix(jnp.arange(2**20, dtype=jnp.uint32)))
    assert len(np.unique(hashed)) == 2**20


def test_every_input_bit_flips_every_output_bit_half_of_the_time():
    size = 2**15
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, size, dtype=np.uint32))
    hashed = np.asarray(mix(x))
    for bit in range(32):
        flipped = hashed ^ np.asarray(mix(x ^ jnp.uint32(1 << bit)))
        share = (flipped[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(0)
        # Five standard deviations, and 0.01 for the bias that the constants are known to have.
        assert np.abs(share - 0.5).max() < 2.5 / np.sqrt(size) + 0.01, bit


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_row_bits_are_the_hash_written_by_hand(implementation):
    key = jax.random.fold_in(jax.random.key(5, impl=implementation), 11)
    words = np.asarray(jax.random.key_data(key)).reshape(-1).tolist()
    rows = [0, 1, 7, 2**31 - 1, -3]
    bits = row_bits(key, jnp.array(rows), (6,))
    assert bits.dtype == jnp.uint32
    assert bits.tolist() == [row_by_hand(words[0], words[-1], row, 6) for row in rows]


def test_golden_bits():
    """A JAX that derives other keys, or another hash, changes every dropout mask: see it."""
    bits = row_bits(jax.random.fold_in(jax.random.key(0), 1), jnp.array([3, 4]), (3,))
    assert bits.tolist() == [
        [614300534, 1708235193, 2544410259],
        [438722617, 1774921808, 1368973673],
    ]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6),
    order=st.permutations(range(6)),
    seed=UINT32,
)
def test_a_row_does_not_depend_on_its_place_or_on_the_other_rows(rows, order, seed):
    key, rows, order = jax.random.key(seed), jnp.array(rows), np.array(order)
    bits = np.asarray(row_bits(key, rows, (2, 3)))
    np.testing.assert_array_equal(row_bits(key, rows[order], (2, 3)), bits[order])
    np.testing.assert_array_equal(row_bits(key, rows[2:3], (2, 3))[0], bits[2])


def test_places_are_counted_in_row_major_order():
    key, rows = jax.random.key(1), jnp.arange(4)
    flat = row_bits(key, rows, (24,))
    np.testing.assert_array_equal(row_bits(key, rows, (2, 3, 4)).reshape(4, 24), flat)
    np.testing.assert_array_equal(row_bits(key, rows, ()), flat[:, 0])
    assert row_bits(key, rows[:0], (5,)).shape == (0, 5)


def test_the_type_of_the_row_ids_does_not_matter(x64):
    key, rows = jax.random.key(1), np.array([0, 5, 1000])
    bits = [
        row_bits(key, jnp.asarray(rows.astype(dtype)), (4,)) for dtype in (np.uint16, np.int32, np.int64)
    ]
    np.testing.assert_array_equal(bits[0], bits[1])
    np.testing.assert_array_equal(bits[0], bits[2])


def test_a_legacy_key_gives_what_its_typed_twin_gives():
    rows = jnp.arange(3)
    typed = row_bits(jax.random.key(9), rows, (4,))
    np.testing.assert_array_equal(row_bits(jax.random.PRNGKey(9), rows, (4,)), typed)


def uniform(key, num_rows, num_places):
    bits = np.asarray(row_bits(key, jnp.arange(num_rows), (num_places,)))
    return bits / 2.0**32


def largest_correlation(variables):
    """Of any two rows of `[variables, samples]`, over what chance gives at that size."""
    matrix = np.corrcoef(variables)
    return np.abs(matrix - np.eye(len(matrix))).max() * np.sqrt(variables.shape[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_bit_is_set_half_of_the_time(implementation, seed):
    key = jax.random.key(seed, impl=implementation)
    bits = np.asarray(row_bits(key, jnp.arange(128), (512,))).reshape(-1, 1)
    share = (bits >> np.arange(32, dtype=np.uint32) & 1).mean(0)
    assert np.abs(share - 0.5).max() < 2.5 / np.sqrt(len(bits))  # five standard deviations


# Of 2,000 pairs the largest correlation exceeds 5.5 / sqrt(samples) once in 13,000 times by chance.
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_and_places_are_uncorrelated(seed):
    sample = uniform(jax.random.key(seed), 64, 4096)
    assert largest_correlation(sample) < 5.5
    assert largest_correlation(uniform(jax.random.key(seed), 4096, 64).T) < 5.5
    for lag in (1, 2, 3, 32, 64, 1024):  # of a place and the one that far behind
        ahead, behind = sample[:, lag:].ravel(), sample[:, :-lag].ravel()
        assert largest_correlation(np.stack([ahead, behind])) < 5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_are_uncorrelated(implementation):
    base = jax.random.key(0, impl=implementation)
    seeds = [jax.random.key(seed, impl=implementation) for seed in range(16)]  # consecutive words
    folded = [jax.random.fold_in(base, step) for step in range(16)]
    samples = np.stack([uniform(key, 16, 512) for key in [*seeds, *folded]])
    assert largest_correlation(samples.reshape(32, -1)) < 5.5
    # Seeds that follow each other count their places from numbers that follow each other.
    for shift in (1, 2):
        pairs = [samples[:15, :, shift:].ravel(), samples[1:16, :, :-shift].ravel()]
        assert largest_correlation(np.stack(pairs)) < 5


def test_the_same_bits_eagerly_and_with_vmap():
    key, rows = jax.random.key(3), jnp.arange(100, 116)
    expected = ops.row_bits(key, rows, (3, 5))
    np.testing.assert_array_equal(row_bits(key, rows, (3, 5)), expected)
    alone = jax.jit(jax.vmap(lambda row: ops.row_bits(key, row[None], (3, 5))[0]))(rows)
    np.testing.assert_array_equal(alone, expected)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_same_bits_on_any_number_of_devices(count):
    key, rows, shape = jax.random.key(3), jnp.arange(100, 116), (3, 5)
    expected = np.asarray(row_bits(key, rows, shape))
    devices = jax.devices()[:count]
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    bits = row_bits(key, jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data"))), shape)
    assert len(bits.sharding.device_set) == count
    np.testing.assert_array_equal(bits, expected)
    mapped = jax.pmap(lambda rows: ops.row_bits(key, rows, shape), devices=devices)
    parts = np.asarray(mapped(rows.reshape(count, -1)))
    np.testing.assert_array_equal(parts.reshape(expected.shape), expected)


def test_every_element_is_hashed_alone():
    """Nothing has the size of rows x rows or places x places."""
    jaxpr = jax.make_jaxpr(lambda key, rows: ops.row_bits(key, rows, (7,)))(
        jax.random.key(0), jnp.arange(5)
    )
    assert max(v.aval.size for e in jaxpr.eqns for v in e.outvars) == 35
