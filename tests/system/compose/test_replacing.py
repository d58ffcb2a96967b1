"""Replicas killed, added, taken away and replaced while requests come in: none of them fails."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.system.compose.project import REPLICAS, Load, eventually, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.system.compose.project import Project

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]


@pytest.fixture(autouse=True)
def mended(project: Project) -> Iterator[None]:
    """Three replicas are in service before and after each test."""
    yield
    project.scale(REPLICAS)
    eventually(lambda: project.replicas_up() == REPLICAS, "three replicas are in service")


def test_a_killed_replica_costs_no_request_and_its_successor_is_found(project: Project) -> None:
    victim = project.containers("ml-base")[0]
    with Load(project) as load:
        run("docker", "rm", "--force", victim)
        eventually(lambda: project.replicas_up() == REPLICAS - 1, "the balancer has noticed", within_s=10)
        load.goes_on()
        project.scale(REPLICAS)
        eventually(lambda: project.replicas_up() == REPLICAS, "its successor is in service")
        load.goes_on()
    load.assert_none_failed()
    assert victim not in project.containers("ml-base")


def test_scaling_from_three_to_five_to_one_to_three_costs_no_request(project: Project) -> None:
    with Load(project) as load:
        for replicas in (5, 1, REPLICAS):
            project.scale(replicas)
            eventually(lambda wanted=replicas: project.replicas_up() == wanted, f"{replicas} replicas are in service")
            load.goes_on()
    load.assert_none_failed()


def test_all_replicas_replaced_one_after_the_other_cost_no_request(project: Project) -> None:
    before = set(project.containers("ml-base"))
    with Load(project) as load:
        run("scripts/roll", COMPOSE_PROJECT_NAME=project.name, **project.environment)
        load.goes_on()
    load.assert_none_failed()
    after = set(project.containers("ml-base"))
    assert len(after) == REPLICAS
    assert not before & after


def test_a_successor_that_cannot_start_is_taken_away_and_all_others_stay(project: Project) -> None:
    before = project.containers("ml-base")
    environment = project.environment | {"COMPOSE_PROJECT_NAME": project.name, "ML_BASE_THREADS": "many"}
    with pytest.raises(AssertionError, match="ML_BASE_THREADS"):
        run("scripts/roll", **environment)
    assert sorted(project.containers("ml-base")) == sorted(before)


def test_a_replica_that_does_not_work_is_replaced_too(project: Project) -> None:
    environment = project.environment | {"ML_BASE_THREADS": "many"}
    broken = replace(project, environment=environment)
    broken.compose("up", "--detach", "--no-deps", "--no-recreate", "--scale", f"ml-base={REPLICAS + 1}", "ml-base")
    run("scripts/roll", COMPOSE_PROJECT_NAME=project.name, **project.environment)
    assert {container["State"]["Health"]["Status"] for container in project.inspect("ml-base")} == {"healthy"}


def test_a_restarted_redis_keeps_the_cache(project: Project) -> None:
    project.embed(["a text that outlives Redis and the gateway"])
    for service in ("redis-cache", "embedding"):  # the gateway forgets its own cache
        project.compose("restart", service)
    project.up()
    eventually(project.redis_connected, "the gateway has found Redis")
    assert project.embed(["a text that outlives Redis and the gateway"])["cached_count"] == 1
