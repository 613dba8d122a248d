"""Writes tests/goldens: tiny checkpoints and what transformers and DeepSpec compute on them. See README.md."""

import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
PARTS = ("targets", "drafters", "mtp", "filters", "demo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=[], help=f"any of {', '.join(PARTS)}; default all but demo")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "tests" / "goldens")
    parser.add_argument("--deepspec", type=Path, help="checkout of deepseek-ai/DeepSpec (drafters)")
    parser.add_argument("--demo-target", type=Path, help="directory of SmolLM2-135M-Instruct (demo)")
    args = parser.parse_args()
    parts = args.parts or [p for p in PARTS if p != "demo"]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    if "targets" in parts:
        import targets

        targets.dump(args.out)
    if "drafters" in parts:
        if args.deepspec is None:
            parser.error("drafters need --deepspec")
        sys.path.insert(0, str(args.deepspec))
        import drafters

        drafters.dump(args.out)
    if "mtp" in parts:
        import mtp

        mtp.dump(args.out)
    if "filters" in parts:
        import filters

        filters.dump(args.out)
    if "demo" in parts:
        if args.demo_target is None:
            parser.error("demo needs --demo-target")
        import demo

        demo.dump(args.out, args.demo_target)


if __name__ == "__main__":
    main()
