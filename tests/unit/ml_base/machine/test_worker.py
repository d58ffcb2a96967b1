from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading

import pytest

from embedding_common import errors
from ml_base.machine.worker import TURNS_TO_WAIT, Worker
from tests.support.model_server import until


async def test_calls_run_one_at_a_time_in_order_in_one_thread() -> None:
    seen: list[tuple[int, int]] = []

    def note(i: int) -> None:
        seen.append((i, threading.get_ident()))

    async with Worker("w") as worker:
        await asyncio.gather(*(worker.run(functools.partial(note, i)) for i in range(20)))
    assert [i for i, _ in seen] == list(range(20))
    assert {thread for _, thread in seen} != {threading.get_ident()}
    assert len({thread for _, thread in seen}) == 1


async def test_what_is_urgent_goes_before_what_can_wait() -> None:
    gate = threading.Event()
    ran: list[int] = []
    async with Worker("w") as worker:
        running = asyncio.create_task(worker.run(lambda: gate.wait(5)))
        await until(lambda: worker.running_since is not None)
        calls = [asyncio.create_task(worker.run(functools.partial(ran.append, n), urgent=n > 1)) for n in range(4)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(running, *calls)
    assert ran == [2, 3, 0, 1]


async def test_what_can_wait_has_its_turn_among_urgent_calls_without_end() -> None:
    gate = threading.Event()
    ran: list[str] = []
    async with Worker("w") as worker:
        running = asyncio.create_task(worker.run(lambda: gate.wait(5), urgent=True))
        await until(lambda: worker.running_since is not None)
        calls = [asyncio.create_task(worker.run(functools.partial(ran.append, "job")))]
        calls += [
            asyncio.create_task(worker.run(functools.partial(ran.append, "urgent"), urgent=True)) for _ in "x" * 50
        ]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(running, *calls)
    assert 1 < ran.index("job") <= TURNS_TO_WAIT


async def test_what_a_call_raises_reaches_its_caller_only() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    async with Worker("w") as worker:
        with pytest.raises(ZeroDivisionError):
            await worker.run(fail)
        assert await worker.run(lambda: 7) == 7


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, StopIteration])
async def test_not_even_an_exception_that_futures_refuse_ends_the_thread(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    async with Worker("w") as worker:
        with pytest.raises(RuntimeError, match=error.__name__):
            await worker.run(fail)
        assert await worker.run(lambda: 7) == 7


async def test_a_call_cancelled_before_its_turn_never_runs() -> None:
    gate = threading.Event()
    ran: list[int] = []
    async with Worker("w") as worker:
        first = asyncio.create_task(worker.run(lambda: gate.wait(5)))
        await until(lambda: worker.running_since is not None)
        second = asyncio.create_task(worker.run(lambda: ran.append(2)))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        gate.set()
        await first
        await worker.run(lambda: None)
    assert ran == []


async def test_closing_fails_all_callers_that_still_wait_even_if_the_thread_is_stuck() -> None:
    gate = threading.Event()
    async with Worker("w") as worker:
        stuck = [asyncio.create_task(worker.run(lambda: gate.wait(5))) for _ in range(2)]
        await until(lambda: worker.running_since is not None)
        assert repr(worker) == "<Worker w pending=2 running=True>"
    ends = await asyncio.gather(*stuck, return_exceptions=True)
    assert all(isinstance(end, errors.Unavailable) for end in ends)
    gate.set()


async def test_a_worker_that_is_not_open_refuses() -> None:
    with pytest.raises(errors.Unavailable):
        await Worker("w").run(lambda: None)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a nice value belongs to the whole process")
async def test_only_its_own_thread_steps_back_for_others() -> None:
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = nice()
    async with Worker("w", nice=min(19, before + 3)) as worker:
        assert await worker.run(nice) == min(19, before + 3)
    assert nice() == before
