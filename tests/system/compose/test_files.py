"""The Compose files as Compose reads them: every combination is valid, and every setting has its way in."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from typing import Any

import pytest

from embedding_service.config import Settings as GatewaySettings
from ml_base.config import Settings as ReplicaSettings
from tests.system.compose.project import ROOT, run

# The command, but no engine.
pytestmark = [
    pytest.mark.compose,
    pytest.mark.skipif(shutil.which("docker") is None, reason="there is no docker command"),
]

OVERRIDES = ["dev", "gpu", "secrets"]
COMBINATIONS = [chosen for count in range(len(OVERRIDES) + 1) for chosen in itertools.combinations(OVERRIDES, count)]
NOT_PASSED = {"HOST", "ML_BASE_HOST", "INSTANCE_ID", "ML_BASE_BAKED_DIR"}
"""What a container is told by other means, or has no use for."""


def configured(*overrides: str, **environment: str) -> dict[str, Any]:
    files = [argument for name in overrides for argument in ("-f", f"compose/{name}.yml")]
    command = ["docker", "compose", "--env-file", os.devnull, "-f", "compose.yaml", *files]
    return dict(json.loads(run(*command, "config", "--format", "json", **environment)))


def environment_of(service: str) -> set[str]:
    return set(configured()["services"][service]["environment"])


def variables(settings: type[GatewaySettings | ReplicaSettings]) -> set[str]:
    """Those that an operator may set; files of secrets are the business of secrets.yml."""
    names = {str(field.alias or field.validation_alias) for field in settings.model_fields.values()}
    return {name for name in names - NOT_PASSED if not name.endswith("_FILE")}


@pytest.mark.parametrize("overrides", COMBINATIONS, ids="+".join)
def test_every_combination_of_overrides_is_valid(overrides: tuple[str, ...]) -> None:
    assert configured(*overrides)["services"].keys() == {"embedding", "ml-base", "ml-base-lb", "redis-cache"}


def test_every_setting_of_the_gateway_reaches_its_container() -> None:
    assert variables(GatewaySettings) - environment_of("embedding") == set()


def test_every_setting_of_a_replica_reaches_its_container() -> None:
    assert variables(ReplicaSettings) - environment_of("ml-base") == set()


def test_the_example_names_nothing_that_compose_does_not_read() -> None:
    example = set(re.findall(r"^#([A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    known = {name for file in (ROOT / "compose").glob("*.yml") for name in re.findall(r"[A-Z0-9_]+", file.read_text())}
    assert example - known == {"COMPOSE_FILE"}  # Compose's own


def test_the_number_of_replicas_and_their_share_of_the_cores_are_one_setting() -> None:
    replica = configured(ML_BASE_REPLICAS_PER_HOST="5")["services"]["ml-base"]
    assert (replica["deploy"]["replicas"], replica["environment"]["ML_BASE_REPLICAS_PER_HOST"]) == (5, "5")


def test_nothing_waits_for_a_model() -> None:
    services = configured()["services"].values()
    conditions = {needed["condition"] for service in services for needed in service.get("depends_on", {}).values()}
    assert conditions == {"service_started"}
