"""All stages in order, from nothing to the files that the package ships.

python -m training OUT                        # under two hours on one CPU core with bfloat16 units
python -m training OUT --scale 0.02 --to OUT  # a fiftieth of it, to see that it runs
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# Shares of the time, and pictures at a share of 1.
MINUTES = {"tower": 40.0, "language": 36.0, "anyres": 16.0}
PICTURES = {"easy": 4000, "pool": 44000, "text": 9000, "anyres": 5000}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train both checkpoints.")
    parser.add_argument("out", type=Path, help="folder for pictures, states and logs")
    parser.add_argument("--scale", type=float, default=1.0, help="of all times and pools")
    parser.add_argument("--to", type=Path, help="where the checkpoints go; the package without")
    options = parser.parse_args()
    out, scale = options.out, options.scale
    count = {name: str(max(200, round(n * scale))) for name, n in PICTURES.items()}
    time = {name: str(minutes * scale) for name, minutes in MINUTES.items()}

    def run(module: str, *arguments: object) -> None:
        command = [sys.executable, "-m", f"training.{module}", *map(str, arguments)]
        print(" ".join(command[1:]), flush=True)
        subprocess.run(command, check=True)

    run("pool", out / "easy", "--easy", "--count", count["easy"], "--first", 500_000_000)
    run("pool", out / "pool", "--count", count["pool"])
    run("pool", out / "text", "--text", "--count", count["text"], "--first", 700_000_000)
    pools = ["--easy", out / "easy", "--text", out / "text"]
    run("tower", out / "pool", out / "tower", *pools, "--minutes", time["tower"])
    run("language", out / "pool", out / "tower", out / "language", "--minutes", time["language"])
    target = ["--to", options.to] if options.to else []
    run("export", out / "tower", out / "language", *target)
    run(
        *("anyres", out / "tower", out / "language", out / "anyres"),
        *("--minutes", time["anyres"], "--count", count["anyres"]),
    )
    run("export", out / "tower", out / "anyres", "--name", "llava-shapes-next", *target)


if __name__ == "__main__":
    main()
