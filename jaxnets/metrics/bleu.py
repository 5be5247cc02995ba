"""BLEU (Papineni et al. 2002), as sacrebleu computes it (Post 2018, arXiv 1804.08771), on the host."""

import dataclasses
from collections.abc import Sequence
from itertools import compress

from jaxnets import errors


@dataclasses.dataclass(frozen=True)
class BLEU:
    """The counts that corpus BLEU follows from; adding two of them merges them exactly.

    Tokens are those of mteval-v13a, precisions of 0 are smoothed as there ("exp"), there is one
    reference for each sentence, and nothing else is to be tokenised before: hypotheses and references
    are plain text. Other settings give other numbers, so `signature` belongs beside each.

    Attributes:
        matches: n-grams that are in the reference, for n from 1 to 4.
        totals: n-grams that there are.
        hypothesis_length: in tokens.
        reference_length: in tokens.
        lowercase: whether capital letters count as small ones.
    """

    matches: tuple[int, ...] = (0, 0, 0, 0)
    totals: tuple[int, ...] = (0, 0, 0, 0)
    hypothesis_length: int = 0
    reference_length: int = 0
    lowercase: bool = False

    @classmethod
    def of(
        cls,
        hypotheses: Sequence[str],
        references: Sequence[str],
        *,
        mask: Sequence[bool] | None = None,
        lowercase: bool = False,
    ) -> "BLEU":
        """Count.

        Args:
            hypotheses: M sentences.
            references: a translation of each.
            mask: M booleans, false for sentences that don't count, such as padding; all do by default.
            lowercase: whether capital letters count as small ones.

        Raises:
            ValueError: if there aren't as many of each.
            ConfigError: if sacrebleu isn't installed.

        Example:
            >>> count = BLEU.of(["the cat sat on the mat ."], ["the cat is on the mat ."])
            >>> round((count + BLEU.of(["a dog ."], ["a dog ."])).compute(), 2)
            53.9
        """
        if len(hypotheses) != len(references):
            raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
        if mask is not None:
            if len(mask) != len(hypotheses):
                raise ValueError(f"a mask of {len(mask)} for {len(hypotheses)} sentences")
            hypotheses, references = (list(compress(x, mask)) for x in (hypotheses, references))
        if not hypotheses:
            return cls(lowercase=lowercase)
        score = _library()(lowercase=lowercase).corpus_score(list(hypotheses), [list(references)])
        return cls(
            tuple(score.counts), tuple(score.totals), score.sys_len, score.ref_len, lowercase=lowercase
        )

    def __add__(self, other: "BLEU") -> "BLEU":
        if self.lowercase != other.lowercase:
            raise ValueError("counts with and without capital letters can't be merged")

        def add(ours: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(a + b for a, b in zip(ours, theirs, strict=True))

        return BLEU(
            add(self.matches, other.matches),
            add(self.totals, other.totals),
            self.hypothesis_length + other.hypothesis_length,
            self.reference_length + other.reference_length,
            self.lowercase,
        )

    def compute(self) -> float:
        """BLEU, from 0 to 100."""
        score = _library().compute_bleu(
            list(self.matches),
            list(self.totals),
            self.hypothesis_length,
            self.reference_length,
            smooth_method="exp",
        )
        return score.score

    @property
    def signature(self) -> str:
        """How it was computed, in sacrebleu's form."""
        scorer = _library()(lowercase=self.lowercase)
        scorer.corpus_score(["a"], [["a"]])  # the number of references is known after a score
        return str(scorer.get_signature())


def _library():
    try:
        from sacrebleu.metrics.bleu import BLEU as SacreBLEU
    except ImportError as error:
        raise errors.ConfigError(
            "BLEU needs the library sacrebleu, which isn't installed: pip install 'jaxnets[text]'"
        ) from error
    return SacreBLEU
