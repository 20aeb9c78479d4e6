"""Options from the command line, a config file, another run and a command's own defaults."""

import json

import pytest

from memopt.cli.pretrain import parse
from memopt.optimizers.registry import METHODS
from memopt.training.config import Config, Optimization

LION = {"optimizer": "lion", "option": ["b1=0.8"], "learning_rate": 3e-4, "release": True}


@pytest.fixture
def written(tmp_path):
    """Writes a config file and returns the option that reads it."""

    def write(options):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(options))
        return f"--config={path}"

    return write


def test_the_command_line_wins_over_a_config_file_and_that_over_defaults(written):
    defaults = Config.from_flat({"steps": 7, "batch_size": 3, "keep": 9, "weights": "int8"})
    file = written({"steps": 5, "batch_size": 4, "weights": None})
    config = parse([file, "--batch-size=2", "--data", "a", "b"], defaults=defaults)
    assert (config.run.keep, config.optimization.steps, config.text.batch_size) == (9, 5, 2)
    assert config.text.data == ("a", "b")
    assert config.architecture.weights is None


def test_what_a_config_file_turns_on_can_be_turned_off(written):
    assert parse([written(LION)]).optimization.release
    assert not parse([written(LION), "--no-release"]).optimization.release


def test_options_add_to_those_of_a_config_file_with_the_same_optimizer(written):
    for more in ([], ["--optimizer=lion"]):
        config = parse([written(LION), "--option=b2=0.9", *more])
        assert config.optimizer_options == {"b1": 0.8, "b2": 0.9}
        assert config.highest_learning_rate == 3e-4


def test_another_optimizer_has_its_own_options_and_learning_rate(written):
    config = parse([written(LION), "--optimizer", "muon"])
    assert config.optimizer_options == {}
    assert config.highest_learning_rate == METHODS["muon"].learning_rate
    assert parse([written(LION), "--optimizer=muon", "--learning-rate=1"]).flat() == {
        **config.flat(),
        "learning_rate": 1.0,
    }


@pytest.mark.parametrize("name", METHODS)
def test_the_learning_rate_is_the_optimizers_own_unless_it_is_given(name):
    options = Optimization(optimizer=name)
    assert Config(optimization=options).flat()["learning_rate"] == METHODS[name].learning_rate
    old = {"optimizer": name, "learning_rate": 5e-3}  # a run's of a version with one for all
    assert Config.from_flat(old).phases[0].highest == 5e-3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": "6"}, "option steps must be int, got '6'"),
        ({"steps": True}, "option steps must be int, got True"),
        ({"release": 1}, "option release must be bool, got 1"),
        ({"weights": "int3"}, "option weights must be .*'int8'.* got 'int3'"),
        ({"data": [1]}, r"option data must be tuple.* got \(1,\)"),
        ({"mesh": 3}, r"option mesh must be str | None, got 3"),
    ],
)
def test_a_config_file_with_a_value_of_another_type_is_refused(written, options, says):
    with pytest.raises(ValueError, match=says):
        parse([written(options)])


def test_an_integer_is_a_number_too(written):
    assert parse([written({"warmup": 0, "learning_rate": 1})]).highest_learning_rate == 1
