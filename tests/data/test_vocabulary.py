import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import errors
from jaxnets.data.vocabulary import NGrams, Words, pad

TEXTS = ["The film is good. The END!", "a good film<br /><br />isn't it?", "bad"]


def test_words_by_frequency_then_by_letters():
    words = Words.of_texts(TEXTS, 8)
    assert words.words(range(8)) == ["<pad>", "<unk>", "film", "good", "the", "!", ".", "?"]
    assert len(words) == 8
    found = words.encode(["Film GOOD, the zebra?", "", "—"])
    assert [x.tolist() for x in found] == [[2, 3, 1, 4, 1, 7], [], [1]]
    assert found[0].dtype == np.int32


def test_words_keep_their_apostrophes_and_lose_their_tags():
    words = Words.of_texts(TEXTS, 100)
    assert words.words(words.encode(["isn't it?<br/>IT"])[0]) == ["isn't", "it", "?", "it"]


def test_names_of_special_entries_in_a_text_are_words():
    words = Words.of_texts([*TEXTS, "< pad > unk"], 100)
    for each in (words, Words.from_bytes(words.to_bytes())):
        found = each.encode(["a <pad> <unk>", "a < pad > < unk >"])
        assert found[0].tolist() == found[1].tolist()
        assert found[0].min() > 1


def test_words_are_the_same_each_time_and_from_bytes():
    words = Words.of_texts(TEXTS, 9)
    content = words.to_bytes()
    assert Words.of_texts(TEXTS, 9).to_bytes() == content
    again = Words.from_bytes(content)
    assert again.to_bytes() == content
    assert [x.tolist() for x in again.encode(TEXTS)] == [x.tolist() for x in words.encode(TEXTS)]


def test_bytes_that_are_no_vocabulary():
    with pytest.raises(errors.ConfigError, match="the vocabulary can't be read"):
        Words.from_bytes(b"{}")
    with pytest.raises(errors.ConfigError, match="the n-grams can't be read"):
        NGrams.from_bytes(b"{}\n")
    with pytest.raises(errors.ConfigError, match="at least 3 entries, not 2"):
        Words.of_texts(TEXTS, 2)
    with pytest.raises(errors.ConfigError, match="at least 2 entries, not 1"):
        NGrams.of_encoded([np.array([2])], 1, 2, 10)
    with pytest.raises(errors.ConfigError, match="too many numbers"):
        NGrams.of_encoded([np.array([2])], 10, 4, 100_000)


def runs_by_hand(text, order):
    """Each run of known words, as a tuple."""
    return {
        tuple(text[i : i + n])
        for n in range(1, order + 1)
        for i in range(len(text) - n + 1)
        if min(text[i : i + n]) > 1
    }


@given(st.lists(st.lists(st.integers(1, 6), max_size=12), min_size=1, max_size=8), st.integers(1, 3))
@settings(deadline=None, max_examples=80)
def test_runs_as_by_hand(texts, order):
    encoded = [np.array(text, np.int32) for text in texts]
    everything = set().union(*(runs_by_hand(text, order) for text in texts))
    ngrams = NGrams.of_encoded(encoded, 10_000, order, 7)
    assert len(ngrams) == len(everything) + 1
    numbers = {}
    for text, found in zip(texts, ngrams.encode(encoded), strict=True):
        runs = runs_by_hand(text, order)
        assert len(found) == len(runs) == len(set(found.tolist()))
        assert found.size == 0 or found.min() >= 1
        for run in runs:  # the same run is the same number in every text
            (number,) = NGrams.from_bytes(ngrams.to_bytes()).encode([np.array(run)])[0][-1:]
            assert numbers.setdefault(run, number) == number
            assert number in found
    assert len(set(numbers.values())) == len(numbers)


def test_runs_that_few_texts_have_are_left_out():
    texts = [np.array(text) for text in ([2, 3], [2, 4], [2, 3, 5])]
    ngrams = NGrams.of_encoded(texts, 4, 2, 6)  # 2 in three texts; 3 and 2 3 in two
    assert [x.tolist() for x in ngrams.encode(texts)] == [[1, 2, 3], [1], [1, 2, 3]]
    assert [x.tolist() for x in ngrams.encode([np.array([5, 4]), np.array([], np.int32)])] == [[], []]


def test_padding_keeps_the_part_that_is_asked_for():
    texts = [np.array([2, 3, 4], np.int32), np.array([5], np.int32), np.zeros(0, np.int32)]
    rows, sizes = pad(texts, 2)
    assert rows.tolist() == [[3, 4], [5, 0], [0, 0]]
    assert sizes.tolist() == [2, 1, 0]
    assert pad(texts, 2, keep="first")[0].tolist() == [[2, 3], [5, 0], [0, 0]]
    assert pad(texts, 4)[0].tolist() == [[2, 3, 4, 0], [5, 0, 0, 0], [0, 0, 0, 0]]
