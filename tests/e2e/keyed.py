"""`visard` with the randomness of tests, so that two runs can be compared bit for bit; and places at which it waits.

    python -m tests.e2e.keyed coordinator start DIR      # as `python -m visard`, the worker that it starts too

The noise of an owner is a function of the name of its state-dir and the round, the coordinator's of the round alone; a node
waits half a second at most before it tries to connect again. In all else these are the shipped commands.

Where the environment variable VISARD_TEST_HOLDS names a folder, a process that comes to a place whose name is a file there
says so (NAME.reached, with its id) and waits until the file is gone, or it is killed. The names:

    OWNER-KIND-ROUND-asked, -answered       a node, before and after it computes: KIND is key, deal, confirm, unmask or round
    OWNER-charged-ROUND                     a node, its charge on the disk, nothing computed
    coordinator-KIND-ROUND-asked            the worker, its messages on their way
    coordinator-saving-ROUND, -saved-ROUND  the worker, at a checkpoint before that round
    coordinator-ended                       the worker, all rounds done, the generator not written
"""

import functools
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import visard


def hold(name: str) -> None:
    """Wait here where a test wants it."""
    folder = os.environ.get("VISARD_TEST_HOLDS")
    if folder is None or not (file := Path(folder) / name).exists():
        return
    begun = Path(f"{file}.begun")
    begun.write_text(str(os.getpid()))
    begun.rename(f"{file}.reached")
    while file.exists():
        time.sleep(0.02)


def key_client() -> None:
    """Replace the shipped ClientApp's randomness."""
    import client.app
    import client.node
    from common.privacy.ledger import Ledger
    from common.privacy.randomness import SecureRandom
    from tests.faulty_wire import owner_of
    from tests.support import keyed

    def new_random(instructions: Any, context: Any) -> SecureRandom:
        return keyed("client", owner_of(context.node_config), instructions.server_round)

    inner, charge = client.app.create_app(new_random), Ledger.charge

    def app(message: Any, context: Any) -> Any:
        nonlocal owner
        owner = owner_of(context.node_config).removesuffix(".visard")
        about = f"{owner}-{_kind(message.content)}-{message.metadata.group_id}"
        hold(f"{about}-asked")
        reply = inner(message, context)
        hold(f"{about}-answered")
        return reply

    def charged(self: Ledger, run_id: str, server_round: int, *rest: Any) -> Any:
        sent = charge(self, run_id, server_round, *rest)
        hold(f"{owner}-charged-{server_round}")
        return sent

    owner = ""
    client.node._LONGEST_WAIT_S = 0.5
    client.app.app = app  # type: ignore[assignment]
    Ledger.charge = charged  # type: ignore[method-assign]


def key_worker() -> None:
    """Replace the main loop's randomness."""
    import server.app
    from server.checkpoint import CheckpointStore
    from server.coordinator import coordinate
    from server.records import RunRecorder
    from server.superlink import SuperLinkGrid
    from tests.support import keyed_coordinator

    push, save, finish = SuperLinkGrid.push_messages, CheckpointStore.save, RunRecorder.finish

    def pushed(self: Any, messages: Iterable[Any]) -> list[str]:
        asked = list(messages)
        identifiers = push(self, asked)
        for message in asked[:1]:
            hold(f"coordinator-{_kind(message.content)}-{message.metadata.group_id}-asked")
        return identifiers

    def saved(self: Any, state: Any) -> None:
        hold(f"coordinator-saving-{state.next_round}")
        save(self, state)
        hold(f"coordinator-saved-{state.next_round}")

    def finished(self: Any, state: Any) -> Path:
        hold("coordinator-ended")
        return finish(self, state)

    server.app.coordinate = functools.partial(coordinate, new_random=keyed_coordinator)  # type: ignore[assignment]
    SuperLinkGrid.push_messages = pushed  # type: ignore[method-assign]
    CheckpointStore.save = saved  # type: ignore[method-assign]
    RunRecorder.finish = finished  # type: ignore[method-assign]


def key_supervisor() -> None:
    """Let it start this module in the place of `visard`."""
    import server.cli

    supervise = server.cli.supervise

    def keyed_worker(command: list[str], *rest: Any, **named: Any) -> int:
        return supervise(["tests.e2e.keyed" if word == "visard" else word for word in command], *rest, **named)

    server.cli.supervise = keyed_worker  # type: ignore[assignment]


def _kind(content: Any) -> str:
    from tests.faulty_wire import KINDS

    return next((kind for name, kind in KINDS.items() if name in content and kind != "mask"), "round")


if __name__ == "__main__":
    if sys.argv[1:3] == ["coordinator", "worker"]:
        key_worker()
    elif sys.argv[1:3] == ["coordinator", "start"]:
        key_supervisor()
    elif sys.argv[1:3] == ["client", "start"]:
        key_client()
    visard.main()
