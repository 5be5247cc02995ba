import numpy as np
import pytest

from jaxnets.report import draw_alignment


def test_a_picture_of_what_was_looked_at(tmp_path):
    weights = np.random.default_rng(0).dirichlet(np.ones(4), 3)
    source, target = ["Der", " Hund", " $x_1$", "</s>"], ["the", " dog", "</s>"]
    for name, drawn in (("a.png", weights), ("b.png", weights[:, ::-1])):
        (tmp_path / name).write_bytes(draw_alignment(drawn, source, target))
    pictures = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]


def test_other_numbers_of_tokens():
    with pytest.raises(ValueError, match=r"weights \(3, 4\) for 2 tokens that look at 4"):
        draw_alignment(np.zeros((3, 4)), ["a"] * 4, ["b"] * 2)
