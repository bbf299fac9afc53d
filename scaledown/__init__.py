"""ScaleDown: compressed documents for retrieval-augmented generation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from errors_scaledown import ScaleDownError

if TYPE_CHECKING:
    from configuration_scaledown import ScaleDownConfig
    from modeling_scaledown import ScaleDownModel
    from processing_scaledown import ScaleDownProcessor

__version__ = "0.2.0"

# Imported when they are asked for: a command line that prints its help needs no torch.
_MODULES = {
    "ScaleDownConfig": "configuration_scaledown",
    "ScaleDownModel": "modeling_scaledown",
    "ScaleDownProcessor": "processing_scaledown",
}

__all__ = ["ScaleDownConfig", "ScaleDownError", "ScaleDownModel", "ScaleDownProcessor"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
