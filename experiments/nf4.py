"""
Weights in 4 bits: why NF4 and not another code, and what fits into 48 GB.

The sentences of the documents: QLoRA "combines LoRA with 4-bit NormalFloat (NF4) quantization of
frozen weights", applies "double quantization on quantization constants" and "enables fine-tuning of
a 65B-parameter model on a single 48GB GPU" (001 section 2.4.2); 003 calls NF4 optimal for weights
that are normally distributed. Three codes of 16 numbers, each scaled to the largest of 64
neighbours:

  nf4     quantiles of a normal distribution (kernels/nf4.py)
  int4    -7 ... 7, evenly spaced, of which 0 is one
  fp4     +-(0, .5, 1, 1.5, 2, 3, 4, 6): a sign, two bits of exponent, one of mantissa

on normal numbers and on the matrices of the base model of a seed: the error, and the validation
loss of the model with these matrices. Then bytes, measured here, and computed for Llama's sizes.

What came out, three seeds: NF4's error is .092 on normal numbers and on the model's matrices alike,
fp4's .106, int4's .108 to .109; the model loses .0085, .0104 and .0118 nats per token. Double
quantization costs nothing and saves .05 byte a weight. 65 billion parameters take 47.4 GB, if one
row of 512 tokens is trained on at a time.

    python experiments/nf4.py              # results/nf4.png and .md
    python experiments/nf4.py --quick      # one seed
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor

import evaluate
import lora
from experiments.base import base_models, cell, documents, save, show_table
from kernels.nf4 import BLOCK, CODE, quantize_absmax
from model import ModelConfig, Transformer, parameter_count
from plumbing.folders import load_model
from plumbing.forecast import activation_bytes
from plumbing.options import command_line

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODES = {"nf4": CODE, "int4": tuple(i / 7 for i in range(-7, 8)),
         "fp4": tuple(sorted({sign * x / 6 for x in FP4 for sign in (-1, 1)}))}
# Layers, width, heads and width of the MLP of Llama (Touvron et al. 2023, table 2).
LLAMAS = {"7B": (32, 4096, 32, 11_008), "13B": (40, 5120, 40, 13_824),
          "33B": (60, 6656, 52, 17_920), "65B": (80, 8192, 64, 22_016)}
RANK = 64                              # of Dettmers et al. 2023, beside all matrices
ROW = 512                              # tokens in the one row that is trained on at a time


@dataclass
class Config:
    seeds: str = "0,1,2"              # of the base models
    figure: str = "results/nf4.png"   # the picture; the tables beside it, as .md
    quick: bool = False               # one seed, marked


# ---------------------------------------------------------------------- errors

def rounded(weight: Tensor, code: tuple[float, ...], double: bool) -> Tensor:
    """weight (N, D) -> what is left of it: each block of 64 by its largest number, each number the
    nearest of the code. double: the largest numbers themselves in 8 bits."""
    D = weight.shape[1]
    blocks = F.pad(weight, (0, -D % BLOCK)).unflatten(1, (-1, BLOCK))      # (N, ceil(D / 64), 64)
    absmax = blocks.abs().amax(-1)                                         # (N, ceil(D / 64))
    divisor = torch.where(absmax == 0, 1.0, absmax)
    levels = torch.tensor(code)
    borders = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(blocks / divisor[..., None], borders)]
    if double:
        codes, scale, mean = quantize_absmax(absmax)
        scales = scale.repeat_interleave(256)[:codes.numel()].view_as(absmax)
        absmax = (mean + scales * codes).clamp(min=0)
    return (nearest * absmax[..., None]).flatten(1)[:, :D]


def error(weight: Tensor, code: tuple[float, ...], double: bool) -> float:
    """|w - w^| / |w|"""
    return ((weight - rounded(weight, code, double)).norm() / weight.norm()).item()


def measured(base: Path, seed: int, code: tuple[float, ...], double: bool) -> dict[str, float]:
    """The errors, and what the base model of a seed loses, in nats per token."""
    model, _ = load_model(base / "pretrain")
    windows = documents(base, seed)
    before = evaluate.validation_loss(model, windows, 64, 16)
    errors = []
    for _, _, linear in lora.linears(model.blocks):
        weight = linear.weight.detach()
        errors.append(error(weight, code, double))
        linear.weight.data = rounded(weight, code, double)
    normal = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(seed))
    loss = evaluate.validation_loss(model, windows, 64, 16)
    return {"normal": error(normal, code, double), "weights": sum(errors) / len(errors),
            "loss": loss - before}


# ---------------------------------------------------------------------- bytes

def measured_bytes(base: Path) -> tuple[float, float]:
    """Bytes a parameter of the base's quantized matrices, with double quantization or without."""
    found = []
    for double in (True, False):
        model, _ = load_model(base / "pretrain")
        n = sum(linear.weight.numel() for _, _, linear in lora.linears(model.blocks))
        lora.quantize(model, double)
        held = sum(buffer.nbytes for _, _, linear in lora.linears(model.blocks)
                   for buffer in linear.buffers())
        found.append(held / n)
    return found[0], found[1]


