"""Shared pieces of the golden dumps: seeded weights, checkpoint files, JSON, margins."""

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import save_file


def seeded(seed: int) -> torch.Generator:
    """A CPU generator with a fixed seed: every weight and prompt comes from one of these."""
    return torch.Generator().manual_seed(seed)


def normal(shape: tuple[int, ...], std: float, gen: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=gen) * std


def randomize(module: torch.nn.Module, gen: torch.Generator, gains: dict[str, float]) -> None:
    """Fills every parameter with seeded normals.

    Matrices get std = gain / sqrt(fan_in), norm weights sit around their gain, biases are small. `gains` maps a
    substring of the parameter name to its gain (first match wins, default 1).
    """
    with torch.no_grad():
        for name, param in module.named_parameters():
            gain = next((g for key, g in gains.items() if key in name), 1.0)
            if param.ndim == 2:
                param.copy_(normal(tuple(param.shape), gain / math.sqrt(param.shape[1]), gen))
            elif "norm" in name:
                param.copy_(gain + normal(tuple(param.shape), 0.15, gen))
            else:
                param.copy_(normal(tuple(param.shape), 0.2 * gain, gen))


def round_weights(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Rounds parameters through the storage dtype, so that the f32 run sees exactly what the file holds."""
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(param.to(dtype).float())


def write_json(path: Path, value: object) -> None:
    """Indented JSON, with every list of plain values on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    flat = re.compile(r"\[\s*([^\[\]{}\"]*?)\s*\]")
    text = flat.sub(lambda m: "[" + re.sub(r"\s*\n\s*", " ", m.group(1)) + "]", text)
    assert json.loads(text) == value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def margins(logits: torch.Tensor) -> list[float]:
    """Top-1 minus top-2 of every row: how far a greedy decision is from a tie."""
    top = logits.float().topk(2, dim=-1).values
    return [round(float(x), 4) for x in (top[..., 0] - top[..., 1]).reshape(-1)]
