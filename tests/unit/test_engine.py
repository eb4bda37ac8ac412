"""The in-process Grid: lazy, isolated, one context for each client."""

import gc
import logging
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

import common.flower
from common.errors import ConfigError, DataError, ProtocolError
from simulations.engine import InProcessGrid

calls: list[int] = []
app = ClientApp()


@app.train("add")
def add(message: Message, context: Context) -> Message:
    """Add the node's own number to the vector, and count the calls in the state."""
    calls.append(context.node_id)
    seen = int(context.state["seen"]["n"]) if "seen" in context.state else 0  # type: ignore[arg-type,index,call-overload]
    context.state["seen"] = ConfigRecord({"n": seen + 1})
    vector = read(message) + np.float32(context.node_config["number"])
    message.content["arrays"]["v"].data = b"spoilt"  # type: ignore[index,union-attr]
    message.content["config"]["list"].append(9)  # type: ignore[index,union-attr]
    message.metadata.__dict__["_dst_node_id"] = 99
    context.node_config["number"] = -1.0
    context.run_config["rounds"] = -1
    reply = Message(content(vector, seen=seen, rounds=context.run_config["rounds"]), reply_to=message)
    message.metadata.__dict__["_message_id"] = "spoilt"
    return reply


@app.train("fail")
def fail(message: Message, context: Context) -> Message:
    context.state["seen"] = ConfigRecord({"n": 1000})
    raise DataError("/home/owner/photographs holds 17 faces")


@app.train("refuse")
def refuse(message: Message, context: Context) -> Message:
    return Message(Error(code=101, reason="BudgetExhausted"), reply_to=message)


@app.train("nothing")
def nothing(message: Message, context: Context) -> Message:
    return None  # type: ignore[return-value]


@app.train("foreign")
def foreign(message: Message, context: Context) -> Message:
    return Message(RecordDict(), 2, "train")


def content(vector: np.ndarray, **scalars: object) -> RecordDict:
    array = Array(dtype="float32", shape=vector.shape, stype="raw", data=vector.tobytes())
    return RecordDict({"arrays": ArrayRecord({"v": array}), "config": ConfigRecord({"list": [1, 2], **scalars})})  # type: ignore[dict-item]


def read(message: Message) -> np.ndarray:
    return np.frombuffer(message.content["arrays"]["v"].data, dtype=np.float32)  # type: ignore[index,union-attr]


def grid_of(num_clients: int) -> InProcessGrid:
    return InProcessGrid(app, [{"number": float(i)} for i in range(num_clients)], {"rounds": 3})


def messages(grid: InProcessGrid, action: str, records: RecordDict) -> list[Message]:
    return [Message(records, node, f"train.{action}", ttl=30.0, group_id="1") for node in grid.get_node_ids()]


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def test_each_client_answers_its_own_message() -> None:
    grid = grid_of(3)
    nodes = grid.get_node_ids()
    assert nodes == sorted(set(nodes))
    ids = grid.push_messages(messages(grid, "add", content(np.zeros(4, np.float32))))
    assert len(set(ids)) == 3
    replies = {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(reversed(ids))}
    for i, message_id in enumerate(ids):
        reply = replies[message_id]
        assert reply.metadata.src_node_id == nodes[i]
        np.testing.assert_array_equal(read(reply), np.full(4, i, np.float32))
    assert calls == nodes[::-1]


def test_clients_run_only_as_their_replies_are_pulled() -> None:
    grid = grid_of(5)
    ids = grid.push_messages(messages(grid, "add", content(np.zeros(1, np.float32))))
    pulled = iter(grid.pull_messages(ids))
    assert calls == []
    next(pulled)
    next(pulled)
    assert calls == grid.get_node_ids()[:2]
    assert len(list(grid.pull_messages(ids))) == 3  # the other three; none is answered twice
    assert list(grid.pull_messages([*ids, "unknown"])) == []


def test_a_client_cannot_change_what_the_sender_or_another_client_holds() -> None:
    grid = grid_of(2)
    records = content(np.ones(2, np.float32))
    first, second = grid.send_and_receive(messages(grid, "add", records))
    np.testing.assert_array_equal(read(second), np.full(2, 2, np.float32))
    assert records["config"]["list"] == [1, 2]  # type: ignore[index]
    assert first.content["config"]["rounds"] == second.content["config"]["rounds"]  # type: ignore[index]
    again = grid.send_and_receive(messages(grid, "add", records))
    np.testing.assert_array_equal(read(again[1]), np.full(2, 2, np.float32))


def test_state_is_kept_for_each_client_and_not_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    grid = grid_of(2)
    records = content(np.zeros(1, np.float32))
    for server_round in range(3):
        grid.send_and_receive(messages(grid, "fail", records))
        replies = grid.send_and_receive(messages(grid, "add", records))
        assert [reply.content["config"]["seen"] for reply in replies] == [server_round] * 2  # type: ignore[index]


def test_errors_become_replies_without_their_text(caplog: pytest.LogCaptureFixture) -> None:
    grid = grid_of(1)
    records = content(np.zeros(1, np.float32))
    with caplog.at_level(logging.ERROR):
        failed, refused, none, strange, unknown = (
            grid.send_and_receive(messages(grid, action, records))[0]
            for action in ("fail", "refuse", "nothing", "foreign", "unheard")
        )
    assert (failed.error.code, failed.error.reason) == (2, "DataError")
    assert "17 faces" in caplog.text
    assert (refused.error.code, refused.error.reason) == (101, "BudgetExhausted")
    assert (none.error.reason, strange.error.reason, unknown.error.reason) == (
        "ProtocolError",
        "ProtocolError",
        "ValueError",
    )
    assert failed.metadata.reply_to_message_id != refused.metadata.reply_to_message_id


def test_an_unknown_node_is_refused() -> None:
    grid = grid_of(1)
    with pytest.raises(ProtocolError, match="no client has node id 77"):
        grid.push_messages([Message(RecordDict(), 77, "train.add")])


def test_memory_does_not_grow_with_the_cohort() -> None:
    """A running sum over 60 replies of 4 MB each stays far below the cohort's 240 MB."""
    grid = grid_of(60)
    vector = np.zeros(1_000_000, np.float32)
    ids = grid.push_messages(messages(grid, "add", content(vector)))
    gc.collect()
    tracemalloc.start()
    total = np.zeros_like(vector)
    for reply in grid.pull_messages(ids):
        total += read(reply)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total[0] == sum(range(60))
    assert peak < 30e6


def test_idle_clients_cost_next_to_nothing() -> None:
    tracemalloc.start()
    grid = grid_of(1000)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(grid.get_node_ids()) == 1000
    assert used < 1000 * 1000


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.flower, "TESTED_VERSION", "1.40.0")
    with pytest.raises(ConfigError, match=r"flwr 1\.41\.0 is installed, but only 1\.40\.0"):
        grid_of(1)
