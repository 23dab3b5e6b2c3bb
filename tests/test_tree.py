"""The repository stays small enough to be copied to a machine with an accelerator."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 45 * 2**20


def test_tracked_files_stay_small():
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    except FileNotFoundError:
        pytest.skip("git isn't installed, so the tracked files are unknown")
    if listed.returncode:
        pytest.skip("this isn't a git checkout, so the tracked files are unknown")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:10]
    assert sum(sizes.values()) <= LARGEST, f"the largest: {[str(path) for path in largest]}"
