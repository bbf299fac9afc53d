"""deploy/: what can be checked of it without Docker."""

import re

import pytest
import yaml

from folders import ROOT
from scaledown.serving.arguments import KEY_VARIABLE, parse_arguments

FOLDER = ROOT / "deploy"


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def test_only_the_service_can_be_reached(compose):
    services = compose["services"]
    assert set(services) == {"service", "vllm"}
    assert "ports" in services["service"] and "ports" not in services["vllm"]
    assert services["vllm"]["networks"] == ["engine"] and compose["networks"]["engine"]["internal"] is True
    assert "engine" in services["service"]["networks"]


def test_models_are_read_and_not_written(compose):
    for service in compose["services"].values():
        assert [volume["read_only"] for volume in service["volumes"]] == [True]


def test_the_key_comes_from_the_environment(compose):
    assert compose["services"]["service"]["environment"][KEY_VARIABLE].startswith(f"${{{KEY_VARIABLE}:?")
    assert not re.search(r"api[-_]key[= ]", (FOLDER / "Dockerfile").read_text(), re.IGNORECASE)


def test_the_service_finds_vllm_where_it_is(compose):
    service, vllm = compose["services"]["service"], compose["services"]["vllm"]
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    arguments = parse_arguments([*yaml.safe_load(entry[1])[1:], *service["command"]])
    assert arguments.engine == "vllm" and arguments.vllm_url == "http://vllm:8001/v1"
    assert (arguments.host, arguments.port) == ("0.0.0.0", 8000) and service["ports"][0].endswith(":8000")
    assert {"--enable-prompt-embeds", "--port=8001", "--host=0.0.0.0"} <= set(vllm["command"])
    assert arguments.model == service["volumes"][0]["target"]
    assert f"--model={vllm['volumes'][0]['target']}" in vllm["command"]
    assert service["depends_on"]["vllm"]["condition"] == "service_healthy" and "/health" in str(vllm["healthcheck"])


def test_the_image_is_made_of_what_is_here():
    text = (FOLDER / "Dockerfile").read_text()
    allowed = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert list(ROOT.glob(source)), source
            assert f"!{source}" in allowed
    assert "/health" in text
