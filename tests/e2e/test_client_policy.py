"""The owner's commands as an owner types them: a policy is written, a run is judged by it, and a node starts with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.faces import load_faces
from common.pictures import save_png
from common.sections import FaceSource

pytestmark = pytest.mark.e2e

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "COLUMNS": "160",
    "NO_COLOR": "1",
}


def visard(folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "visard", *command],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


def test_init_check_and_a_start_that_is_refused(tmp_path: Path) -> None:
    faces = load_faces(FaceSource(data="procedural:persons=4,images=2"), 32, 3)
    for index, (image, person) in enumerate(zip(faces.images, faces.persons, strict=True)):  # type: ignore[arg-type]
        (tmp_path / f"faces/{person}").mkdir(parents=True, exist_ok=True)
        save_png(tmp_path / f"faces/{person}/{index}.png", image)
    written = visard(tmp_path, "client", "init", "--data", "faces")
    assert written.returncode == 0, written.stdout
    assert "visard client check --policy owner.toml" in written.stdout

    good = visard(tmp_path, "client", "check", "demo", "--privacy-model", "local")
    assert good.returncode == 0, good.stdout
    assert "4 units (person), 8 images" in good.stdout
    refused = visard(tmp_path, "client", "check", "demo")
    assert refused.returncode == 1
    assert "privacy-model central" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "faces.visard", "owner.toml"]
    assert not (tmp_path / "faces.visard" / "cache").exists(), "looking leaves nothing behind"

    alone = visard(tmp_path, "client", "start")
    assert alone.returncode == 1
    assert "owner.toml names no coordinator: get an invitation" in alone.stdout
    assert "Traceback" not in alone.stdout
    policy = tmp_path / "owner.toml"
    policy.write_text(policy.read_text().replace("max-sample-rate = 0.5", "max-sample-rat = 0.5"))
    misspelt = visard(tmp_path, "client", "start")
    assert misspelt.returncode == 1
    assert "did you mean 'max-sample-rate'?" in misspelt.stdout
    assert "Traceback" not in misspelt.stdout
    policy.unlink()
    missing = visard(tmp_path, "client", "start")
    assert missing.returncode == 1
    assert "visard client init" in missing.stdout
