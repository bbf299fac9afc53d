"""Errors on the command lines: one line for what a user can mend, the traceback for anything else."""

import logging
from dataclasses import dataclass

import pytest

from scaledown import ScaleDownConfig, ScaleDownError
from scaledown.command_line import parse_options, parse_with, run_command
from scaledown.data_preparation import main as prepare
from scaledown.evaluation import main as evaluate
from scaledown.training import main as train


@dataclass
class Options:
    """Options."""

    size: int = 1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size is {self.size}")


def command(argv, work=lambda: None):
    def inside() -> str:
        parse_options(Options, argv)
        work()
        return "done"

    return run_command(inside)


def fail(error):
    def work():
        raise error

    return work


def test_errors_of_users_are_one_line(capsys):
    assert command([], fail(ScaleDownError("mend this"))) == 2
    assert command([], fail(FileNotFoundError("no such file"))) == 2
    assert command([], fail(ImportError("pip install it"))) == 2
    assert capsys.readouterr().err == "error: mend this\nerror: no such file\nerror: pip install it\n"


@pytest.mark.parametrize("error", [ValueError("too many values"), KeyError("x"), RuntimeError("x")])
def test_any_other_error_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        command([], fail(error))


def test_a_broken_import_keeps_its_traceback():
    with pytest.raises(ImportError):
        command([], lambda: __import__("scaledown.nothing_of_that_name"))


@pytest.mark.parametrize("argv", [["--size", "0"], ["--sizes", "1"], ["--sizes"]])
def test_wrong_options_are_errors_of_users(argv, capsys):
    assert command(argv) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_debug_shows_the_traceback_once(capsys, caplog):
    assert command(["--debug", "--size", "2"], fail(ScaleDownError("mend this"))) == 2
    assert "Traceback" in caplog.text
    assert "in work" in caplog.text
    assert capsys.readouterr().err.endswith("error: mend this\n")
    assert logging.getLogger("scaledown").level == logging.NOTSET
    caplog.clear()
    assert command(["--size", "0"]) == 2
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("main", [train, evaluate, prepare])
def test_every_command_has_debug(main, caplog, capsys):
    assert main(["--no_such_option", "1", "--debug"]) == 2
    assert "Traceback" in caplog.text
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "With --debug" in capsys.readouterr().out


def test_debug_with_a_value_is_the_trainers():
    from transformers import HfArgumentParser, TrainingArguments

    (arguments,) = parse_with(HfArgumentParser(TrainingArguments), ["--debug", "underflow_overflow"])
    assert [option.value for option in arguments.debug] == ["underflow_overflow"]


def test_the_models_own_errors_are_of_the_same_class():
    with pytest.raises(ScaleDownError, match="compression_rate=0"):
        ScaleDownConfig(compression_rate=0)
