"""Start the service: load the model, choose the engine, listen."""

import logging
from pathlib import Path

import uvicorn

from modeling_scaledown import ScaleDownModel

from ..common.command_line import run_command
from ..common.devices import find_device
from ..common.loading import load_model
from .app import create_app
from .arguments import ServingArguments, parse_arguments
from .batching import Batcher
from .engine import CompressorEngine, Engine
from .local import LocalEngine
from .metrics import Metrics
from .vllm import VLLMEngine

logger = logging.getLogger(__name__)


def load(arguments: ServingArguments) -> ScaleDownModel:
    """Load the model that is served, prepared for inference.

    Args:
        arguments: Its name, device and type.

    Returns:
        The model in evaluation mode.

    Raises:
        ScaleDownError: There is no such model, or no such device.
    """
    device = find_device(arguments.device)
    model = load_model(
        lambda: ScaleDownModel.from_pretrained(arguments.model, revision=arguments.revision, dtype=arguments.dtype),
        arguments.model,
        "model",
    ).to(device)
    return model.optimize_for_inference(cache_entries=arguments.cache_entries or None)


def build_engine(model: ScaleDownModel, arguments: ServingArguments, metrics: Metrics) -> Engine:
    """Build the engine.

    Args:
        model: The model, prepared for inference.
        arguments: Which engine, and its limits.
        metrics: Counts batches.

    Returns:
        The engine; its thread runs.
    """
    batcher = Batcher(
        arguments.max_batch_size, arguments.max_wait_ms / 1000, arguments.max_queue, metrics.batch_size.observe
    )
    metrics.watch(model, lambda: batcher.waiting)
    compressor = CompressorEngine(model, batcher, arguments.max_document_tokens)
    if arguments.engine == "transformers":
        return LocalEngine(compressor, arguments.max_new_tokens)
    return VLLMEngine(compressor, arguments.vllm_url, arguments.vllm_model, arguments.max_new_tokens, arguments.timeout)


def main() -> int:
    """Command line of `python -m scaledown.serving`."""
    return run_command(lambda: serve(parse_arguments()))


def serve(arguments: ServingArguments) -> str:
    """Serve until the process is told to end; requests under way are answered first.

    Args:
        arguments: What is served, and where.

    Returns:
        A line to print at the end.
    """
    metrics = Metrics()
    model = load(arguments)
    name = arguments.served_model_name or Path(arguments.model).resolve().name
    app = create_app(build_engine(model, arguments, metrics), arguments, metrics, name)
    logger.info("serving %s by %s at http://%s:%d", name, arguments.engine, arguments.host, arguments.port)
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=int(arguments.timeout) + 1,
    )
    return "stopped"
