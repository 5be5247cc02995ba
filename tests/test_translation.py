"""A translator of a trained run, and the experiment's commands on the corpus that is made here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import multi30k
from jaxnets import cli, errors, translation
from jaxnets.config import RunOptions
from jaxnets.data.subwords import END, Subwords
from jaxnets.models import Transformer
from jaxnets.translation import Translator, best_hypotheses
from tests.models.tiny_translation import draw

pytest.importorskip("tokenizers")
TEXTS = [
    "Der Hund sieht den Ball.",
    "Ein Kind kann das Buch halten.",
    "Die Katze mag eine Blume im Park.",
]
SUBWORDS = Subwords.learn(TEXTS, 290)


@pytest.fixture(scope="module")
def translator():
    model = Transformer(len(SUBWORDS), num_layers=1, width=8, num_heads=2, hidden=8, max_length=64)
    example = {side: jnp.zeros((1, 2), jnp.int32) for side in ("source", "target")}
    params = draw(jax.eval_shape(model.init, jax.random.key(0), example)["params"], seed=5)
    return Translator(model, params, SUBWORDS, max_length=32, num_beams=2)


def test_a_sentence_is_translated_alike_alone_and_among_others(translator):
    together = translator.translate([*TEXTS, TEXTS[0]])
    assert together[0] == together[3]
    assert len(set(together)) > 1
    for text, expected in zip(TEXTS, together, strict=False):
        assert translator.translate([text]) == [expected]


def test_more_than_a_batch_of_sentences(translator, monkeypatch):
    expected = translator.translate(TEXTS)
    monkeypatch.setattr(translation, "_ROWS", 2)
    assert translator.translate([*TEXTS, *TEXTS]) == [*expected, *expected]


def test_hypotheses_end_with_their_row(translator):
    source = np.full((2, 16), 7)
    tokens = best_hypotheses(
        translator.model, translator.params, source, jnp.array([1, 16]), num_beams=1, length_penalty=0.0
    )
    assert tokens.shape == (2, 16 * 3 // 2 + 8)
    assert (tokens[0, 1 * 3 // 2 + 8 :] == END).all()


def test_what_it_looks_at(translator):
    hypothesis = translator.subwords.encode("ein Hund")
    weights, source, said = translator.alignment(TEXTS[0], hypothesis)
    assert weights.shape == (len(said), len(source))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert "".join(source).strip() == f"{TEXTS[0]}</s>"
    assert "".join(said).strip() == "ein Hund</s>"
    assert translator.alignment(TEXTS[0], [END])[2] == ["</s>"]
    # Bytes that are no text: encoded again they would be three times as many.
    broken = [translator.subwords.encode("é")[0]] * 30
    assert translator.alignment(TEXTS[0], broken)[0].shape[0] == 30


def test_texts_that_can_not_be(translator):
    with pytest.raises(errors.DataError, match=r"^text 2: an empty text can't be encoded"):
        translator.translate(["gut", " "])
    with pytest.raises(errors.DataError, match=r"^text 1: 41 tokens; this model takes at most 32"):
        translator.translate(["日" * 13])
    with pytest.raises(errors.DataError, match=r"^a\.txt, line 1: 41 tokens"):
        translator.translate(["日" * 13], places=["a.txt, line 1"])


def test_a_vocabulary_that_is_not_the_models(translator):
    other = Subwords.learn(TEXTS, 280)
    with pytest.raises(errors.ConfigError, match=rf"has 280 subwords and the model {len(SUBWORDS)}"):
        Translator(translator.model, translator.params, other, max_length=32)


FLAGS = [
    "--steps",
    "3",
    "--batch-size",
    "8",
    "--vocabulary-size",
    "300",
    "--width",
    "8",
    "--hidden",
    "8",
]


@pytest.fixture(
    scope="module", params=["transformer", pytest.param("attention_rnn", marks=pytest.mark.long)]
)
def run_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    words = [
        "--run-dir",
        str(folder),
        "--model",
        request.param,
        "--num-layers",
        "1",
        "--no-cache-programs",
    ]
    assert cli.main(multi30k.EXPERIMENT, ["train", *words, *FLAGS]) == 0
    return folder


def command(run_dir, *words):
    return cli.main(multi30k.EXPERIMENT, [words[0], "--run-dir", str(run_dir), *words[1:]])


def test_train_translate_and_score(run_dir, tmp_path, capsys):
    result = json.loads((run_dir / "result.json").read_text())
    assert 0 < result["eval"]["loss"] < 10
    assert command(run_dir, "translate", "Der Hund.", "Die Katze.", "--num-beams", "2") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "attention.png" in err
    assert (run_dir / "attention.png").stat().st_size > 1000
    (tmp_path / "in.txt").write_text("Der Hund.\nDie Katze.\n")
    words = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
    assert command(run_dir, "predict", *words, "--num-beams", "2") == 0
    assert (tmp_path / "out.txt").read_text() == out
    capsys.readouterr()
    assert command(run_dir, "score", "--part", "val", "--num-beams", "1") == 0
    score = json.loads(capsys.readouterr().out)
    assert score["sentences"] == 200
    assert score["step"] == 3
    assert 0 <= score["bleu"] < 30
    assert "case:lc" in score["signature"]
    assert json.loads((run_dir / "val.score.json").read_text()) == score
    assert len((run_dir / "val.hypotheses.txt").read_text().splitlines()) == 200


@pytest.mark.filterwarnings("default:.*no subword of this model holds")
def test_characters_that_no_subword_holds_are_named(run_dir, capsys):
    words = ["translate", "Der Hund.", "мир", "日\u202e", "--num-beams", "1"]
    assert command(run_dir, *words) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert "text 2 and 1 more: no subword of this model holds и м р U+202E 日: the" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["translate"], "give either texts"),
        (["translate", "gut", "--input", "x"], "give either texts"),
        (["translate", ""], "text 1 is empty"),
        (["translate", "gut \udcff"], "not UTF-8"),
        (["translate", "日" * 20], "62 tokens; this model takes at most 48"),
        (["translate", "gut", "--num-beams", "0"], "at least 1 beam"),
        (["translate", "--input", "nothing.txt"], "can't be read"),
        (["score", "--part", "tset"], "did you mean 'test'"),
    ],
)
def test_a_mistake_is_one_line(run_dir, words, expected, capsys):
    assert command(run_dir, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert len(err.splitlines()) == 1


def test_another_vocabulary_in_the_folder(run_dir, capsys):
    path = run_dir / "assets" / translation.SUBWORDS
    kept = path.read_bytes()
    try:
        path.write_bytes(SUBWORDS.to_bytes())
        assert command(run_dir, "translate", "gut") == 2
        assert "is not the one that the run was trained with" in capsys.readouterr().err
    finally:
        path.write_bytes(kept)


def test_pairs_that_are_too_long_are_counted(tmp_path):
    """Left out of training, cut in validation."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for part, lengths in (("train", (3, 90, 2, 5)), ("val", (90, 2)), ("test", (1,))):
        for language in ("de", "en"):
            (folder / f"{part}.{language}").write_text("".join("a b " * n + "\n" for n in lengths))
    config = multi30k.Config(dataset="mine", max_length=20, batch_size=2, vocabulary_size=256 + 8)
    with pytest.warns(UserWarning, match="pairs") as said:
        recipe = multi30k.make_recipe(config, RunOptions(data_dir=tmp_path))
    first, second = (str(warning.message) for warning in said)
    assert first.startswith("1 of 4 pairs are left out of training: a side has more than 20 tokens")
    assert second.startswith("1 of 2 pairs in validation are cut")
    assert (len(recipe.train["source"]), len(recipe.test["source"])) == (3, 2)
    assert recipe.test["source"].shape[1] == 20


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--label-smoothing", "2"], "label smoothing lies in"),
        (["--max-length", "3"], "no pair of sentences has at most 3 tokens"),
        (["--dataset", "nothing"], "nothing"),
        (["--model", "transformr"], "did you mean 'transformer'"),
        (["--dtype", "float15"], "did you mean"),
        (["--num-heads", "3"], "a width of 64 doesn't split into 3 heads"),
        (["--hidden", "0"], "hidden must be at least 1, not 0"),
        (["--num-layers", "-1"], "num_layers must be at least 1, not -1"),
        (["--dropout", "1.5"], "dropout lies in [0, 1), not 1.5"),
    ],
)
def test_a_config_that_can_not_be(flags, expected, tmp_path, capsys):
    words = ["train", "--run-dir", str(tmp_path / "run"), "--data-dir", str(tmp_path), *flags]
    assert cli.main(multi30k.EXPERIMENT, words) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
