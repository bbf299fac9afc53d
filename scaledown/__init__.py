"""ScaleDown: compressed documents for retrieval-augmented generation."""

from configuration_scaledown import ScaleDownConfig
from errors_scaledown import ScaleDownError
from modeling_scaledown import ScaleDownModel
from processing_scaledown import ScaleDownProcessor

__all__ = ["ScaleDownConfig", "ScaleDownError", "ScaleDownModel", "ScaleDownProcessor"]
