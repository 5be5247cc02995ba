import itertools

import numpy as np
import pytest

from jaxnets.metrics import BLEU

sacrebleu = pytest.importorskip("sacrebleu")
WORDS = ["a", "dog", "Dog", "runs", "in", "the", "park", ".", ",", "it's", "3.5", "well-known"]


def sentences(seed, count=40):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(count)]


def pairs(seed=0):
    references = sentences(seed)
    rng = np.random.default_rng(seed + 1)
    hypotheses = [
        " ".join(rng.choice(WORDS) if rng.random() < 0.3 else word for word in text.split())
        for text in references
    ]
    return hypotheses, references


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_sacrebleu_over_any_split(lowercase, seed):
    hypotheses, references = pairs(seed)
    expected = sacrebleu.corpus_bleu(hypotheses, [references], lowercase=lowercase).score
    assert 5 < expected < 95
    rng = np.random.default_rng(seed)
    for _ in range(5):
        cuts = [0, *sorted(rng.integers(0, len(references), 3)), len(references)]
        total = BLEU(lowercase=lowercase)
        for a, b in itertools.pairwise(cuts):
            total = total + BLEU.of(hypotheses[a:b], references[a:b], lowercase=lowercase)
        assert total.compute() == pytest.approx(expected, abs=1e-9)


def test_extremes():
    _, references = pairs()
    assert BLEU.of(references, references).compute() == pytest.approx(100)
    assert BLEU.of([""] * len(references), references).compute() == 0
    assert BLEU().compute() == 0
    few = BLEU.of(["dog park"], ["dog park"])  # no 3-grams
    assert few.compute() == pytest.approx(sacrebleu.corpus_bleu(["dog park"], [["dog park"]]).score)
    short = BLEU.of(["a dog runs in"], ["a dog runs in the park ."])
    assert short.compute() == pytest.approx(100 * np.exp(1 - 7 / 4))


def test_what_is_masked_does_not_count():
    hypotheses, references = pairs()
    mask = np.random.default_rng(0).random(len(references)) < 0.6
    kept = [
        [text for text, counts in zip(texts, mask, strict=True) if counts]
        for texts in (hypotheses, references)
    ]
    assert BLEU.of(hypotheses, references, mask=mask) == BLEU.of(*kept)
    assert BLEU.of(hypotheses, references, mask=[False] * len(references)) == BLEU()
    with pytest.raises(ValueError, match="a mask of 2 for 40 sentences"):
        BLEU.of(hypotheses, references, mask=[True, False])


def test_capital_letters():
    assert BLEU.of(["A DOG RUNS IN THE PARK"], ["a dog runs in the park"]).compute() < 5
    lower = BLEU.of(["A DOG RUNS IN THE PARK"], ["a dog runs in the park"], lowercase=True)
    assert lower.compute() == pytest.approx(100)
    assert lower.signature.startswith("nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|version:")
    assert "case:mixed" in BLEU().signature


def test_what_cannot_be():
    with pytest.raises(ValueError, match="1 hypotheses for 2 references"):
        BLEU.of(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="can't be merged"):
        BLEU() + BLEU(lowercase=True)
