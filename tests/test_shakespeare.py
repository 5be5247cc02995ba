"""The language model's experiment as a user runs it: trained, gone on with, and asked to write."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import shakespeare
from experiments.shakespeare import Config, make_recipe
from jaxnets import cli, data, errors, models, writing
from jaxnets.config import RunOptions
from jaxnets.train import hooks

SMALL = Config(context=16, num_layers=1, num_heads=2, width=16, steps=6, batch_size=8)
WORDS = [
    *("--context", "16", "--num-layers", "1", "--num-heads", "2", "--width", "16", "--steps", "6"),
    *("--batch-size", "8", "--log-every", "1", "--checkpoint-every", "2"),
]


def command(name, folder, *words):
    return cli.main(shakespeare.EXPERIMENT, [name, *words, "--run-dir", str(folder)])


def train(folder, *words):
    return command("train", folder, *WORDS, "--num-devices", "1", *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shakespeare") / "run"
    assert train(folder, "--dropout-rate", "0.1") == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_epochs_count_where_steps_are_only_a_default(tmp_path, monkeypatch):
    """Of the experiment; both given, the steps do."""
    seen = []

    def noted(config, options):
        seen.append((config.epochs, config.steps))
        raise errors.ConfigError("enough")

    experiment = dataclasses.replace(shakespeare.EXPERIMENT, make_recipe=noted)
    for words in ([], ["--epochs", "2"], ["--epochs=2"], ["--epochs", "2", "--steps", "5"]):
        assert cli.main(experiment, ["train", *words, "--run-dir", str(tmp_path)]) == 2
    assert seen == [(1.0, 300), (2.0, None), (2.0, None), (2.0, 5)]


def test_a_run_goes_on_exactly(trained, tmp_path, monkeypatch, capsys):
    def interrupt(self, step, state, metrics):
        if step == 5:
            raise KeyboardInterrupt

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(hooks.ShowProgress, "__call__", interrupt)
        assert train(broken, "--dropout-rate", "0.1") == 130
    assert train(broken, "--dropout-rate", "0.1") == 0
    assert "resuming at step 4 of 6" in capsys.readouterr().err
    assert (broken / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_every_token_of_the_validation_part_counts_once(trained):
    """By the command that judges texts, whose mean is over the same tokens."""
    evaluated = result(trained)["eval"]
    _, text = data.load_text("sonnets").split()
    vocabulary = data.read_tokenizer((trained / "assets" / writing.VOCABULARY).read_bytes())
    model = shakespeare.make_model(SMALL, vocabulary.size)
    saved = _saved(trained)
    writer = writing.Writer(model, saved.model[1], vocabulary)
    (judged,) = writer.judge([text], ["the text"])
    assert judged["tokens"] == len(text)
    assert judged["loss"] == pytest.approx(evaluated["loss"], rel=1e-5)
    assert evaluated["perplexity"] == pytest.approx(math.exp(evaluated["loss"]), rel=1e-6)
    assert evaluated["count"] == -(-(len(text) - 1) // 16)


def _saved(folder):
    from jaxnets.commands import SavedOptions, SavedRun

    return SavedRun(folder, SMALL, SavedOptions())


@pytest.mark.parametrize(
    "words",
    [
        ("--strategy", "fsdp"),
        ("--strategy", "pmap"),
        ("--strategy", "tensor", "--num-devices", "2"),  # as many as there are heads
        ("--fixed-order", "8"),
    ],
)
@pytest.mark.long
def test_any_strategy_gives_the_same(trained, tmp_path, words):
    folder = tmp_path / "run"
    assert command("train", folder, *WORDS, "--dropout-rate", "0.1", *words) == 0
    ours, theirs = (result(each)["eval"]["loss"] for each in (folder, trained))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.long
def test_byte_pairs_rotary_positions_and_a_stream(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    words = ("--tokens", "bpe", "--vocabulary-size", "300", "--positions", "rotary", "--stream")
    assert train(tmp_path / "run", *words, "--attention-chunk", "5", "--loss-chunk", "7") == 0
    capsys.readouterr()
    assert command("generate", tmp_path / "run", "When é", "--num-tokens", "20") == 0
    assert capsys.readouterr().out.startswith("When é")


def losses_of(**fields):
    recipe = make_recipe(dataclasses.replace(SMALL, **fields), RunOptions())
    tokens = np.asarray(recipe.train["tokens"][:4])
    batch = {"tokens": tokens, "index": np.arange(4), "mask": np.ones(4, bool)}

    @jax.jit
    def run(key):
        params, state = recipe.init_fn(key)

        def loss(params):
            return jnp.mean(recipe.loss_fn(params, state, batch, key=key)[0]["loss"])

        return jax.value_and_grad(loss)(params), recipe.predict_fn(params, state, batch)

    return run(jax.random.key(0))


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_chunk": 5, "attention_chunk": 3, "remat": "dots"},
        pytest.param({"loss_chunk": 16, "tie_embeddings": False}, marks=pytest.mark.long),
    ],
)
def test_less_memory_computes_the_same(fields, x64):
    kept = {"tie_embeddings": fields.get("tie_embeddings", True)}
    expected, found = losses_of(**kept), losses_of(**fields)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), found, expected)


def test_the_presets_are_nanogpts():
    cpu, larger = (shakespeare.EXPERIMENT.presets[name] for name in ("nanogpt-cpu", "nanogpt"))
    sizes = [
        (c.num_layers, c.num_heads, c.width, c.context, c.batch_size, c.steps) for c in (cpu, larger)
    ]
    assert sizes == [(4, 4, 128, 64, 12, 2000), (6, 6, 384, 256, 64, 5000)]
    assert [c.dropout_rate for c in (cpu, larger)] == [0.0, 0.2]
    assert [c.warmup * c.steps for c in (cpu, larger)] == [100, 100]
    assert [c.learning_rate for c in (cpu, larger)] == [3e-3, 1e-3]  # of the smaller one ours
    assert [c.positions for c in (cpu, larger)] == ["rotary", "learned"]
    for c in (cpu, larger):
        assert (c.dataset, c.tokens, c.tie_embeddings, c.use_bias) == (
            "tinyshakespeare", "characters", True, False,
        )  # fmt: skip
        assert (c.second_moment, c.weight_decay, c.clip_norm) == (0.99, 0.1, 1.0)
        assert (c.end, c.schedule) == (0.1, "cosine")
    count = models.gpt(65, max_length=64, num_layers=4, num_heads=4, width=128, use_bias=False)
    shapes = jax.eval_shape(count.init, jax.random.key(0), jnp.zeros((1, 1), int))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 804_096  # 0.80 M, as its log says


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gelu": "exakt"}, "unknown gelu 'exakt': did you mean 'exact'"),
        ({"dtype": "float16"}, "unknown dtype"),
        ({"dropout_rate": 1.0}, r"dropout_rate lies in \[0, 1\)"),
        ({"second_moment": 1.0}, r"second_moment lies in \[0, 1\)"),
        (
            {"model": "gpt2_small", "num_layers": 3},
            "gpt2_small has its own num_layers, num_heads",
        ),
        ({"width": 15}, "a width of 15 doesn't split into 2 heads"),
        ({"width": 6, "positions": "rotary"}, "heads of even width, not 3"),
        ({"context": 0}, "context must be at least 1"),
        ({"loss_chunk": 0}, "loss_chunk must be at least 1"),
        ({"context": 7000}, "6,656 tokens don't fill a window of 7,001"),
        ({"tokens": "words"}, "unknown kind of token 'words'"),
        ({"model": "gptt"}, "unknown language_model 'gptt': did you mean 'gpt'"),
        ({"learning_rate": -1.0}, "learning rate must be"),
    ],
)
def test_configs_that_cannot_be(fields, message):
    with pytest.raises(errors.UserError, match=message):
        make_recipe(dataclasses.replace(SMALL, **fields), RunOptions())


def test_one_prompt_is_written_as_it_comes(trained, capsys):
    assert command("generate", trained, "When ", "--num-tokens", "40") == 0
    text = capsys.readouterr().out
    assert text.startswith("When ")
    assert len(text) == 5 + 40 + 1
    assert command("generate", trained, "When ", "--num-tokens", "40") == 0
    assert capsys.readouterr().out == text  # of the same seed
    for words in (("--seed", "1"), ("--temperature", "0"), ("--top-k", "1"), ("--top-p", "0.1")):
        assert command("generate", trained, "When ", "--num-tokens", "40", *words) == 0
        assert capsys.readouterr().out != text
    assert command("generate", trained, "--num-tokens", "3") == 0  # from a line's end
    assert capsys.readouterr().out[0] == "\n"


def test_several_prompts_at_once_as_each_alone(trained, capsys):
    words = ("--num-tokens", "30", "--temperature", "0")
    prompts = ("When forty", "I", r"die,\nBut")
    assert command("generate", trained, *prompts, *words) == 0
    together = capsys.readouterr().out
    for i, prompt in enumerate(prompts, start=1):
        assert command("generate", trained, prompt, *words) == 0
        assert f"--- {i} ---\n{capsys.readouterr().out}" in together


def test_of_a_prompt_longer_than_the_context_the_end_counts(trained, capsys):
    long = "Then of thy beauty do I question make"
    words = ("--num-tokens", "12", "--temperature", "0")
    assert command("generate", trained, long, *words) == 0
    out, err = capsys.readouterr()
    assert "warning: prompt 1 has 37 tokens; the model sees the last 16 of them" in err
    assert command("generate", trained, long[-16:], *words) == 0
    assert capsys.readouterr().out == out[len(long) - 16 :]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("generate", ("",), "prompt 1 is empty"),
        ("generate", ("When", "Th€"), "prompt 2: line 1: '€' is none of the vocabulary's 57 characters"),
        ("generate", ("When", "--num-tokens", "0"), "num_tokens is 0; it must be at least 1"),
        ("generate", ("When", "--top-p", "2"), "top_p lies in (0, 1]"),
        ("generate", ("When", "--temperature", "-1"), "temperature is a number of at least 0"),
        ("predict", (), "give either texts"),
        ("predict", ("a", "--input", "b"), "give either texts"),
        ("predict", ("a", "--output", "no/b"), "no/b can't be written: there is no folder no"),
        ("predict", ("",), "text 1 is empty"),
        ("predict", ("--input", "nothing"), "nothing can't be read: "),
    ],
)
def test_bad_words(trained, name, words, message, capsys):
    assert command(name, trained, *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_texts_are_judged(trained, tmp_path, capsys):
    assert command("predict", trained, "When forty winters", "e") == 0
    first, numbers, second, rest = capsys.readouterr().out.splitlines()
    assert (first, second) == ("When forty winters", "e")
    assert "of 18 tokens; next " in numbers
    assert "perplexity" not in rest  # of a single token
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("\ufeffWhen forty winters\r\nlike a rose\n", encoding="utf-8")
    assert command("predict", trained, "--input", str(source), "--output", str(target)) == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["When forty winters", "like a rose"]
    assert f"perplexity {rows[0]['perplexity']:.2f}" in numbers
    assert rows[0]["perplexity"] == pytest.approx(math.exp(rows[0]["loss"]))
    shares = [share for _, share in rows[1]["next"]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    source.write_bytes(b"like\n\xff\n")
    assert command("predict", trained, "--input", str(source)) == 2
    assert f"{source}, line 2: not UTF-8 (byte 0xff at 0)" in capsys.readouterr().err
    source.write_text("like\nth€\n")
    assert command("predict", trained, "--input", str(source)) == 2
    assert f"{source}, line 2: line 1: '€' is none" in capsys.readouterr().err


def test_texts_are_judged_together_as_each_alone(trained, monkeypatch):
    monkeypatch.setattr(writing, "_ROWS", 4)
    writer = writing.Writer.of_run(_saved(trained), shakespeare.make_model)
    texts = ["e", "like a rose", "When forty winters shall besiege thy brow " * 3, "th", "no"]
    together = writer.judge(texts, texts)
    for text, row in zip(texts, together, strict=True):
        (alone,) = writer.judge([text], [text])
        assert alone["tokens"] == row["tokens"] == len(text)
        assert alone["loss"] == (None if len(text) == 1 else pytest.approx(row["loss"], rel=1e-5))
        assert [token for token, _ in alone["next"]] == [token for token, _ in row["next"]]


def test_a_vocabulary_that_is_not_the_models(run, capsys):
    path = run / "assets" / writing.VOCABULARY
    other = data.make_tokenizer("characters", "abc", train="abc", size=0).to_bytes()
    path.write_bytes(other)
    assert command("generate", run, "a") == 2
    assert (
        f"{writing.VOCABULARY} is not the one that the run was trained with" in capsys.readouterr().err
    )
    # Even where someone has made the digest fit.
    config = json.loads((run / "config.json").read_text())
    import hashlib

    config["assets"][writing.VOCABULARY] = hashlib.sha256(other).hexdigest()
    (run / "config.json").write_text(json.dumps(config))
    assert command("generate", run, "a") == 2
    assert "the vocabulary has 3 tokens and the model 57" in capsys.readouterr().err
    path.unlink()
    assert command("predict", run, "a") == 2
    assert "can't be read" in capsys.readouterr().err


def test_another_text_is_not_gone_on_with(run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("to be or not to be, that is the question. " * 9)
    words = ("--dropout-rate", "0.1", "--dataset", "mine", "--data-dir", str(tmp_path))
    assert train(run, *words, "--allow-change") == 2
    assert f"trained with another {writing.VOCABULARY}" in capsys.readouterr().err
    assert command("eval", run, *words[2:]) == 2
    assert f"trained with another {writing.VOCABULARY}" in capsys.readouterr().err


@pytest.mark.parity
def test_pytorch_agrees():
    from jaxnets.interop.parity import check_parity
    from jaxnets.interop.reference import load_reference

    config = dataclasses.replace(
        SMALL, num_layers=2, batch_size=4, schedule="constant", warmup=0.0, clip_norm=None
    )
    recipe = make_recipe(config, RunOptions())
    reference = load_reference(recipe.name, recipe.torch_reference, recipe.torch_arguments)
    report = check_parity(recipe, reference, num_steps=3)
    assert report["float64"]["outputs"]["num_tensors"] >= 12
    assert report["float64"]["parameters after all steps"]["error"] < 1e-10
    refused = make_recipe(SMALL, RunOptions())
    with pytest.raises(errors.ConfigError, match=r"does not have --schedule, --warmup, --clip-norm"):
        load_reference(refused.name, refused.torch_reference, refused.torch_arguments)
