"""Recipes: options of a command line in YAML, which the options that follow override."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from errors_scaledown import ScaleDownError


def expand_recipe(parser: HfArgumentParser, argv: Sequence[str]) -> list[str]:
    """Put a recipe's options in the place of its name.

    Args:
        parser: Knows the options; its `prog` is named in messages.
        argv: `[recipe.yaml] [--option value …]`.

    Returns:
        Options alone, those of the recipe first.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: It is not YAML or not a mapping, or names an option or a choice there is not.
    """
    if not argv or not argv[0].endswith((".yaml", ".yml")):
        return list(argv)
    path, *rest = argv
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist (looked from {Path.cwd()}); recipes/ holds those that ship.")
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ScaleDownError(f"{path} is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ScaleDownError(f"{path} is not a recipe: expected lines of the form `option: value`.")
    names = {item.name for kind in parser.dataclass_types for item in fields(kind) if item.init}
    actions = {action.dest: action for action in parser._actions if action.dest in names}
    options = []
    for name, value in recipe.items():
        if name not in actions:
            near = difflib.get_close_matches(str(name), actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; python {parser.prog} --help lists the options."
            raise ScaleDownError(f"{path} sets {name}, which is not an option{hint}")
        if value is not None:
            options += [f"--{name}", *_option_values(path, name, value, actions[name])]
    return [*options, *rest]


def _option_values(path: str, name: str, value: Any, action: Any) -> list[str]:
    if not isinstance(value, list):
        return [_option_value(path, name, value, action)]
    if action.nargs in ("+", "*"):
        return [_option_value(path, name, item, action) for item in value]
    return [_option_value(path, name, ",".join(map(str, value)), action)]  # as options that name several are written


def _option_value(path: str, name: str, value: Any, action: Any) -> str:
    is_switch = action.type is string_to_bool
    if isinstance(value, bool) and not is_switch:  # YAML reads a bare no as false
        value = "yes" if value else "no"
    if is_switch and str(value).lower() not in ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0"):
        raise ScaleDownError(f"{path} sets {name} to {value!r}; expected true or false.")
    if action.choices is not None and value not in action.choices:
        raise ScaleDownError(f"{path} sets {name} to {value!r}; expected one of {', '.join(map(str, action.choices))}.")
    return json.dumps(value) if isinstance(value, dict) else str(value)
