"""
Scaling laws: how large a model, on how many tokens, for a given compute budget?

The sentences of the document (001 section 1.4): N_opt grows with C^a and D_opt with C^b, a and b
about 0.50; "parameters and data should scale equally with compute".

    L(N, D) = A / N^alpha + B / D^beta + L_inf,   C = 6 N D      (Hoffmann et al. 2022, approach 3)

  1. TRAIN    models of several sizes N at each of several budgets C, each with a cosine to its own
              end, and one run of a larger budget than any in the grid
  2. FIT      A, B, alpha, beta, L_inf to (N, D, L): Huber loss of log L, many starts; bootstrap
  3. PREDICT  the loss of the larger run, which the fit has not seen
  4. ALLOCATE N_opt and D_opt of a budget, beside Chinchilla's constants, its 20 tokens per
              parameter, and the earlier recipe of Kaplan et al. 2020; results/scaling_laws.png

N = FLOPs per training token / 6, so that C = 6 N D is all of the compute: every matrix that
multiplies a token, the output head's among them, and n_layers * T * D_model for attention, but not
the embedding look-up. Leaving out the head, which weighs more the smaller a model is, is most of
what made Kaplan's exponent 0.73 (Pearce & Song 2024; Porian et al. 2024). D counts target tokens.

What differs from a default run of train_pretrain.py, because all sizes and budgets shall be treated
alike:
  optimizer      Muon, and token shift: with them small models come nearer to what they can learn
  copying        none, because its steps do not read text; each token is read once
  warmup         a twentieth of the steps, so that short runs are not all warmup
  learning rate  falls with width and budget, lr = lr_64 sqrt(64 / d_model) (lr_C / C)^(1/4). Muon's
                 step is one size per element, so that a wide matrix is turned further (the spectral
                 norm grows with the square root); and a longer run ends better at a lower rate
  shape          one depth and one head width for all sizes: only the width grows

    python experiments/scaling_laws.py                    # about 15 minutes of one core's time
    python experiments/scaling_laws.py --preset smoke     # seconds; far too short to mean anything

Run again, it skips the runs that are finished and goes on with the one that was interrupted. The
gpu preset has not been run yet.

What came out (results/scaling_laws.json, .png): each budget has its best size inside the grid, and
N_opt grows with C^0.45 (80 % interval 0.28 to 0.55; Chinchilla's constants: 0.45; the document:
0.50). A run of twice the largest budget was predicted to end at 0.827 nats per token (80 %: 0.789
to 0.848), 2.8 % too low: it ended at 0.851. What stood in the way of that at first, and how lr_64
was chosen, stands in results/scaling_laws.md.
"""
import datetime
import json
import math
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import readers
import train_pretrain
from lifecycle import run_stage
from model import ModelConfig
from plumbing.device import pick_device
from plumbing.options import build, command_line
from tokenizer import Tokenizer

