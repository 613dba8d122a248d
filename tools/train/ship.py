#!/usr/bin/env python3
"""Pack a run's results into few, small files, and put them together again.

  ship.py pack   WORK DIR    weights in parts of at most 15 MiB, everything else in one train.json
  ship.py unpack DIR OUT     the drafter folders again (config.json, model.safetensors, train.json)

WORK holds generate.json, eval.json and a folder per drafter. Whatever is missing (a phase that did not
finish) is left out. A part is a plain slice: `cat dspark.part* > model.safetensors` does the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

PART = 15 * 1024 * 1024
DRAFTERS = ("dspark", "mtp")


def read(path: Path) -> object:
    return json.loads(path.read_text()) if path.is_file() else None


def pack(work: Path, out: Path, command: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    record = {"command": command, "generate": read(work / "generate.json"), "evaluate": read(work / "eval.json"), "drafters": {}}
    for name in DRAFTERS:
        weights = work / name / "model.safetensors"
        if not weights.is_file():
            continue
        data = weights.read_bytes()
        parts = [data[i : i + PART] for i in range(0, len(data), PART)]
        for i, part in enumerate(parts):
            (out / f"{name}.part{i}").write_bytes(part)
        record["drafters"][name] = {"config": read(work / name / "config.json"), "train": read(work / name / "train.json"), "bytes": len(data),
                                    "sha256": hashlib.sha256(data).hexdigest(), "parts": len(parts)}
    (out / "train.json").write_text(json.dumps(record, indent=1) + "\n")
    print("ship:", ", ".join(f"{p.name} {p.stat().st_size / 1e6:.1f} MB" for p in sorted(out.iterdir())), flush=True)


def unpack(packed: Path, out: Path) -> None:
    record = read(packed / "train.json")
    for name, drafter in record["drafters"].items():
        data = b"".join((packed / f"{name}.part{i}").read_bytes() for i in range(drafter["parts"]))
        if hashlib.sha256(data).hexdigest() != drafter["sha256"]:
            raise SystemExit(f"ship: error: the parts of {name} do not add up to the recorded sha256")
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(data)
        (folder / "config.json").write_text(json.dumps(drafter["config"], indent=2) + "\n")
        evaluation = {k: v for k, v in (record["evaluate"] or {}).items() if k != "results"}
        evaluation["results"] = ((record["evaluate"] or {}).get("results") or {}).get(name)
        history = {"command": record["command"], "generate": record["generate"], "train": drafter["train"], "evaluate": evaluation}
        (folder / "train.json").write_text(json.dumps(history, indent=1) + "\n")
        print(f"wrote {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--command", default="", help="recorded in train.json")
    args = parser.parse_args()
    pack(args.source, args.destination, args.command) if args.action == "pack" else unpack(args.source, args.destination)


if __name__ == "__main__":
    main()
