"""`scripts/up`: starts the parts, prints which are ready and what they log, and ends them on Ctrl-C."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a folder that Python runs is alone on its path

from local_stack.console import Console, tell, welcome
from local_stack.part import StackError
from local_stack.stack import LAST_PORT, PORT_VARIABLES, ROOT, WARM_WITHIN_S, WORD_EVERY_S, LocalStack, Ports

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType


class StopRequest:
    """A flag that the first SIGINT or SIGTERM sets, and SIGHUP too, unless `nohup` has that ignored.

    The handler does not raise: an exception at the wrong moment could leave a part without a supervisor.
    """

    def __init__(self) -> None:
        self.came = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True


def serve(stack: LocalStack, stop: StopRequest) -> None:
    """Starts all parts, prints which are ready, and prints their logs until `stop` came."""
    stack.start()
    console = Console(stack.parts)
    warm_up(stack, stop, console)
    console.skip()
    if not stop.came:
        tell(welcome(url=stack.url, ml_url=stack.ml_url, stats_url=stack.stats_url, logs=stack.log_dir))
    while not stop.came:
        console.follow()
        time.sleep(0.2)
    tell("\nending gateway, HAProxy, replicas and Redis ...")


def warm_up(stack: LocalStack, stop: StopRequest, console: Console) -> None:
    """Waits until all parts are ready or `stop` came. It prints each part that is ready, and at times what is not."""
    began, untold = time.monotonic(), stack.parts
    next_word_s = WORD_EVERY_S
    while not stop.came:
        waiting = stack.pending()
        for part in [part for part in untold if part.ready_after_s is not None]:
            untold.remove(part)
            console.say(part.name, f"ready after {part.ready_after_s:.1f} s")
        if not waiting:
            return
        elapsed_s = time.monotonic() - began
        if elapsed_s > WARM_WITHIN_S:
            raise StackError(f"{', '.join(waiting)}: not ready after {WARM_WITHIN_S:g} s; see {stack.log_dir}")
        if elapsed_s > next_word_s:
            console.say("", f"{elapsed_s:.0f} s: waiting for {', '.join(waiting)}")
            next_word_s += WORD_EVERY_S
        time.sleep(0.1)


def port_number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= LAST_PORT:
        raise argparse.ArgumentTypeError(f"must be a port, 1 to {LAST_PORT}, got {text!r}")
    return int(text)


def parse_args(argv: Sequence[str], environ: Mapping[str, str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/up",
        description="Runs Redis, HAProxy, the ML-Base replicas and the gateway on loopback until Ctrl-C.",
        epilog="Every variable of the gateway and of ML-Base (README) is passed on to them, but for those that say "
        "where parts listen and find each other.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in fields(Ports):
        variable = PORT_VARIABLES[field.name]
        parser.add_argument(
            f"--{field.name.replace('_', '-')}-port",
            *(["--port"] if field.name == "gateway" else []),
            type=port_number,
            metavar="PORT",
            # argparse passes a default that is a string through `type`, so a wrong variable is reported like an option
            default=environ.get(variable) or str(field.default),  # empty: not set, as for the parts themselves
            help=f"or {variable}",
        )
    parser.add_argument("--replicas", type=int, metavar="N", default=environ.get("REPLICAS") or "3", help="or REPLICAS")
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        default=environ.get("STATE_DIR") or str(ROOT / ".local"),
        help="logs, lock, list of servers; or STATE_DIR",
    )
    args = parser.parse_args(argv)
    if args.replicas < 1:
        parser.error(f"--replicas must be at least 1, got {args.replicas}")
    if (last := args.first_replica_port + args.replicas - 1) > LAST_PORT:
        parser.error(f"--first-replica-port: the last of {args.replicas} replicas would get {last}, above {LAST_PORT}")
    return args


def main() -> int:
    args = parse_args(sys.argv[1:], os.environ)
    stop = StopRequest()
    ports = Ports(**{field.name: getattr(args, f"{field.name}_port") for field in fields(Ports)})
    try:
        with LocalStack(state_dir=args.state_dir, ports=ports, replicas=args.replicas, report=tell) as stack:
            serve(stack, stop)
    except StackError as problem:
        print(f"scripts/up: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
