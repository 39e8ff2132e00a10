"""The second loop of a process: beside the portal's, there until the end, and new in a forked child."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from textwrap import dedent

import pytest

from agent.portal import portal, workbench

_SECONDS_MAX = 60


def _ran(program: str) -> list[str]:
    """What the program printed, in a process of its own; it ends well and says nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS_MAX,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_the_portal_answers_while_the_workbench_computes() -> None:
    go_on = threading.Event()

    async def compute() -> bool:
        return go_on.wait(_SECONDS_MAX)

    async def answer() -> str:
        return "answered"

    computing = workbench().submit(compute())
    assert portal().submit(answer()).result(_SECONDS_MAX) == "answered"
    assert not computing.done()
    go_on.set()
    assert computing.result(_SECONDS_MAX)
    assert workbench() is workbench()


def test_work_that_nobody_waits_for_does_not_hold_up_the_end_of_the_process() -> None:
    assert _ran("""
        import asyncio, threading
        from agent.portal import workbench
        begun = threading.Event()
        async def endless():
            begun.set()
            await asyncio.Event().wait()
        workbench().submit(endless())
        begun.wait(60)
        print("ends")
    """) == ["ends"]


def test_what_the_portal_finishes_at_exit_may_wait_for_the_workbench() -> None:
    assert _ran("""
        import asyncio
        from agent.portal import portal, workbench
        async def last():
            await asyncio.sleep(0.05)
            return "finished"
        async def finish():
            return await asyncio.wrap_future(workbench().submit(last()))
        portal().at_exit(lambda: print(portal().submit(finish()).result(60)))
        print("ends")
    """) == ["ends", "finished"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_workbench_of_its_own_and_leaves_the_parents_alone() -> None:
    assert _ran("""
        import asyncio, os, threading, warnings
        from agent.portal import workbench
        warnings.simplefilter("ignore", DeprecationWarning)
        go_on = asyncio.Event()
        async def wait():
            await go_on.wait()
            return os.getpid()
        async def here():
            await asyncio.sleep(0.01)
            return os.getpid()
        parents = workbench()
        waiting = parents.submit(wait())
        child = os.fork()
        if not child:
            mine = workbench()
            is_well = mine is not parents and mine.submit(here()).result(60) == os.getpid()
            os._exit(0 if is_well else 1)
        _, status = os.waitpid(child, 0)
        parents.loop.call_soon_threadsafe(go_on.set)
        print("child", os.waitstatus_to_exitcode(status))
        print("parent", waiting.result(60) == os.getpid() and workbench() is parents)
    """) == ["child", "0", "parent", "True"]


async def test_who_awaits_the_workbench_may_do_so_in_any_loop() -> None:
    async def where() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert await workbench().run(where()) is workbench().loop
    assert workbench().loop is not portal().loop
