"""train.py with two-stage training as it is often done, as a control: the cached states are untrained.

Memory embeddings are random, the projector and the reranking head stay at their random values; only LoRA is trained.
"""

import sys

from scaledown.training import build, run, stages

build_model = build.build_model


def build_untrained(*args, **kwargs):
    """The model with a frozen compressor."""
    model = build_model(*args, **kwargs)
    model.compressor.requires_grad_(False)
    return model


if __name__ == "__main__":
    for module in (build, run, stages):
        module.build_model = build_untrained
    build.choose_slot_pooling = lambda model_args, args: "memory_tokens"
    sys.exit(run.main())
