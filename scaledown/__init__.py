"""ScaleDown: compressed documents for retrieval-augmented generation."""

from configuration_scaledown import ScaleDownConfig
from modeling_scaledown import ScaleDownModel
from processing_scaledown import ScaleDownProcessor

__all__ = ["ScaleDownConfig", "ScaleDownModel", "ScaleDownProcessor"]
