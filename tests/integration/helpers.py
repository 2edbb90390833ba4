"""Run the command as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

LIMIT_S = 1500  # for what is to end by itself
MEASURED_TIMES = ["train_seconds", "peak_memory_bytes", "samples_per_second"]


def environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "SSL_DIVERSITY_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "WANDB_MODE": "offline",
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ssl_diversity", *arguments]


def run(home: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `ssl-diversity ARGUMENTS` in `home`; its exit status must be `status`."""
    try:
        done = subprocess.run(
            command(*arguments),
            cwd=home,
            env=environment(home),
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired as late:
        told = [(text or b"").decode()[-4000:] for text in (late.stdout, late.stderr)]
        raise AssertionError(
            f"{arguments}: not done after {late.timeout:.0f} s\n{told[0]}\n{told[1]}"
        ) from None
    assert done.returncode == status, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr or status == 1, done.stderr
    return done


def results(home: Path, sweep: str = "quickstart") -> pd.DataFrame:
    return pd.read_csv(home / "runs" / sweep / "results.csv")


def comparable(table: pd.DataFrame) -> pd.DataFrame:
    """Everything but measured times and memory, which no two runs share."""
    return table.drop(columns=[c for c in MEASURED_TIMES if c in table]).reset_index(drop=True)


def weights(home: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The final weights of every cell, by key."""
    return {
        path.parent.name: torch.load(path, weights_only=True)["state_dict"]
        for path in sorted((home / "store" / "pretrain").glob("*/*/weights.pt"))
    }


def equal_weights(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    assert left
    assert left.keys() == right.keys()
    return all(torch.equal(left[key][name], right[key][name]) for key in left for name in left[key])


def labelled_folder(folder: Path, per_class: int = 30, size: int = 20) -> Path:
    """An ImageFolder tree of three easy classes: stripes across, stripes down, noise."""
    draw = np.random.default_rng(0)
    for name in ("across", "down", "noise"):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            image = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
            phase = draw.integers(0, 4)
            if name != "noise":
                stripes = (((np.arange(size) + phase) // 2 % 2) * 200).astype(np.uint8)
                image = image // 8 + (stripes[:, None, None] if name == "across" else stripes[None, :, None])
            Image.fromarray(image.astype(np.uint8)).save(folder / name / f"{i:03d}.png")
    return folder
