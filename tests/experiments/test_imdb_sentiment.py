import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from experiments import imdb_sentiment
from jaxnets import cli, models, train
from jaxnets.models.text_classifier import sharding_rules
from jaxnets.train.mesh import make_mesh

SMALL = ["--width", "8", "--hidden", "8", "--max-length", "40", "--buckets", "20", "--batch-size", "64"]


def run(*words):
    return cli.main(imdb_sentiment.EXPERIMENT, list(words))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imdb") / "run"
    words = ["--model", "weighted_naive_bayes", "--ngrams", "3", "--max-length", "200", "--epochs", "3"]
    words += ["--learning-rate", "0.01", "--run-dir", str(folder)]
    assert run("train", *words) == 0
    return folder


def test_it_learns_and_says_what_a_text_is(trained, capsys):
    result = json.loads((trained / "result.json").read_text())
    assert result["eval"]["accuracy"] > 0.9
    assert run("predict", "The plot is brilliant.", "what a dull ending", "--run-dir", str(trained)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["pos", "neg"]
    assert all(0.5 < float(line.split()[1]) <= 1 for line in lines)


def test_texts_from_a_file_to_a_file(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "in.txt").write_text("the cast is wonderful\nthe script is clumsy\nwhat a dull ending\n")
    words = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.csv")]
    monkeypatch.setattr(imdb_sentiment, "_TOGETHER", 2)  # so that the last part is filled up
    capsys.readouterr()
    assert run("predict", *words, "--run-dir", str(trained), "--checkpoint", "best") == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == ["pos", "neg", "neg"]
    assert capsys.readouterr().out == f"3 predictions in {tmp_path / 'out.csv'}\n"
    assert run("predict", "what a dull ending", "--run-dir", str(trained), "--checkpoint", "best") == 0
    assert rows[2]["probability"] == capsys.readouterr().out.split()[1]
    assert rows[1]["text"] == "the script is clumsy"


def test_words_that_nobody_knows(trained, capsys):
    assert run("predict", "xyzzy plugh", "--run-dir", str(trained)) == 0
    printed = capsys.readouterr()
    assert "warning: text 1 has no word that is known" in printed.err
    assert float(printed.out.split()[1]) == pytest.approx(0.5, abs=0.1)


def test_a_long_text_is_cut_and_that_is_said(trained, capsys):
    assert run("predict", "the plot is dull " * 99, "--run-dir", str(trained)) == 0
    assert "warning" not in capsys.readouterr().err  # the same runs of words again and again
    made = imdb_sentiment.texts.load_made_reviews()
    long = " ".join(made.train[:100])
    assert run("predict", long, "--run-dir", str(trained)) == 0
    printed = capsys.readouterr()
    assert "runs of words, of which 200 count" in printed.err
    assert len(printed.out.splitlines()[0]) < 110


def test_a_carriage_return_splits_no_row(trained, tmp_path):
    out = tmp_path / "out.csv"
    (tmp_path / "kept.csv").write_text("old")
    out.symlink_to(tmp_path / "kept.csv")
    texts = ["good film\rreally", "a dull ending\r", "last"]
    assert run("predict", *texts, "--output", str(out), "--run-dir", str(trained)) == 0
    with out.open(newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == texts
    assert out.is_symlink()


def test_probabilities_of_a_bfloat16_run_have_their_digits(tmp_path, capsys):
    place = ["--run-dir", str(tmp_path / "r")]
    assert run("train", *place, *SMALL, "--no-pictures", "--dtype", "bfloat16", "--steps", "20") == 0
    capsys.readouterr()
    texts = ["The plot is brilliant.", "what a dull ending", "the cast is wonderful", "a clumsy script"]
    assert run("predict", *texts, *place) == 0
    steps = [float(line.split()[1]) * 256 for line in capsys.readouterr().out.splitlines()]
    assert max(abs(step - round(step)) for step in steps) > 0.05  # bfloat16 has no number in between


def test_a_text_without_blanks_is_shown(trained, capsys):
    assert run("predict", "好" * 100, "--run-dir", str(trained)) == 0
    assert "好" * 76 + " ..." in capsys.readouterr().out


def test_other_labels_are_not_gone_on_with(tmp_path, capsys, monkeypatch):
    place = ["--run-dir", str(tmp_path / "r"), "--no-pictures", *SMALL]
    assert run("train", *place, "--steps", "2") == 0
    load = imdb_sentiment.texts.load_texts

    def changed(*words, **options):
        found = load(*words, **options)
        object.__setattr__(found, "train_label", 1 - found.train_label)
        return found

    monkeypatch.setattr(imdb_sentiment.texts, "load_texts", changed)
    capsys.readouterr()
    assert "was begun with other data: train had" in refusal(capsys, "train", *place, "--steps", "4")
    assert run("train", *place, "--steps", "4", "--allow-change") == 0


@pytest.mark.parametrize("flag", ["--width", "--hidden", "--num-layers"])
def test_sizes_that_cannot_be(flag, tmp_path, capsys):
    found = refusal(capsys, "train", flag, "0", "--run-dir", str(tmp_path / "r"))
    assert found.endswith(f"{flag[2:].replace('-', '_')} must be at least 1, not 0")


def refusal(capsys, *words):
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_what_is_refused(trained, tmp_path, capsys, monkeypatch):
    place = ["--run-dir", str(trained)]
    assert "give either texts" in refusal(capsys, "predict", *place)
    assert "text 2 is empty" in refusal(capsys, "predict", "good", " ", *place)
    assert "text 1 on the command line is not UTF-8" in refusal(capsys, "predict", "\udcff", *place)
    found = refusal(capsys, "predict", "good", "--output", "no/such/file", *place)
    assert "no/such/file can't be written: there is no folder no/such" in found
    os.mkfifo(tmp_path / "pipe")
    found = refusal(capsys, "predict", "good", "--output", str(tmp_path / "pipe"), *place)
    assert "pipe is no regular file" in found
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
    found = refusal(capsys, "predict", "--input", str(tmp_path / "bad.txt"), *place)
    assert found.endswith("bad.txt, line 2: not UTF-8 (byte 0xff at 0)")
    assert "is not the folder of a run" in refusal(capsys, "predict", "a", "--run-dir", str(tmp_path))
    (tmp_path / "texts.txt").write_text("fine\n")
    same = ["--input", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "texts.txt")]
    assert "is the file of --input" in refusal(capsys, "predict", *same, *place)
    assert "leave it out" in refusal(capsys, "predict", "good", "--output", "-", *place)
    monkeypatch.chdir(tmp_path)
    found = refusal(capsys, "predict", "a", "--preset", "better")
    assert "there is no run in runs/imdb_sentiment-better yet: first python -m" in found
    assert found.endswith("train --preset better, or name one by --run-dir")
    assert "unknown flag '--inptu'" in refusal(capsys, "predict", "a", "--inptu", "x")
    assert "unknown command 'predcit'" in refusal(capsys, "predcit", "a")


def test_a_vocabulary_that_is_not_the_models(trained, capsys):
    path = trained / "assets" / "words.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"plot", b"plod"))
    try:
        found = refusal(capsys, "predict", "a film", "--run-dir", str(trained))
        assert found.endswith("words.json is not the one that the run was trained with")
    finally:
        path.write_bytes(content)


def test_a_run_goes_on_only_with_its_own_vocabulary(tmp_path, capsys, monkeypatch):
    place = ["--run-dir", str(tmp_path / "r"), "--no-pictures", *SMALL]
    assert run("train", *place, "--steps", "2") == 0
    assert run("train", *place, "--steps", "3") == 0
    load = imdb_sentiment.texts.load_texts

    def changed(*words, **options):
        found = load(*words, **options)
        object.__setattr__(found, "train", [text.replace("plot", "story") for text in found.train])
        return found

    monkeypatch.setattr(imdb_sentiment.texts, "load_texts", changed)
    capsys.readouterr()
    assert "was trained with another words.json" in refusal(capsys, "train", *place, "--steps", "4")


def test_a_vocabulary_that_does_not_split_stays_whole():
    """44 words over eight devices; a vocabulary that does split is cut."""
    for size, spec in ((44, P(None, "fsdp")), (48, P("tensor", "fsdp"))):
        model = models.lstm_classifier(size, width=8, hidden=8)
        init_fn, _ = models.functional(model, jax.ShapeDtypeStruct((1, 3), jnp.int32))
        params, _ = jax.eval_shape(init_fn, jax.random.key(0))
        mesh = make_mesh(sizes={"tensor": 8})
        found = train.shard_by_rules(params, sharding_rules(size), mesh)
        assert found["embedding"]["embedding"].spec == spec


def test_texts_through_a_pipe(trained):
    words = ["predict", "--input", "-", "--run-dir", str(trained)]
    command = [sys.executable, "-m", "experiments.imdb_sentiment", *words]
    found = subprocess.run(command, input="what a dull ending\n", capture_output=True, text=True)
    assert (found.returncode, found.stdout.split()[0]) == (0, "neg"), found.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="how it is seen is Linux's")
def test_a_command_ends_at_once_on_ctrl_c(trained):
    """By the signal itself: an exception could be lost in JAX, or crash it."""
    script = """
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells' background jobs ignore it
        from experiments import imdb_sentiment
        from jaxnets import cli
        cli.main(imdb_sentiment.EXPERIMENT)
    """
    words = ["predict", "--input", "-", "--run-dir", str(trained)]
    command = [sys.executable, "-c", textwrap.dedent(script), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:

        def handles():
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            (mask,) = (line.split()[1] for line in lines if line.startswith("SigCgt"))
            return bool(int(mask, 16) & 1 << signal.SIGINT - 1)

        for is_python_up in (True, False):
            while handles() != is_python_up:
                time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT
        assert process.stderr.read() == b""


def test_help_names_the_command(capsys):
    assert run("--help") == 0
    assert "predict  say of texts what class they are of" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("predict", "--help")
    printed = capsys.readouterr().out
    assert "TEXT" in printed
    assert "--checkpoint" in printed
    assert "--input" in printed
    assert "--preset NAME takes that preset's run (tutorial, better)" in " ".join(printed.split())
