"""Errors on the command lines: one line for what a user can mend, the traceback for anything else."""

import logging
import re
from dataclasses import dataclass

import openai
import pytest

from folders import save_generator, write_rows
from scaledown import ScaleDownConfig, ScaleDownError
from scaledown.common.command_line import parse_options, parse_with, run_command, settings_checked_by_libraries
from scaledown.data.preparation import main as prepare
from scaledown.evaluation.evaluate import main as evaluate
from scaledown.training.run import main as train


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


def test_an_interrupted_run_says_what_becomes_of_the_work(capsys, caplog):
    assert run_command(fail(KeyboardInterrupt()), "The same command goes on.") == 130
    assert capsys.readouterr().err == "interrupted. The same command goes on.\n"


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
    with pytest.raises(ScaleDownError, match="max_query_length=0"):
        ScaleDownConfig(max_query_length=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0, expected at least 1"),
        (["--nosuch", "1"], "there is no option --nosuch 1; --help lists the options"),
        (["--lora_dropout", "2"], "lora_dropout=2.0 must be from 0 to below 1"),
        (["--lora_target_modules", "nosuch"], "LoRA layers cannot be made: Target modules {'nosuch'} not found"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_type=cosine_with_min_lr: One of min_lr"),
        (["--save_strategy", "best"], "training cannot be set up: `args.metric_for_best_model` must be provided"),
        (["--resume_from_checkpoint", "."], "resume_from_checkpoint=. holds no trainer_state.json"),
        (["--attn_implementation", "nosuch"], "generator_name_or_path=.*cannot be loaded"),
        (["--bf16", "true", "--use_cpu", "false"], "bf16"),
    ],
)
def test_settings_that_training_cannot_use_are_one_line(tmp_path, capsys, options, message):
    folder = save_generator(tmp_path / "generator")
    rows = [{"query": "q", "documents": ["d"], "answer": "a"}]
    argv = ["--generator_name_or_path", str(folder), "--train_file", str(write_rows(tmp_path / "t.jsonl", rows))]
    argv += ["--num_compressor_layers", "2", "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    assert train([*argv, *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_our_own_code_gets_wrong_in_setting_up_keeps_its_traceback():
    with pytest.raises(ValueError, match="unpack") as caught, settings_checked_by_libraries("x"):
        [one] = (1, 2, 3)
        del one
    assert not isinstance(caught.value, ScaleDownError)


def test_libraries_that_log_too_much_are_only_heard_when_they_warn(caplog):
    transport = type(openai.OpenAI(api_key="none")._client).__mro__
    (package,) = {kind.__module__.partition(".")[0] for kind in transport} - {"openai", "builtins"}

    def command() -> str:
        for name in (package, "bm25s", "datasets.builder"):
            caplog.set_level(logging.DEBUG, name)  # as bm25s does when it is imported
            logging.getLogger(name).info("a detail")
            logging.getLogger(name).warning("of %s", name)
        return "done"

    run_command(command)
    assert caplog.messages == [f"of {package}", "of bm25s", "of datasets.builder"]
