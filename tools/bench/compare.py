#!/usr/bin/env python3
"""Merges a record of `benches/kernels` and one of tools/bench/peers.py into one markdown table.

    tools/bench/compare.py ours.json peers.json > table.md

"x peer" is the peer's time divided by ours: above 1 dspark is faster. Every peer of a case is shown, the fastest first;
cases without a peer are shown too. Both records must come from the same kind of GPU.
"""
import argparse
import json
import sys


def load(path):
    try:
        with open(path) as file:
            record = json.load(file)
        return record["header"], record["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {path}: no record of a bench ({type(error).__name__}: {error})")


def peers_by_case(rows):
    found = {}
    for row in rows:
        found.setdefault((row["family"], row["case"]), []).append(row)
    return {key: sorted(peers, key=lambda row: row["us"]) for key, peers in found.items()}


def against(row, peers):
    return "; ".join(f"{peer['us'] / row['us']:.2f} {peer['peer']} ({peer['us']:.1f})" for peer in peers)


def title(ours, peers):
    mhz = lambda name: "?" if ours[name] is None else ours[name]
    clocks = f"SM {mhz('sm_clock_mhz')} of {mhz('max_sm_clock_mhz')} MHz, memory {mhz('memory_clock_mhz')} MHz"
    versions = ", ".join(f"{name} {version}" for name, version in peers["versions"].items())
    return [f"{ours['gpu']}, driver {ours['driver']}, {clocks}; dspark {ours['commit']}, {ours['date']}; "
            f"peers {peers['date']}: {versions}", "",
            f"Device copy {ours['copy_gb_per_s']:.0f} GB/s (read + write). CUDA graphs, cold L2, median of "
            f"{ours['replays']} replays. x peer: the peer's time over ours, the peer's µs in brackets."]


def table(family, rows, peers):
    lines = ["", f"| {family} | us (p50, noise) | GB/s | % of copy | x peer |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['case']} | {row['us']:.2f} (±{row['noise'] * 100:.1f} %) | {row['gb_per_s']:.0f} | "
                     f"{row['copy_fraction'] * 100:.0f} | {against(row, peers.get((family, row['case']), []))} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours")
    parser.add_argument("peers")
    options = parser.parse_args()
    (our_header, our_rows), (peer_header, peer_rows) = load(options.ours), load(options.peers)
    if our_header["gpu"] != peer_header["gpu"]:
        sys.exit(f"error: GPUs differ: {options.ours} has {our_header['gpu']}, {options.peers} {peer_header['gpu']}")
    peers = peers_by_case(peer_rows)
    lines = title(our_header, peer_header)
    for family in dict.fromkeys(row["family"] for row in our_rows):
        lines += table(family, [row for row in our_rows if row["family"] == family], peers)
    print("\n".join(lines))
    unmatched = set(peers) - {(row["family"], row["case"]) for row in our_rows}
    if unmatched:
        print(f"{len(unmatched)} cases of the peers have no row of ours, such as {sorted(unmatched)[0]}",
              file=sys.stderr)


if __name__ == "__main__":
    main()
