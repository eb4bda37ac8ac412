"""Simulated owners, who are one with the coordinator: under `flwr run` and `visard simulate` alike."""

import fcntl
from collections.abc import Mapping, Sequence
from pathlib import Path

from client.secret_store import PEER_KEY, load_peer_key, make_peer_key
from common.errors import ConfigError
from common.faces.procedural import parse_source
from common.fields import Scalar, keys_of
from common.privacy.masks import fingerprint
from common.privacy.units import PrivacyModel
from common.sections import FaceSource


def simulated_owner(node: Mapping[str, Scalar], run: Mapping[str, Scalar], run_id: int) -> dict[str, Scalar]:
    """A simulated node's share: its own procedural persons, or its own source where `data` has the placeholder
    {client}; it may stand in `attributes` too.

    Only a worker of Flower's simulation engine gets here, where coordinator and owner are one: at a real node the run's
    configuration names neither data nor budget.
    """
    if run["partitioner"] not in ("person", "iid"):
        raise ConfigError(
            f"partitioner = {run['partitioner']!r}: under `flwr run` each simulated client has its own persons, evenly; deal out "
            "otherwise with `visard simulate`"
        )
    client, clients = int(node["partition-id"]), int(node["num-partitions"])
    owners = Path(str(run.get("runs-dir", "runs"))).expanduser() / f"flwr-{run_id}" / "clients"
    source = {key: run[key] for _, key in keys_of(FaceSource)}
    data = str(source["data"])
    if data.startswith("procedural:"):
        persons, images, seed = parse_source(data.removeprefix("procedural:"))
        mine = persons[len(persons) * client // clients : len(persons) * (client + 1) // clients]
        data = f"procedural:persons={len(mine)},first={mine.start},images={images},seed={seed}"
    elif "{client}" in data:
        data = data.replace("{client}", str(client))
    else:
        raise ConfigError(
            f"data = {data!r}: under `flwr run` a simulated client needs its own faces: procedural:..., or a path or source with "
            "{client} in it, such as flwr-datasets:...,partition={client}; `visard simulate` deals out one folder"
        )
    return {
        **source,
        "data": data,
        "attributes": str(source["attributes"]).replace("{client}", str(client)),
        "state-dir": str(owners / str(client)),
        **simulated_limits(run),
        **simulated_peers(run, [owners / str(number) for number in range(clients)]),
    }


def simulated_peers(run: Mapping[str, Scalar], state_dirs: Sequence[Path]) -> dict[str, Scalar]:
    """Of a distributed run: what the owners who keep their state in these folders pin, each with a peer key, made where it is missing."""
    if run["privacy-model"] != PrivacyModel.DISTRIBUTED:
        return {}
    keys = []
    state_dirs[0].parent.mkdir(parents=True, exist_ok=True)
    with (state_dirs[0].parent / "peers.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # several processes may simulate the clients
        for state_dir in state_dirs:
            path = state_dir / PEER_KEY
            key = load_peer_key(path) if path.exists() else make_peer_key(path)
            keys.append(key.public_key().public_bytes_raw())
    return {"peers": fingerprint(keys)}


def simulated_limits(run: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The limits of a simulated owner, who is one with the coordinator: what a run of these flat keys asks, and no
    more. Nobody's privacy rests on floors that its own configuration sets, so noise has none but the budget.
    """
    private = run["privacy-model"] != PrivacyModel.NONE
    return {
        "max-epsilon": run["epsilon"] if private else 0.0,
        "delta": run["delta"],
        "unit": str(run["unit"]),
        "allowed-privacy-models": str(run["privacy-model"]),
        "allowed-discriminators": run["discriminator"],
        "min-noise-multiplier": 0.0,
        "min-moment-noise-multiplier": 0.0,
        "min-cohort": 1,
        "min-noise-shares": 1,
        "min-expected-batch": 0.0,
        "max-sample-rate": run["sample-rate"],
        "max-images-per-person": run["images-per-person"],
        "max-parameters": 10**10,
        "max-local-steps": run["local-steps"],
        "max-planned-steps": 10**9,
        "max-augment-views": run["augment-views"],
        "max-fakes": 10**9,
    }
