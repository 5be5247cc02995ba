import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import errors
from jaxnets.data.phrases import load_phrases
from jaxnets.data.subwords import BEGIN, END, PAD, Subwords, encode_all
from jaxnets.data.vocabulary import pad

pytest.importorskip("tokenizers")
TEXTS = load_phrases().parts["train"].source[:500]
SUBWORDS = Subwords.learn(TEXTS, 400)
LOWER = Subwords.learn(TEXTS, 400, lowercase=True)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30))
@settings(deadline=None, max_examples=100)
def test_any_text_comes_back(text):
    if not text.strip():
        return
    tokens = SUBWORDS.encode(text)
    assert tokens[-1] == END
    assert min(tokens[:-1]) > max(PAD, BEGIN, END)
    assert max(tokens) < len(SUBWORDS)
    assert SUBWORDS.decode(tokens) == unicodedata.normalize("NFC", text).strip()


def test_no_text_is_a_special_token():
    for text in ("<s>", "</s>", "<pad>", "[UNK]"):
        assert set(SUBWORDS.encode(text)[:-1]).isdisjoint({PAD, BEGIN, END})


def test_common_words_are_whole_and_unknown_ones_are_bytes():
    assert SUBWORDS.pieces(SUBWORDS.encode("Der Hund")) == ["Der", " Hund", "</s>"] or SUBWORDS.pieces(
        SUBWORDS.encode("Der Hund")
    ) == [" Der", " Hund", "</s>"]
    assert len(SUBWORDS.encode("日本")) > 6
    assert SUBWORDS.decode(SUBWORDS.encode("日本")) == "日本"


def test_characters_that_no_subword_holds():
    assert LOWER.unlearnt("мир, schläft der\u00a0Hund?") == set("мир")
    assert LOWER.unlearnt(unicodedata.normalize("NFD", "DIE KATZE SCHLÄFT")) == set()


def test_lowercase():
    assert LOWER.decode(LOWER.encode("Die KATZE Übt.")) == "die katze übt."
    assert LOWER.encode("DER HUND") == LOWER.encode("der hund")


def test_the_end_ends_and_padding_is_nothing():
    tokens = SUBWORDS.encode("Der Hund")
    more = [BEGIN, *tokens, *SUBWORDS.encode("Die Katze"), PAD]
    assert SUBWORDS.decode(more) == "Der Hund"
    assert SUBWORDS.decode([PAD, *tokens]) == "Der Hund"
    assert SUBWORDS.decode([END]) == ""


def test_it_is_learnt_from_the_text_alone_and_kept():
    again = Subwords(SUBWORDS.to_bytes())
    assert again.to_bytes() == SUBWORDS.to_bytes()
    assert again.encode(TEXTS[3]) == SUBWORDS.encode(TEXTS[3])
    assert Subwords.learn(TEXTS, 400).to_bytes() == SUBWORDS.to_bytes()
    assert Subwords.learn(TEXTS[:100], 400).to_bytes() != SUBWORDS.to_bytes()


def test_what_cannot_be():
    for text in ("", " \n\t"):
        with pytest.raises(errors.DataError, match="an empty text"):
            SUBWORDS.encode(text)
    with pytest.raises(errors.DataError, match=r"some\.txt, line 2: an empty text"):
        encode_all(SUBWORDS, ["a", " "], "some.txt")
    with pytest.raises(errors.ConfigError, match="at least 259 tokens, not 100"):
        Subwords.learn(TEXTS, 100)
    for content in (b"{}", b"no json"):
        with pytest.raises(errors.ConfigError, match="no vocabulary of subwords"):
            Subwords(content)


def test_rows_are_filled_up_or_cut():
    rows, _ = pad([[5, 6, 2], [7, 8, 9, 10, 2]], 4, keep="first")
    assert rows.dtype == np.int32
    assert rows.tolist() == [[5, 6, 2, PAD], [7, 8, 9, 10]]
