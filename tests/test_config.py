import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import config, errors
from jaxnets.config import RunOptions, parse_flags


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "lenet"  # which
    epochs: float = 2.5  # passes
    steps: int | None = None  # in place of epochs
    batch_size: int = 32  # examples
    nesterov: bool = False  # momentum
    augment: bool = True  # images
    widths: tuple[int, ...] = (8, 16)  # of layers


def parse(*words, default=None, options=None):
    return parse_flags(
        words, default or Config(), options=options, prog="python -m test", about="A test."
    )


def refusal(*words):
    with pytest.raises(errors.ConfigError) as caught:
        parse(*words)
    text = str(caught.value)
    assert "\n" not in text
    assert text.rstrip(")").endswith("see --help")
    return text


def test_no_flags_give_the_defaults():
    assert parse() == (Config(), RunOptions())
    preset, options = Config(epochs=9, steps=4), RunOptions(num_devices=2, jit=False)
    assert parse(default=preset, options=options) == (preset, options)


@pytest.mark.parametrize(
    "words",
    [("--batch-size", "8"), ("--batch_size", "8"), ("--batch-size=8",), ("--batch_size=8",)],
)
def test_both_spellings_of_a_flag(words):
    assert parse(*words)[0] == Config(batch_size=8)


def test_both_dataclasses_and_any_order():
    words = ["--num-devices", "4", "--model", "mlp", "--run_dir=out/x", "--epochs", "3"]
    expected = Config(model="mlp", epochs=3), RunOptions(num_devices=4, run_dir=Path("out/x"))
    assert parse(*words) == expected
    assert parse(*words[4:], *words[:4]) == expected


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("--nesterov", "nesterov", True),
        ("--no-nesterov", "nesterov", False),
        ("--augment", "augment", True),
        ("--no-augment", "augment", False),
        ("--no_augment", "augment", False),
    ],
)
def test_bools_come_in_pairs(word, name, value):
    for start in (True, False):
        parsed, _ = parse(word, default=dataclasses.replace(Config(), **{name: start}))
        assert getattr(parsed, name) is value


def test_bools_of_the_options():
    _, options = parse("--no-resume", "--allow-change", "--no-jit")
    assert options == RunOptions(resume=False, allow_change=True, jit=False)


def test_none_or_a_number():
    assert parse("--steps", "5")[0].steps == 5
    assert parse("--steps", "None", default=Config(steps=5))[0].steps is None
    assert parse(default=Config(steps=5))[0].steps == 5


def test_a_negative_number_is_a_value():
    assert parse("--epochs", "-1")[0].epochs == -1


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("--batchsize", "--batch-size"),
        ("--batch-sise=8", "--batch-size"),
        ("--epoch", "--epochs"),
        ("--num_device", "--num-devices"),
        ("--no-resum", "--no-resume"),
        ("--Model", "--model"),
    ],
)
def test_a_misspelt_flag_gives_the_nearest_one(word, near):
    text = refusal(word, "3")
    assert f"did you mean '{near}'?" in text
    assert word.split("=")[0].replace("_", "-") in text
    assert len(text) < 100


@pytest.mark.parametrize("word", ["--zzzzzz", "--gpu", "--max-tokens"])
def test_a_flag_like_no_other(word):
    assert refusal(word) == f"unknown flag '{word}': see --help"


def test_no_for_what_is_not_a_bool():
    assert "--no-epochs" in refusal("--no-epochs")


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        (("--batch-size", "many"), "many"),
        (("--batch-size", "1.5"), "1.5"),
        (("--steps", "few"), "few"),
        (("--batch-size",), "batch-size"),
        (("stray",), "stray"),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(words, mention):
    text = refusal(*words)
    assert mention in text
    assert not any(sign in text for sign in "╭╮╰╯│─")


def test_help_names_every_field_and_exits(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert "A test." in shown
    for kind in (Config, RunOptions):
        for field in dataclasses.fields(kind):
            assert f"--{field.name.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (None, [])),
        (["--preset", "small"], ("small", [])),
        (["--epochs", "2", "--preset=large", "--jit"], ("large", ["--epochs", "2", "--jit"])),
        (["--epochs", "2"], (None, ["--epochs", "2"])),
    ],
)
def test_presets_are_taken_out_of_the_words(words, expected):
    before = list(words)
    presets = {"small": Config(), "large": Config(batch_size=512)}
    assert config.preset_of(words, presets) == expected
    assert words == before


@pytest.mark.parametrize("words", [["--preset", "smal"], ["--preset=smal"], ["--preset"]])
def test_an_unknown_preset_is_refused(words):
    with pytest.raises(errors.ConfigError, match=r"unknown preset .*small"):
        config.preset_of(words, {"small": Config()})


configs = st.builds(
    Config,
    model=st.text(max_size=8),
    epochs=st.floats(allow_nan=False),
    steps=st.none() | st.integers(),
    batch_size=st.integers(),
    nesterov=st.booleans(),
    augment=st.booleans(),
    widths=st.lists(st.integers(), max_size=3).map(tuple),
)


@settings(deadline=None)
@given(value=configs)
def test_json_and_back(value):
    plain = config.to_json(value)
    read = json.loads(json.dumps(plain))
    assert read == plain
    assert config.from_json(Config, read) == value
    assert config.differences(read, config.to_json(value)) == []


def test_paths_are_text_in_json():
    assert config.to_json(RunOptions(run_dir=Path("runs/x")))["run_dir"] == "runs/x"


def test_fields_that_have_come_since_take_their_defaults():
    assert config.from_json(Config, {"batch_size": 7}) == Config(batch_size=7)


def test_fields_that_have_gone_are_refused():
    with pytest.raises(errors.ConfigError, match="config has no dropout, width"):
        config.from_json(Config, {"width": 7, "dropout": 0.1, "epochs": 2})


def test_differences():
    old = config.to_json(Config())
    new = config.to_json(Config(epochs=3, steps=4, model="mlp"))
    assert config.differences(old, new, ignore=["epochs"]) == [
        "model 'lenet' -> 'mlp'",
        "steps None -> 4",
    ]
    assert config.differences(old, old) == []
    assert config.differences({"a": 1}, {"b": 2}) == ["a 1 -> None", "b None -> 2"]
    assert config.differences({"a": 1, "b": 2}, {"b": 2, "a": 1}) == []


def test_a_flag_that_may_be_repeated():
    assert parse("--plugin", "a.py", "--plugin=b/c.py")[1].plugin == (Path("a.py"), Path("b/c.py"))
    options = parse("--plugin", "a.py")[1]
    assert json.loads(json.dumps(config.to_json(options)))["plugin"] == ["a.py"]


@dataclasses.dataclass(frozen=True)
class Own:
    top: int = 3  # how many


def parse_words(*argv):
    own, words = config.parse_command(
        argv, Own(), RunOptions(), words="TEXT", prog="python -m test", about="A test."
    )[1::-1]
    return words, own.top


def test_words_that_look_like_flags_stand_behind_two_dashes():
    assert parse_words("a film", "--top", "4", "--", "--top", "-x") == (("a film", "--top", "-x"), 4)
    with pytest.raises(
        errors.ConfigError, match=r"'--bad film': .*a TEXT like this goes behind a bare --"
    ):
        parse_words("--bad film")
    words = ["a film", "--preset", "small", "--", "--preset", "large"]
    assert config.preset_of(words, {"small": 0, "large": 1}) == (
        "small",
        ["a film", "--", "--preset", "large"],
    )