def gigabytes(name: str, bytes_a_weight: float) -> dict[str, float]:
    """What fine-tuning a Llama of this size takes: matrices at so many bytes a weight, embedding,
    head and norms in 16 bits, LoRA with fp32 weights, gradients and two moments, activations of one
    row whose blocks are computed again in the backward pass."""
    layers, width, heads, d_ff = LLAMAS[name]
    config = ModelConfig(vocab_size=32_000, context_length=2048, d_model=width, n_layers=layers,
                         n_heads=heads, n_kv_heads=heads, d_ff=d_ff, tied=False)
    with torch.device("meta"):
        model = Transformer(config)
        n = parameter_count(model)
        n_matrices = sum(linear.weight.numel() for _, _, linear in lora.linears(model.blocks))
        lora.attach(model, lora.Options("lora", RANK, lora_targets="wq,wk,wv,wo,w13,w2"))
    n_learned = parameter_count(model, trainable=True)
    parts = {"weights": n_matrices * bytes_a_weight + 2 * (n - n_matrices),
             "LoRA": 16 * n_learned,
             "activations": activation_bytes(config, 1, ROW, 2, checkpointing=True)}
    found = {part: size / 1e9 for part, size in parts.items()}
    return found | {"all": sum(found.values())}


# ---------------------------------------------------------------------- what is shown

def draw(found: dict[tuple, list[dict]], file: Path, mark: str) -> None:
    """The codes beside the normal density, and the errors on normal and on real weights."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    for place, (name, code) in enumerate(CODES.items()):
        left.plot(code, [place] * len(code), "|", markersize=24, color=f"C{place}")
        for number, weights in enumerate(("normal", "weights")):
            errors = [figures[weights] for figures in found[name, True]]
            right.bar(place + 0.35 * number, sum(errors) / len(errors), 0.33, color=f"C{place}",
                      alpha=1 - 0.5 * number)
    left.set_yticks(range(len(CODES)), CODES)
    left.set(title="16 numbers", xlabel="of the largest of 64 neighbours", ylim=(-0.6, 2.6))
    right.set_xticks([0.17, 1.17, 2.17], CODES)
    right.set(title=f"Error: normal numbers, and the model's (pale){mark}", ylabel="|w - w^| / |w|")
    right.grid(axis="y", alpha=0.3)
    save(figure, file)


def table(found: dict[tuple, list[dict]], cfg: Config, n_bytes: tuple[float, float]) -> str:
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# Weights in 4 bits{mark}", "",
             f"`python experiments/nf4.py`, seeds {cfg.seeds}: the mean, and from the lowest to "
             "the highest. Errors |w - w^| / |w|; loss: nats per token more on held-out documents.",
             "",
             "| code | constants | normal numbers | the model's matrices | loss |",
             "|---|---|---|---|---|"]
    for (name, double), of_seeds in found.items():
        cells = [cell([figures[which] for figures in of_seeds], form)
                 for which, form in (("normal", ".4f"), ("weights", ".4f"), ("loss", "+.4f"))]
        lines.append(f"| {name} | {'8 bits' if double else 'fp32'} | {' | '.join(cells)} |")
    doubly, once = n_bytes
    lines += ["", f"The matrices here take {doubly:.3f} bytes a weight, {once:.3f} without double "
              f"quantization. Computed from {4.127 / 8:.3f} bytes for Llama's sizes: gigabytes to "
              f"fine-tune with LoRA of rank {RANK} beside all matrices on one row of {ROW} tokens, "
              "and as much with weights in 16 bits:", "",
              "| | weights | LoRA and its optimizer | activations | all | in 16 bits |",
              "|---|---|---|---|---|---|"]
    for name in LLAMAS:
        sizes = gigabytes(name, 4.127 / 8)
        cells = [f"{sizes[part]:.1f}" for part in ("weights", "LoRA", "activations", "all")]
        lines.append(f"| {name} | {' | '.join(cells)} | {gigabytes(name, 2.0)['all']:.1f} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
    bases = {int(seed): base_models(int(seed)) for seed in cfg.seeds.split(",")}
    found = {}
    for name, code in CODES.items():
        for double in (True, False):
            found[name, double] = [measured(base, seed, code, double)
                                   for seed, base in bases.items()]
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg, measured_bytes(next(iter(bases.values())))))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
