"""Nobody's code runs but what is installed: not a stranger's at the coordinator, not even the coordinator's own at a node.

Flower's SuperLink and SuperNode run what they are sent; here a bundle that would leave a file behind is offered in every way
that Flower's own clients know.
"""

import contextlib
import inspect
import io
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.runtime.runtime_http_client import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message import Message as Proto

import server.fleet
from common.secure_messages import DealAnswer, KeyAnswer, KeyRequest
from server.deployment import Deployment
from server.registry import Registry
from server.superlink import SuperLinkGrid, superlink_grid
from tests.e2e.deployed import SMALL, Made, Running, deployment

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    # flwr's own, when it packs an app.
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

RUN = {**SMALL, "privacy-model": "local", "num-rounds": "100000"}
SERVED = {
    f"/v1/fleet/{name}"
    for name in ("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages")
}


class Trap:
    """Whoever unpickles it leaves a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A file that must not come to be."""
    path = tmp_path / "sprung"
    yield path
    assert not path.exists(), "foreign code was executed"


def foreign_bundle(trap: Path) -> bytes:
    """An app, packed by Flower, that leaves a file when it is imported, and when it is installed."""
    touch = f"import pathlib; pathlib.Path({str(trap)!r}).touch()\n".encode()
    app = touch + b"from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\napp = %s()\n"
    settings = b"""
[project]
name = "foreign"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr==1.41.0"]
[tool.flwr.app]
publisher = "stranger"
fab-include = ["**/*.py"]
[tool.flwr.app.components]
serverapp = "foreign.server:app"
clientapp = "foreign.client:app"
"""
    files: dict[str, Any] = {
        "pyproject.toml": settings,
        "foreign/__init__.py": touch,
        "foreign/server.py": app % b"ServerApp",
        "foreign/client.py": app % b"ClientApp",
        "setup.py": touch,
    }
    return build_fab_from_files(files)[0]


def filled(kind: type[Proto], bundle: bytes) -> Proto:
    """A request of this kind with the bundle wherever there is room for one, and 1 or "1" elsewhere."""
    request = kind()
    for field in kind.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.full_name == Fab.DESCRIPTOR.full_name:
            getattr(request, field.name).CopyFrom(Fab(hash_str="1", content=bundle))
        elif field.message_type is None and not field.is_repeated:
            values = {field.TYPE_BYTES: bundle, field.TYPE_STRING: "1", field.TYPE_BOOL: True}
            setattr(request, field.name, values.get(field.type, 1))
    return request


def every_call(client: Any, bundle: bytes) -> Iterator[tuple[str, int]]:
    """Each method of one of Flower's clients, called: its name, and the HTTP status that it met."""
    for name, method in inspect.getmembers(client, inspect.ismethod):
        if not name[0].isupper():
            continue
        kind = next(hint for key, hint in get_type_hints(method).items() if key != "return")
        try:
            answer = method(filled(kind, bundle))
            if inspect.isgenerator(answer):
                next(answer, None)
            yield name, 200
        except httpx.HTTPStatusError as error:
            yield name, error.response.status_code


def test_no_route_of_flowers_takes_a_bundle(tmp_path: Path, trap: Path) -> None:
    bundle = foreign_bundle(trap)
    with deployment(tmp_path, 2, RUN) as made:
        coordinator = made.start_coordinator()
        coordinator.wait_until(lambda: made.status().get("state") == "waiting for clients", "waiting for clients")
        made.start_nodes()
        authority = (made.coordinator / "ca.crt").read_bytes()
        met: dict[str, int] = {}
        for source in ("127.0.0.1", "127.0.0.77"):
            for kind in (ControlHttpClient, RuntimeHttpClient, FleetHttpClient):
                client = kind.from_server_address(made.address, False, authority, [])
                transport = httpx.HTTPTransport(verify=tls(made), local_address=source)
                client._client.close()
                client._client = httpx.Client(transport=transport, timeout=30.0)
                with client:
                    met |= {f"{source} {kind.__name__}.{name}": status for name, status in every_call(client, bundle)}
        ours = {"ActivateNode", "DeactivateNode", "SendNodeHeartbeat", "PullMessages", "PushMessages"}
        open_ = {name for name, status in met.items() if status == 401}
        assert open_ == {f"{source} FleetHttpClient.{n}" for source in ("127.0.0.1", "127.0.0.77") for n in ours}
        assert {status for name, status in met.items() if name not in open_} == {403}
        assert len(met) > 100
        assert {"StartRun", "AcquireTask"} <= {name.rpartition(".")[2] for name in met}
        # The run takes no notice.
        rounds = len(made.rounds("small"))
        coordinator.wait_until(lambda: len(made.rounds("small")) > rounds + 1, "two more rounds")
        assert [path.name for path in made.coordinator.joinpath("runs").iterdir() if path.is_dir()] == ["small"]