PARAMETERS = ("A", "B", "alpha", "beta", "L_inf")
CHINCHILLA = {"A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "L_inf": 1.69}
PF_DAY = 1e15 * 24 * 3600                                  # FLOPs
RULE_BUDGET = 2.0e22                                       # what 20 : 1 asks for 13B parameters

# Of every run, besides the preset's sizes.
TRAINING = {"optimizer": "muon", "token_shift": True, "copy_steps": 0, "weight_decay": 0.1,
            "eval_every": 0, "save_every": 1000}
# grid: {compute budget in FLOPs: widths of the models}; heldout: (budget, width), not fitted.
PRESETS = {
    "cpu": {"grid": {8e11: (32, 48, 64), 1.6e12: (32, 48, 64, 96), 3.2e12: (48, 64, 96, 128),
                     6.4e12: (64, 80, 112)},
            "heldout": (1.28e13, 112), "n_layers": 3, "vocab_size": 1024, "context_length": 128,
            "batch_size": 16, "lr_64": 0.024, "lr_C": 5e11, "eval_windows": 512,
            "max_bytes": 16_000_000},
    "gpu": {"grid": {3e13: (64, 96, 128, 192), 1e14: (96, 128, 192, 256),
                     3e14: (128, 192, 256, 384), 1e15: (192, 256, 384, 512)},
            "heldout": (3e15, 320), "n_layers": 6, "vocab_size": 4096, "context_length": 256,
            "batch_size": 32, "lr_64": 0.024, "lr_C": 5e11, "eval_windows": 1024,
            "max_bytes": 240_000_000},
    "smoke": {"grid": {1e9: (16, 24, 32), 2e9: (16, 24, 32)},
              "heldout": (4e9, 32), "n_layers": 1, "vocab_size": 512, "context_length": 32,
              "batch_size": 8, "lr_64": 0.024, "lr_C": 1e9, "eval_windows": 16,
              "max_bytes": 200_000},
}


@dataclass
class Config:
    preset: str = "cpu"               # cpu (15 minutes) | gpu | smoke (a quick try)
    bootstrap: int = 200              # resamples of the runs, for the intervals
    out: str = "out/scaling_laws"     # one model folder below it for each run
    figure: str = "results/scaling_laws.png"   # the picture; the table goes beside it, as .json
    seed: int = 0                     # of weights, batches and resamples
    device: str = "auto"              # auto | cpu | cuda | cuda:1 | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16


# ---------------------------------------------------------------------- the law

def predicted_loss(N, D, law: dict[str, float]):
    """L(N, D) = A / N^alpha + B / D^beta + L_inf, nats per token (Hoffmann et al. 2022, eq. 2).
    N parameters, D tokens: numbers or tensors."""
    size_term = law["A"] / N ** law["alpha"]
    data_term = law["B"] / D ** law["beta"]
    return size_term + data_term + law["L_inf"]


def optimal_allocation(C: float, law: dict[str, float]) -> tuple[float, float]:
    """(N_opt, D_opt) in parameters and tokens: the minimum of L(N, C / 6N) over N (their eq. 4).

    dL/dN = 0 where alpha A / N^alpha = beta B / D^beta. With G = (alpha A / beta B)^(1 / (alpha +
    beta)), a = beta / (alpha + beta) and b = 1 - a:  N_opt = G (C/6)^a,  D_opt = (C/6)^b / G.
    """
    alpha = law["alpha"]
    beta = law["beta"]
    ratio = alpha * law["A"] / (beta * law["B"])
    G = ratio ** (1 / (alpha + beta))
    a = beta / (alpha + beta)
    N_opt = G * (C / 6) ** a
    D_opt = C / 6 / N_opt                                  # all that the budget has left
    return N_opt, D_opt


def tokens_for_parameters(N: float) -> float:
    """The rule of thumb that sums Hoffmann et al. up: 20 tokens per parameter (003)."""
    return 20 * N


def training_flops(N: float, D: float) -> float:
    """C = 6 N D: 2 FLOPs per parameter and token forward, 4 backward."""
    return 6 * N * D


def rule_allocation(C: float) -> tuple[float, float]:
    """(N, D) that spend C = 6 N D by the rule: C = 120 N^2."""
    N = math.sqrt(C / 120)
    return N, tokens_for_parameters(N)


def kaplan_allocation(C: float) -> tuple[float, float]:
    """(N, D) of Kaplan et al. 2020: N = 1.3e9 (C in PF-days)^0.73, without embeddings (their figure
    14), and the tokens that C = 6 N D then leaves, growing with C^0.27."""
    N = 1.3e9 * (C / PF_DAY) ** 0.73
    return N, C / 6 / N


# ---------------------------------------------------------------------- the fit

def huber(r: Tensor, delta: float) -> Tensor:
    """r^2 / 2 near zero, delta (|r| - delta / 2) beyond delta: outliers pull with delta at most."""
    size = r.abs()
    square = r * r / 2
    line = delta * (size - delta / 2)          # meets the square at delta, with the same slope
    return torch.where(size <= delta, square, line)


def residuals(theta: Tensor, logN: Tensor, logD: Tensor, logL: Tensor) -> tuple[Tensor, Tensor]:
    """log L_pred - log L of runs, (S, R), and its derivatives by theta, (S, R, 5).

    theta (S, 5) = a, b, e, alpha, beta, with which (Hoffmann et al. 2022, eq. 3)
    log L_pred = log(exp(a - alpha log N) + exp(b - beta log D) + exp(e)). Others: (S, R) or (1, R).
    """
    a, b, e, alpha, beta = theta[:, :, None].unbind(1)                       # (S, 1) each
    size_term = a - alpha * logN                                             # (S, R)
    data_term = b - beta * logD
    floor_term = e + 0 * logN                  # + 0 log N, because the three must have one shape
    terms = torch.stack([size_term, data_term, floor_term], -1)              # (S, R, 3)
    log_predicted = terms.logsumexp(-1)
    # The terms' shares of the loss are the derivatives by a, b and e.
    by_a, by_b, by_e = terms.softmax(-1).unbind(-1)                          # (S, R) each
    by_alpha = -by_a * logN
    by_beta = -by_b * logD
    jacobian = torch.stack([by_a, by_b, by_e, by_alpha, by_beta], -1)
    return log_predicted - logL, jacobian


def starting_points() -> Tensor:
    """A grid of theta to start from, (24, 5), for runs whose mean log L, log N and log D are 0.

    a, b and e are given by the shares that the three terms have of the mean run's loss: the floor
    exp(e), and what is left of it for the model's size and for the data.
    """
    points = []
    for floor in (0.1, 0.5, 0.9):
        for size_share in (0.3, 0.7):
            a = math.log((1 - floor) * size_share)
            b = math.log((1 - floor) * (1 - size_share))
            e = math.log(floor)
            for alpha in (0.2, 0.7):
                for beta in (0.2, 0.7):
                    points.append([a, b, e, alpha, beta])
    # From float32, because the published fit began at these rounded numbers.
    return torch.tensor(points).double()


def descend(theta: Tensor, logN: Tensor, logD: Tensor, logL: Tensor, delta: float,
            steps: int) -> tuple[Tensor, Tensor]:
    """Levenberg-Marquardt from every start at once: theta (S, 5) and runs (S, R) -> theta where
    the descents ended, and their losses (S,).

    A step solves (J^T W J + damping diag) d = J^T W r. Huber's loss is a weighted square: its
    derivative is w r with w = min(1, delta / |r|).
    """
    damping = torch.full((len(theta),), 1e-2, dtype=torch.float64)
    r, jacobian = residuals(theta, logN, logD, logL)                         # (S, R), (S, R, 5)
    loss = huber(r, delta).sum(-1)                                           # (S,)
    for _ in range(steps):
        # At least 1e-30, because a run that is met exactly would divide by 0.
        size = r.abs().clamp(min=1e-30)
        w = (delta / size).clamp(max=1.0)
        gradient = torch.einsum("srp,sr->sp", jacobian, w * r)
        H = torch.einsum("srp,sr,srq->spq", jacobian, w, jacobian)           # (S, 5, 5)
        diagonal = H.diagonal(dim1=1, dim2=2)                                # (S, 5)
        # 1e-15 more, because a constant that moves no run would leave a row of zeros.
        added = damping[:, None] * diagonal + 1e-15
        direction = torch.linalg.solve(H + torch.diag_embed(added), gradient)
        trial = theta - direction
        trial_r, trial_jacobian = residuals(trial, logN, logD, logL)
        trial_loss = huber(trial_r, delta).sum(-1)
        # A step too far may overflow to NaN, which is no number to compare: it counts as worse.
        trial_loss = trial_loss.nan_to_num(nan=math.inf)
        # So does an exponent beyond 10: it fits one run alone, and its factor would overflow.
        too_steep = (trial[:, 3:] > 10).any(-1)
        trial_loss = trial_loss.masked_fill(too_steep, math.inf)
        better = trial_loss < loss                                           # (S,)
        row_better = better[:, None]                                         # (S, 1)
        theta = torch.where(row_better, trial, theta)
        r = torch.where(row_better, trial_r, r)
        jacobian = torch.where(row_better[..., None], trial_jacobian, jacobian)
        loss = torch.where(better, trial_loss, loss)
        # Bolder after a success, as Newton's method; more cautious after a failure.
        damping = torch.where(better, damping / 3, damping * 4)
        damping = damping.clamp(1e-12, 1e8)
    return theta, loss


def fit(N: Tensor, D: Tensor, L: Tensor, delta: float = 1e-3, steps: int = 200) -> Tensor:
    """Minimise sum_i Huber(log L_pred(N_i, D_i) - log L_i): (..., R) -> (..., 5), as PARAMETERS.

    N parameters, D tokens, L nats per token, of R runs; leading dimensions are separate fits.
    Where Hoffmann et al. run L-BFGS from each of a grid of starts, all starts of all fits go
    together through Levenberg-Marquardt, the Huber loss as reweighted squares, in float64: five
    unknowns leave only a 5 x 5 system to solve. The best end of each fit is its answer.
    """
    logN = log_rows(N)                                                       # (fits, R)
    logD = log_rows(D)
    logL = log_rows(L)
    # log N and log D are counted from their means: exponent and factor become less entangled.
    meanN = logN.mean(-1, keepdim=True)                                      # (fits, 1)
    meanD = logD.mean(-1, keepdim=True)
    logN = logN - meanN
    logD = logD - meanD
    n_fits = len(logL)
    starts = starting_points().repeat(n_fits, 1, 1)                          # (fits, starts, 5)
    # exp(a), exp(b), exp(e) are parts of a loss, so that they grow with the mean loss.
    meanL = logL.mean(-1, keepdim=True)                                      # (fits, 1)
    starts[..., :3] += meanL[..., None]
    n_starts = starts.shape[1]

    # Each start of each fit is a row of its own from here on, S = fits * starts.
    runs = [rows.repeat_interleave(n_starts, 0) for rows in (logN, logD, logL)]      # (S, R) each
    theta, loss = descend(starts.flatten(0, 1), *runs, delta, steps)
    theta = theta.view(n_fits, n_starts, 5)
    best = loss.view(n_fits, n_starts).argmin(1)                             # (fits,)
    theta = theta[torch.arange(n_fits), best]                                # (fits, 5)
    a, b, e, alpha, beta = theta.unbind(-1)                                  # (fits,) each
    a = a + alpha * meanN[:, 0]                                              # back from the means
    b = b + beta * meanD[:, 0]
    constants = torch.stack([a.exp(), b.exp(), alpha, beta, e.exp()], -1)
    return constants.view(*L.shape[:-1], 5)


def log_rows(values: Tensor) -> Tensor:
    """(..., R) -> log values, (fits, R) in float64."""
    values = values.double()
    return values.reshape(-1, values.shape[-1]).log()


def as_law(constants: Tensor) -> dict[str, float]:
    """(5,) -> {"A": ..., "B": ..., "alpha": ..., "beta": ..., "L_inf": ...}."""
    return dict(zip(PARAMETERS, constants.tolist()))


def bootstrap(N: Tensor, D: Tensor, L: Tensor, resamples: int, seed: int = 0) -> Tensor:
    """Fits to so many resamples of the runs, drawn with replacement: (resamples, 5). A resample of
    fewer than six different runs is drawn again: it would not determine five constants."""
    generator = torch.Generator().manual_seed(seed)
    R = len(L)
    drawn = []
    while len(drawn) < resamples:
        index = torch.randint(R, (R,), generator=generator)
        n_different = len(index.unique())                  # a run drawn twice adds no equation
        if n_different >= min(6, R):
            drawn.append(index)
    index = torch.stack(drawn)                                               # (resamples, R)
    return fit(N[index], D[index], L[index])


def interval(values: Tensor, level: float = 0.8) -> tuple[float, float]:
    """The range that holds `level` of the resamples, as much left out below as above."""
    low_end = 0.5 - level / 2
    high_end = 0.5 + level / 2
    ends = torch.tensor([low_end, high_end], dtype=values.dtype)
    low, high = values.quantile(ends).tolist()
    return low, high


def parabola_minimum(N: Tensor, L: Tensor) -> float:
    """N at the minimum of the parabola fitted to L against log N (their approach 2); nan if there
    is none between the smallest and the largest N, or fewer than three runs."""
    x = N.double().log()
    center = x.mean()
    offset = x - center                        # from the mean, because powers of x are near equal
    powers = torch.stack([torch.ones_like(x), offset, offset ** 2], -1)      # (R, 3)
    coefficients = torch.linalg.lstsq(powers, L.double()[:, None]).solution[:, 0]
    _, slope, curvature = coefficients.tolist()
    if len(x) < 3 or curvature <= 0:
        return math.nan
    lowest = center - slope / (2 * curvature)
    if not x.min() < lowest < x.max():
        return math.nan                        # because a parabola says nothing beyond its points
    return math.exp(lowest)


# ---------------------------------------------------------------------- the runs

def effective_parameters(config: ModelConfig) -> float:
    """N, such that C = 6 N D is the FLOPs of training on D tokens, attention and head included."""
    return config.flops_per_token(config.context_length) / 6


def plan(cfg: Config, tokenizer: str) -> list[tuple[float, float, train_pretrain.Config]]:
    """(C, N, config of the pretraining run) of every run; the held-out one comes last."""
    preset = PRESETS[cfg.preset]
    pairs = [(C, width) for C, widths in preset["grid"].items() for width in widths]
    pairs.append(preset["heldout"])
    runs = []
    for C, width in pairs:
        N = parameters_of_width(width, preset)
        options = TRAINING | {"seed": cfg.seed, "device": cfg.device, "dtype": cfg.dtype}
        options["tokenizer"] = tokenizer
        for name in ("n_layers", "context_length", "batch_size", "max_bytes", "eval_windows"):
            options[name] = preset[name]
        options["d_model"] = width
        options["n_heads"] = heads_of_width(width)
        # As many steps as the budget pays for, C = 6 N D.
        tokens_per_step = preset["batch_size"] * preset["context_length"]
        steps = round(C / (6 * N * tokens_per_step))
        options["steps"] = steps
        options["warmup"] = steps // 20
        width_factor = (64 / width) ** 0.5
        budget_factor = (preset["lr_C"] / C) ** 0.25
        options["lr"] = preset["lr_64"] * width_factor * budget_factor
        folder = f"C{C:.1e}_d{width}".replace("+", "")     # C8.0e11_d32
        options["out"] = str(Path(cfg.out) / folder)
        runs.append((C, N, build(train_pretrain.Config, options)))
    return runs


def parameters_of_width(width: int, preset: dict) -> float:
    config = ModelConfig(preset["vocab_size"], d_model=width, n_layers=preset["n_layers"],
                         n_heads=heads_of_width(width), context_length=preset["context_length"],
                         token_shift=TRAINING["token_shift"])
    return effective_parameters(config)


def heads_of_width(width: int) -> int:
    """Heads of 16 channels each, so that only their number grows."""
    return max(1, width // 16)


def prepare_tokenizer(cfg: Config) -> str:
    """The folder of the tokenizer that all runs share; trained on the corpus' first 4 MB."""
    preset = PRESETS[cfg.preset]
    vocab_size = preset["vocab_size"]
    folder = Path(cfg.out) / f"tokenizer_{vocab_size}"
    if not (folder / "tokenizer.json").exists():
        max_bytes = min(4_000_000, preset["max_bytes"])
        texts = readers.read_documents("world", split="train", max_bytes=max_bytes)
        Tokenizer.train(texts, vocab_size).save(folder)
    return str(folder)


def train_all(cfg: Config) -> list[dict]:
    """Every run of the plan, the held-out one last: {"C", "N", "D", "L", and what it was}."""
    planned = plan(cfg, prepare_tokenizer(cfg))
    runs = []
    for number, (C, N, config) in enumerate(planned, 1):
        # Target tokens: a window's first token is context alone.
        D = config.steps * config.batch_size * config.context_length
        print(f"run {number} of {len(planned)}: C {C:.1e} FLOPs, N {N:,.0f} parameters, D {D:,} "
              f"tokens, {config.steps} steps", flush=True)
        # Skipped if it is finished, so that a killed experiment loses one run at most.
        result = run_stage(train_pretrain.main, config)
        L = result["val_loss"]
        width = config.model.d_model
        runs.append({"C": C, "N": N, "D": D, "L": L, "d_model": width, "lr": config.lr,
                     "minutes": result["minutes"]})
        print(f"run {number}: {L:.4f} nats per token", flush=True)
    return runs


# ---------------------------------------------------------------------- what the runs say

def columns(runs: list[dict]) -> list[Tensor]:
    """C, N, D and L of all runs, (R,) each."""
    tensors = []
    for key in ("C", "N", "D", "L"):
        values = [run[key] for run in runs]
        tensors.append(torch.tensor(values, dtype=torch.float64))
    return tensors


def relative_errors(N: Tensor, D: Tensor, L: Tensor, law: dict[str, float]) -> Tensor:
    """How far off the law is at each run, as a share of the measured loss, (R,)."""
    ratio = predicted_loss(N, D, law) / L
    return (ratio - 1).abs()


def intervals_of(resampled: Tensor) -> dict[str, tuple[float, float]]:
    """The 80 % interval of each constant, and of the exponent a of N_opt ~ C^a."""
    intervals = {}
    for name, values in zip(PARAMETERS, resampled.unbind(-1)):
        intervals[name] = interval(values)
    alpha = resampled[:, 2]
    beta = resampled[:, 3]
    # Of a in each resample, because alpha and beta move together.
    intervals["a"] = interval(beta / (alpha + beta))
    return intervals


def predict_heldout(heldout: dict, law: dict[str, float], resampled: Tensor) -> dict:
    """The held-out run, with what the law and the laws of all resamples say of it."""
    N = heldout["N"]
    D = heldout["D"]
    predicted = predicted_loss(N, D, law)
    error = predicted / heldout["L"] - 1
    # All resamples' laws at once: each constant is a tensor, (resamples,).
    laws = dict(zip(PARAMETERS, resampled.unbind(-1)))
    spread = predicted_loss(N, D, laws)
    return heldout | {"predicted": predicted, "interval_80": interval(spread), "error": error}


def fit_tails(runs: list[dict], heldout: dict) -> list[dict]:
    """Is it a power law? Were it one, dropping the smallest budgets would change nothing: a fit
    for each smallest budget that leaves at least six runs."""
    tails = []
    for smallest in sorted({run["C"] for run in runs}):
        kept = [run for run in runs if run["C"] >= smallest]
        if len(kept) < 6:
            continue                           # they would not determine five constants
        _, N, D, L = columns(kept)
        law = as_law(fit(N, D, L))
        mean_error = relative_errors(N, D, L, law).mean().item()
        heldout_loss = predicted_loss(heldout["N"], heldout["D"], law)
        heldout_error = heldout_loss / heldout["L"] - 1    # with its sign: positive is too high
        tails.append({"from": smallest, "runs": len(kept), "law": law, "mean_error": mean_error,
                      "heldout_error": heldout_error})
    return tails


# ---------------------------------------------------------------------- tables and picture

def allocations(C: float, law: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Every recipe's (N, D) for C FLOPs."""
    return {"this fit": optimal_allocation(C, law),
            "Chinchilla's constants": optimal_allocation(C, CHINCHILLA),
            "20 tokens per parameter": rule_allocation(C),
            "Kaplan et al. 2020": kaplan_allocation(C)}


def print_report(report: dict) -> None:
    """The fitted constants beside Chinchilla's, the held-out run, and N and D for two budgets."""
    law = report["law"]
    heldout = report["heldout"]
    print_constants(report)
    print(f"off by {report['mean_error']:.2%} on average, {report['max_error']:.2%} at most")
    for C, minimum in report["isoflop_minima"].items():
        N_opt, _ = optimal_allocation(C, law)
        print(f"C {C:.1e}: N_opt {N_opt:,.0f} by the law, {minimum:,.0f} "
              "by a parabola through the budget's runs")
    print_heldout(heldout)
    for tail in report["tails"]:
        which = f"the {tail['runs']} runs from C {tail['from']:.1e} on"
        errors = f"{tail['mean_error']:.2%} on average, held out {tail['heldout_error']:+.2%}"
        print(f"fitted to {which}: off by {errors}")
    # The budget of this experiment, and that of a real model of 13B parameters.
    print_allocations(heldout["C"], law)
    print_allocations(RULE_BUDGET, law)


def print_constants(report: dict) -> None:
    ours = report["law"] | {"a": report["a"]}
    theirs = CHINCHILLA | {"a": 0.45}
    n_runs = len(report["runs"])
    print(f"\nfit to {n_runs} runs (80 % of the resamples; Chinchilla); N_opt ~ C^a")
    for name, (low, high) in report["intervals_80"].items():
        value = ours[name]
        chinchilla = theirs[name]
        print(f"  {name:6s}{value:10.4g}  ({low:.4g} to {high:.4g}; {chinchilla:.4g})")


def print_heldout(heldout: dict) -> None:
    low, high = heldout["interval_80"]
    predicted = f"predicted {heldout['predicted']:.4f} ({low:.4f} to {high:.4f})"
    measured = f"measured {heldout['L']:.4f} nats per token"
    print(f"held out, C {heldout['C']:.1e}: {predicted}, {measured}: {heldout['error']:+.2%}")


def print_allocations(C: float, law: dict[str, float]) -> None:
    print(f"\nbudget {C:.2g} FLOPs         parameters      tokens  tokens per parameter")
    for name, (N, D) in allocations(C, law).items():
        ratio = D / N
        print(f"  {name:24s}{N:12.3g}{D:12.3g}{ratio:12.3g}")


def draw(report: dict, file: Path) -> None:
    """IsoFLOP curves: loss against N, one colour a budget; and each recipe's N against C."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    law = report["law"]
    heldout = report["heldout"]
    minima = report["isoflop_minima"]
    budgets = [*minima, heldout["C"]]
    # Up to 0.85 of the colour map, because its end is a yellow that is hard to see.
    shades = torch.linspace(0, 0.85, len(budgets)).tolist()
    colors = plt.cm.viridis(shades)
    label = "minimum of a parabola"
    for (C, minimum), color in zip(minima.items(), colors):
        runs = [run for run in report["runs"] if run["C"] == C]
        draw_budget(left, C, runs, law, color, line="-", marker="o", size=5,
                    label=f"C = {C:.1e}")
        right.plot(C, minimum, "o", color=color, label=label)
        label = None                           # once in the legend is enough
    # Dotted and with a star, because the law was not fitted to this run.
    draw_budget(left, heldout["C"], [heldout], law, colors[-1], line=":", marker="*", size=13,
                label=f"C = {heldout['C']:.1e}, held out")
    left.set(xscale="log", xlabel="N (parameters = FLOPs per token / 6)",
             ylabel="validation loss (nats per token)",
             title="runs, and the law fitted to all but the star (x: its optimum)")
    draw_allocations(right, budgets, law)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_budget(axis, C: float, runs: list[dict], law: dict[str, float], color, line: str,
                marker: str, size: float, label: str) -> None:
    """The runs of one budget, the law along the budget, and an x at the law's optimum."""
    sizes = [run["N"] for run in runs]
    losses = [run["L"] for run in runs]
    N_opt, D_opt = optimal_allocation(C, law)
    # The curve reaches a third beyond the runs and the optimum, on both sides.
    smallest = min(N_opt, *sizes) / 1.3
    largest = max(N_opt, *sizes) * 1.3
    N = torch.logspace(math.log10(smallest), math.log10(largest), 99)
    D = C / (6 * N)
    lowest_loss = predicted_loss(N_opt, D_opt, law)
    curve = predicted_loss(N, D, law)
    axis.plot(N, curve, line, color=color)
    axis.plot(sizes, losses, marker, markersize=size, color=color, label=label)
    axis.plot(N_opt, lowest_loss, "kx")


def draw_allocations(axis, budgets: list[float], law: dict[str, float]) -> None:
    """Each recipe's N against C, from half the smallest budget to twice the largest."""
    smallest = budgets[0] / 2
    largest = budgets[-1] * 2
    C = torch.logspace(math.log10(smallest), math.log10(largest), 50).tolist()
    recipes = [allocations(budget, law) for budget in C]
    for name in recipes[0]:
        sizes = [recipe[name][0] for recipe in recipes]
        color = "k" if name == "this fit" else None        # None: the next of the usual colours
        axis.plot(C, sizes, label=name, color=color)
    axis.set(xscale="log", yscale="log", xlabel="C (FLOPs)", ylabel="N_opt (parameters)",
             title="how large a model for a budget")


def main(cfg: Config) -> dict:
    if cfg.preset not in PRESETS:
        raise ValueError(f"--preset {cfg.preset}: give {', '.join(PRESETS)}")

    # 1. TRAIN the grid and, last, the held-out run
    *runs, heldout = train_all(cfg)

    # 2. FIT the law to the grid alone
    C, N, D, L = columns(runs)
    law = as_law(fit(N, D, L))
    resampled = bootstrap(N, D, L, cfg.bootstrap, cfg.seed)                  # (resamples, 5)
    errors = relative_errors(N, D, L, law)
    # A second opinion on each budget's best size, which knows nothing of the law.
    minima = {}
    for budget in PRESETS[cfg.preset]["grid"]:
        of_budget = C == budget                # (R,) bool
        minima[budget] = parabola_minimum(N[of_budget], L[of_budget])

    # 3. PREDICT the held-out run
    heldout = predict_heldout(heldout, law, resampled)
    tails = fit_tails(runs, heldout)

    # 4. ALLOCATE
    # The law is in the report, so that N_opt of any budget follows; print_report shows two.
    device = pick_device(cfg.device)
    n_threads = torch.get_num_threads()
    machine = f"{platform.machine()}, {device}, {n_threads} threads, torch {torch.__version__}"
    today = str(datetime.date.today())
    a = law["beta"] / (law["alpha"] + law["beta"])         # N_opt ~ C^a
    report = {"command": f"python experiments/scaling_laws.py --preset {cfg.preset}",
              "machine": machine, "date": today, "law": law, "a": a,
              "intervals_80": intervals_of(resampled), "mean_error": errors.mean().item(),
              "max_error": errors.max().item(), "isoflop_minima": minima, "tails": tails,
              "heldout": heldout, "runs": runs}
    print_report(report)
    draw(report, Path(cfg.figure))
    text = json.dumps(report, indent=1)
    Path(cfg.figure).with_suffix(".json").write_text(text + "\n")
    return report


if __name__ == "__main__":
    command_line(main, Config, __doc__)
