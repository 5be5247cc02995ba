import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import errors
from jaxnets.data import decode, decode_stream, make_tokenizer, read_tokenizer, text_tokens
from jaxnets.data.sonnets import SONNETS

TRAIN = SONNETS[:5000]


def pairs(size=300):
    pytest.importorskip("tokenizers")
    return make_tokenizer("bpe", SONNETS, train=TRAIN, size=size)


@given(st.text(min_size=1, max_size=50))
@settings(deadline=None, max_examples=60)
def test_characters_come_back(text):
    tokenizer = make_tokenizer("characters", text, train=text, size=0)
    tokens = tokenizer.encode(text)
    assert tokenizer.size == len(set(text)) == len(np.unique(tokens))
    assert decode(tokenizer, tokens) == text
    again = read_tokenizer(tokenizer.to_bytes())
    assert again.encode(text).tolist() == tokens.tolist()
    assert again == tokenizer


def test_characters_are_numbered_in_their_order():
    tokenizer = text_tokens.Characters.of("banana")
    assert tokenizer.characters == "abn"
    assert tokenizer.encode("nab").tolist() == [2, 0, 1]
    assert tokenizer.encode("nab").dtype == np.uint8
    many = text_tokens.Characters("".join(map(chr, range(500, 800))))
    assert many.encode(chr(799)).tolist() == [299]


def test_a_character_that_is_not_in_the_vocabulary():
    with pytest.raises(errors.DataError, match="line 2: '€' is none of the vocabulary's 4 characters"):
        text_tokens.Characters("\nabc").encode("ab\nc€")


@pytest.fixture(scope="module")
def bpe():
    return pairs()


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=100)
def test_byte_pairs_write_any_text(bpe, text):
    tokens = bpe.encode(text)
    assert decode(bpe, tokens) == text
    assert b"".join(bpe.token_bytes(int(token)) for token in tokens) == text.encode()
    assert "".join(decode_stream(bpe, tokens)) == text


def test_byte_pairs_are_of_the_training_part(bpe):
    assert bpe.size == 300
    assert len(bpe.encode(TRAIN)) < 0.75 * len(TRAIN)
    assert bpe.encode("x").dtype == np.uint16
    again = read_tokenizer(bpe.to_bytes())
    assert again.encode(SONNETS).tolist() == bpe.encode(SONNETS).tolist()
    assert pairs().to_bytes() == bpe.to_bytes()


def test_a_character_is_written_once_it_is_whole(bpe):
    tokens = bpe.encode("a€😀")  # bytes that were never seen together: 1 + 3 + 4
    assert len(tokens) == 8
    assert list(decode_stream(bpe, tokens)) == ["a", "", "", "€", "", "", "", "😀", ""]
    assert decode(bpe, tokens[:-1]) == "a€\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "vocabulary",
    [b"", b"[]", b"\xff", b"{}", json.dumps({"characters": "aa"}).encode(), b'{"characters": ""}'],
)
def test_what_is_no_vocabulary(vocabulary):
    pytest.importorskip("tokenizers")
    with pytest.raises(errors.DataError, match="vocabulary"):
        read_tokenizer(vocabulary)


def test_what_cannot_be(monkeypatch):
    with pytest.raises(errors.ConfigError, match="unknown kind of token 'character': did you mean"):
        make_tokenizer("character", "a", train="a", size=300)
    with pytest.raises(errors.ConfigError, match="256 to 65,536 tokens, not 255"):
        make_tokenizer("bpe", "a", train="a", size=255)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(errors.ConfigError, match=r"pip install 'jaxnets\[text\]'"):
        make_tokenizer("bpe", "a", train="a", size=300)