def tls(made: Made) -> Any:
    import ssl

    return ssl.create_default_context(cafile=str(made.coordinator / "ca.crt"))


@contextlib.contextmanager
def malicious(made: Made, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SuperLinkGrid, set[str]]]:
    """The coordinator's machine in other hands, its keys too. Yields the paths that nodes asked for."""
    asked: set[str] = set()
    serve = server.fleet.Fleet.__call__

    async def noting(self: Any, scope: Any, receive: Any, send: Any) -> None:
        asked.add(scope.get("path", ""))
        await serve(self, scope, receive, send)

    monkeypatch.setattr(server.fleet.Fleet, "__call__", noting)
    own = Deployment.load(made.coordinator)
    registry = Registry(own.registry_path)
    with superlink_grid(own.listen, own.certificate, own.key, registry, own.signing_key(), 1 << 26) as grid:
        yield grid, asked


def ask(grid: SuperLinkGrid, node: Running, content: RecordDict, kind: str = "train") -> Message:
    """The answer of the only node."""
    node.wait_until(lambda: len(grid.get_node_ids()) == 1, "the node")
    message = Message(content, grid.get_node_ids()[0], kind, ttl=60.0, group_id="1")
    answers = grid.send_and_receive([message], timeout=60)
    assert len(answers) == 1, node.log.read_text()
    return answers[0]


def array(data: bytes, stype: str, shape: tuple[int, ...] = (4,)) -> Array:
    return Array(dtype="float32", shape=shape, stype=stype, data=data)


def test_a_node_runs_nothing_that_its_coordinator_sends(
    tmp_path: Path, trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = foreign_bundle(trap)
    pickled = pickle.dumps(Trap(trap))
    saved = io.BytesIO()
    np.save(saved, np.array([Trap(trap)], dtype=object), allow_pickle=True)
    with deployment(tmp_path, 2, RUN) as made, malicious(made, monkeypatch) as (grid, asked):
        node = made.start_node("owner-0")
        nothing = RecordDict({"config": ConfigRecord({"n": 1})})
        for kind in ("query", "evaluate", "train.foo", "query.train"):
            answer = ask(grid, node, nothing, kind)
            assert (answer.has_error(), answer.error.reason) == (True, "ValueError"), kind
        arrays = {
            "pickle": array(pickled, "pickle"),
            "object": array(saved.getvalue(), "numpy.ndarray"),
            "torch": array(pickled, "torch.Tensor"),
        }
        contents = [nothing, RecordDict()]
        contents += [
            RecordDict({"fab": ConfigRecord({"content": data, "hash": "ab" * 32})}) for data in (bundle, pickled)
        ]
        for name in ("arrays", "discriminator", "fakes", "instructions"):
            contents += [RecordDict({name: ArrayRecord({"vector": each})}) for each in arrays.values()]
            contents += [RecordDict({name: ConfigRecord({"run_id": pickled, "server_round": 1, "fab": bundle})})]
        for record in (KeyRequest.name, DealAnswer.name):
            contents.append(RecordDict({record: ConfigRecord({"run_id": pickled})}))
        for content in contents:
            assert ask(grid, node, content).has_error(), content
        # It fetches nothing, has charged nothing, and still answers what it may.
        assert asked <= SERVED
        assert made.charged("owner-0") == {}
        content = ask(grid, node, KeyRequest("ab" * 16).to_record()).content
        assert KeyAnswer.from_record(content).public_key in Registry(made.coordinator / "nodes.json").peer_keys()
        node.signal(signal.SIGTERM)
        assert node.wait(30) == 0
        told = made.node_status("owner-0")
        assert (told["answers"], told["refusals"]) == (1, len(contents) + 4)
        assert asked <= SERVED
