"""The embedded model, on the documents of its own world, as every framework's test uses it."""

import sys
from pathlib import Path

import pytest

from folders import ROOT
from scaledown import ScaleDownModel
from scaledown.world.world import World

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))


@pytest.fixture(scope="session")
def world_model() -> ScaleDownModel:
    return ScaleDownModel.from_pretrained(str(ROOT)).optimize_for_inference(cache_entries=512)


@pytest.fixture(scope="session")
def records() -> list[dict]:
    world = World("test", 0)
    return [world.record(place, num_documents=3, two_hops=0) for place in range(12)]


@pytest.fixture(scope="session")
def passages(records) -> list[str]:
    """A corpus: the passages of all questions."""
    return list(dict.fromkeys(passage for record in records for passage in record["documents"]))


@pytest.fixture(scope="session")
def service(world_model):
    from server import serving

    with serving(world_model) as running:
        yield running


@pytest.fixture(params=["model", "url"])
def place(request, world_model):
    """What a component is told to use: a model in this process, or a service."""
    if request.param == "model":
        return {"model": world_model}
    return {"url": request.getfixturevalue("service").url}
