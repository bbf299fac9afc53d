"""Training without dropout."""

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, that of its attention and of LoRA included.

    Args:
        model: The model; its configuration stays as it is.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # what is passed to functions as a number, layers left out included
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
