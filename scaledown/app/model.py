"""The model that the page shows: loaded with what it is compared with, and described."""

from ..common.devices import find_device
from ..evaluation.arguments import EvaluationArguments
from ..evaluation.contestants import Contestants, load_contestants
from .arguments import AppArguments

EMBEDDED = (
    "You see **the model that is embedded in the repository**: {size:.1f} million parameters, trained from scratch on "
    "an invented world. It can read texts about that world and nothing else. Whole passages are read by its language "
    "model without the LoRA that learned to read slots; that one had less practice with questions that need two "
    "passages. So compare what reading costs, not who is right more often. Times are of one run on this machine."
)
OTHER = (
    "You see **{name}**, {size:,.0f} million parameters. {notes} The examples are texts of an invented world. Times "
    "are of one run on this machine."
)


def load(arguments: AppArguments) -> Contestants:
    """Load the model, and the generator that reads text, in the way `evaluate.py` does.

    Args:
        arguments: Name them.

    Returns:
        Both.

    Raises:
        ScaleDownError: One of them cannot be loaded.
    """
    compared = EvaluationArguments(
        model=arguments.model, revision=arguments.revision, data="what is typed into the page", baselines="full_text"
    )
    return load_contestants(compared, find_device(compared.device))


def describe(contestants: Contestants, is_embedded: bool) -> str:
    """What the model is and how it is compared, in Markdown.

    Args:
        contestants: The model and the generator that reads text.
        is_embedded: Whether it is the repository's own model.

    Returns:
        A paragraph.
    """
    text, model = EMBEDDED if is_embedded else OTHER, contestants.description
    notes = " ".join(contestants.notes).replace("; --generator names another", "")  # an option of evaluate.py
    return text.format(name=model["name"], size=model["num_parameters"] / 1e6, notes=notes)
