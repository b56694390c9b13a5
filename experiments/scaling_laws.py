"""
Scaling laws (001 section 1.4): how large a model, on how many tokens, for a given compute budget?

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

What differs from a default run of train_pretrain.py, to be fair to all sizes and budgets alike:
  no copying first, whose steps do not read text; each token is read once, no epoch is repeated
  warmup a twentieth of the steps, so that short runs are not all warmup
  the learning rate falls with width and budget, lr = lr_64 sqrt(64 / d_model) (lr_C / C)^(1/4).
  Muon's step is one size per element, so that a wide matrix is turned further (the spectral norm
  grows with the square root); and a longer run ends better at a lower rate. lr_64 was chosen at
  lr_C = 5e11, where 0.016 and 0.032 are within 0.2 % of each other at width 32, within 2 % at width
  96, and 0.004 loses a quarter and three fifths
  one depth and one head width for all sizes: only the width grows

    python experiments/scaling_laws.py                    # about 15 minutes of one core's time
    python experiments/scaling_laws.py --preset smoke     # seconds; far too short to mean anything

Run again, it skips the runs that are finished and goes on with the one that was interrupted. The
gpu preset has not been run yet.

What came out (results/scaling_laws.json): N_opt ~ C^0.45, as Chinchilla's constants have it (80 %:
0.28 to 0.55), and the loss of a run of twice the largest budget is predicted 2.8 % too low (0.827,
measured 0.851). Two things stood in the way of that, and are worth a try:
  budgets below 8e11 follow another law. With 4e11 in the grid and 6.4e12 not, the prediction for
  9.6e12 was 8.3 % too low; each small budget that is left out makes it better (tails in the json)
  one learning rate for all budgets is too high for the long runs: 0.4 of it took the run of 9.6e12
  from 0.895 to 0.881, but lost 1.3 % at C = 1.6e12, width 64
Copying first would not help: models that began with 250 steps of it did worse at 4e11 and 8e11, the
wide ones by far (1.36 instead of 1.18 at width 48).
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
from tokenizer import Tokenizer
from plumbing.options import build, command_line
from plumbing.run import pick_device

PARAMETERS = ("A", "B", "alpha", "beta", "L_inf")
CHINCHILLA = {"A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "L_inf": 1.69}
PF_DAY = 1e15 * 24 * 3600                                  # FLOPs
RULE_BUDGET = 2.0e22                                       # what 20 : 1 asks for 13B parameters

# grid: {compute budget in FLOPs: widths of the models}; heldout: (budget, width), not fitted.
PRESETS = {
    "cpu": {"grid": {8e11: (32, 48, 64), 1.6e12: (32, 48, 64, 96), 3.2e12: (48, 64, 96, 128),
                     6.4e12: (64, 80, 112)},
            "heldout": (1.28e13, 112), "n_layers": 3, "vocab_size": 1024, "context_length": 128,
            "batch_size": 16, "lr_64": 0.024, "lr_C": 5e11, "eval_windows": 512,
            "max_bytes": 14_000_000},
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
    device: str = "auto"              # auto | cpu | cuda | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16


# ---------------------------------------------------------------------- the law

def predicted_loss(N, D, law: dict[str, float]):
    """L(N, D) = A / N^alpha + B / D^beta + L_inf, nats per token (Hoffmann et al. 2022, eq. 2).
    N parameters, D tokens: numbers or tensors."""
    return law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"] + law["L_inf"]


def optimal_allocation(C: float, law: dict[str, float]) -> tuple[float, float]:
    """(N_opt, D_opt) in parameters and tokens: the minimum of L(N, C / 6N) over N (their eq. 4).

    dL/dN = 0 where alpha A / N^alpha = beta B / D^beta. With G = (alpha A / beta B)^(1 / (alpha +
    beta)), a = beta / (alpha + beta) and b = 1 - a:  N_opt = G (C/6)^a,  D_opt = (C/6)^b / G.
    """
    alpha, beta = law["alpha"], law["beta"]
    G = (alpha * law["A"] / (beta * law["B"])) ** (1 / (alpha + beta))
    N_opt = G * (C / 6) ** (beta / (alpha + beta))
    return N_opt, C / 6 / N_opt


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
    return torch.where(r.abs() <= delta, r * r / 2, delta * (r.abs() - delta / 2))


def residuals(theta: Tensor, logN: Tensor, logD: Tensor, logL: Tensor) -> tuple[Tensor, Tensor]:
    """log L_pred - log L of runs, (S, R), and its derivatives by theta, (S, R, 5).

    theta (S, 5) = a, b, e, alpha, beta, with which (Hoffmann et al. 2022, eq. 3)
    log L_pred = log(exp(a - alpha log N) + exp(b - beta log D) + exp(e)). Others: (S, R) or (1, R).
    """
    a, b, e, alpha, beta = theta[:, :, None].unbind(1)                       # (S, 1) each
    terms = torch.stack([a - alpha * logN, b - beta * logD, e + 0 * logN], -1)   # (S, R, 3)
    p = terms.softmax(-1)                                # each term's share of the loss
    jacobian = torch.cat([p, -p[..., :1] * logN[..., None], -p[..., 1:2] * logD[..., None]], -1)
    return terms.logsumexp(-1) - logL, jacobian


def fit(N: Tensor, D: Tensor, L: Tensor, delta: float = 1e-3, steps: int = 200) -> Tensor:
    """Minimise sum_i Huber(log L_pred(N_i, D_i) - log L_i): (..., R) -> (..., 5), as PARAMETERS.

    N parameters, D tokens, L nats per token, of R runs; leading dimensions are separate fits.
    Where Hoffmann et al. run L-BFGS from each of a grid of starts, all starts of all fits go
    together through Levenberg-Marquardt, the Huber loss as reweighted squares, in float64: five
    unknowns leave only a 5 x 5 system to solve. The best end of each fit is its answer.
    """
    shape, (N, D, L) = L.shape[:-1], (x.double().reshape(-1, x.shape[-1]) for x in (N, D, L))
    # log N and log D are counted from their means: exponent and factor become less entangled
    logN, logD, logL = N.log(), D.log(), L.log()
    meanN, meanD = logN.mean(-1, keepdim=True), logD.mean(-1, keepdim=True)
    logN, logD = logN - meanN, logD - meanD
    # starts: exponents and shares of the loss that the three terms have at the mean run
    starts = torch.tensor([[math.log((1 - floor) * share), math.log((1 - floor) * (1 - share)),
                            math.log(floor), alpha, beta]
                           for floor in (0.1, 0.5, 0.9) for share in (0.3, 0.7)
                           for alpha in (0.2, 0.7) for beta in (0.2, 0.7)]).double()
    starts = starts.repeat(len(L), 1, 1)                                     # (F, starts, 5)
    starts[..., :3] += logL.mean(-1)[:, None, None]
    n_starts = starts.shape[1]
    theta = starts.flatten(0, 1)                                             # (S, 5)
    runs = [x.repeat_interleave(n_starts, 0) for x in (logN, logD, logL)]     # (S, R) each

    damping = torch.full((len(theta),), 1e-2, dtype=torch.float64)
    r, jacobian = residuals(theta, *runs)
    loss = huber(r, delta).sum(-1)
    for _ in range(steps):
        w = (delta / r.abs().clamp(min=1e-30)).clamp(max=1.0)                # Huber'(r) = w r
        gradient = torch.einsum("srp,sr->sp", jacobian, w * r)
        H = torch.einsum("srp,sr,srq->spq", jacobian, w, jacobian)
        H = H + torch.diag_embed(damping[:, None] * H.diagonal(dim1=1, dim2=2) + 1e-15)
        trial = theta - torch.linalg.solve(H, gradient)
        r_trial, jacobian_trial = residuals(trial, *runs)
        loss_trial = huber(r_trial, delta).sum(-1).nan_to_num(nan=math.inf)
        better = loss_trial < loss
        theta, r = (torch.where(better[:, None], x, y) for x, y in ((trial, theta), (r_trial, r)))
        jacobian = torch.where(better[:, None, None], jacobian_trial, jacobian)
        loss = torch.where(better, loss_trial, loss)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e8)

    best = loss.view(-1, n_starts).argmin(1)
    a, b, e, alpha, beta = theta.view(-1, n_starts, 5)[torch.arange(len(best)), best].unbind(-1)
    a, b = a + alpha * meanN[:, 0], b + beta * meanD[:, 0]                   # back from the means
    return torch.stack([a.exp(), b.exp(), alpha, beta, e.exp()], -1).view(*shape, 5)


def as_law(constants: Tensor) -> dict[str, float]:
    return dict(zip(PARAMETERS, constants.tolist()))


def bootstrap(N: Tensor, D: Tensor, L: Tensor, resamples: int, seed: int = 0) -> Tensor:
    """Fits to so many resamples of the runs, drawn with replacement: (resamples, 5). A resample of
    fewer than six different runs is drawn again: it would not determine five constants."""
    generator, drawn = torch.Generator().manual_seed(seed), []
    while len(drawn) < resamples:
        index = torch.randint(len(L), (len(L),), generator=generator)
        if len(index.unique()) >= min(6, len(L)):
            drawn.append(index)
    index = torch.stack(drawn)                                               # (resamples, R)
    return fit(N[index], D[index], L[index])


def interval(values: Tensor, level: float = 0.8) -> tuple[float, float]:
    """The range that holds `level` of the resamples, as much left out below as above."""
    ends = torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=values.dtype)
    return tuple(values.quantile(ends).tolist())


def parabola_minimum(N: Tensor, L: Tensor) -> float:
    """N at the minimum of the parabola fitted to L against log N (their approach 2); nan if there
    is none between the smallest and the largest N, or fewer than three runs."""
    x, center = N.double().log(), N.double().log().mean()
    powers = torch.stack([torch.ones_like(x), x - center, (x - center) ** 2], -1)
    _, slope, curvature = torch.linalg.lstsq(powers, L.double()[:, None]).solution[:, 0].tolist()
    if len(x) < 3 or curvature <= 0:
        return math.nan
    at = center - slope / (2 * curvature)
    return math.exp(at) if x.min() < at < x.max() else math.nan


# ---------------------------------------------------------------------- the runs

def effective_parameters(config: ModelConfig) -> float:
    """N, such that C = 6 N D is the FLOPs of training on D tokens, attention and head included."""
    return config.flops_per_token(config.context_length) / 6


def plan(cfg: Config, tokenizer: str) -> list[tuple[float, float, train_pretrain.Config]]:
    """(C, N, config of the pretraining run) of every run; the held-out one comes last."""
    preset = PRESETS[cfg.preset]
    grid = [(C, width) for C, widths in preset["grid"].items() for width in widths]
    runs = []
    for C, width in [*grid, preset["heldout"]]:
        shape = {"d_model": width, "n_layers": preset["n_layers"], "n_heads": max(1, width // 16),
                 "context_length": preset["context_length"]}
        N = effective_parameters(ModelConfig(preset["vocab_size"], token_shift=True, **shape))
        steps = round(C / (6 * N * preset["batch_size"] * preset["context_length"]))
        lr = preset["lr_64"] * (64 / width) ** 0.5 * (preset["lr_C"] / C) ** 0.25
        out = Path(cfg.out) / f"C{C:.1e}_d{width}".replace("+", "")
        runs.append((C, N, build(train_pretrain.Config, {
            "out": str(out), "tokenizer": tokenizer, "max_bytes": preset["max_bytes"],
            "batch_size": preset["batch_size"], "copy_steps": 0, "optimizer": "muon",
            "token_shift": True, "steps": steps, "warmup": steps // 20, "lr": lr, "eval_every": 0,
            "eval_windows": preset["eval_windows"], "save_every": 1000, "seed": cfg.seed,
            "device": cfg.device, "dtype": cfg.dtype, **shape})))
    return runs


def prepare_tokenizer(cfg: Config) -> str:
    """The folder of the tokenizer that all runs share; trained on the corpus' first 4 MB."""
    vocab_size = PRESETS[cfg.preset]["vocab_size"]
    folder = Path(cfg.out) / f"tokenizer_{vocab_size}"
    if not (folder / "tokenizer.json").exists():
        max_bytes = min(4_000_000, PRESETS[cfg.preset]["max_bytes"])
        texts = readers.read_documents("world", split="train", max_bytes=max_bytes)
        Tokenizer.train(texts, vocab_size).save(folder)
    return str(folder)


# ---------------------------------------------------------------------- tables and picture

def allocations(C: float, law: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Every recipe's (N, D) for C FLOPs."""
    return {"this fit": optimal_allocation(C, law),
            "Chinchilla's constants": optimal_allocation(C, CHINCHILLA),
            "20 tokens per parameter": rule_allocation(C),
            "Kaplan et al. 2020": kaplan_allocation(C)}


def print_report(report: dict) -> None:
    """The fitted constants beside Chinchilla's, the held-out run, and N and D for two budgets."""
    law, heldout, theirs = report["law"], report["heldout"], CHINCHILLA | {"a": 0.45}
    print(f"\nfit to {len(report['runs'])} runs (80 % of the resamples; Chinchilla); N_opt ~ C^a")
    for name, (low, high) in report["intervals_80"].items():
        value = {**law, "a": report["a"]}[name]
        print(f"  {name:6s}{value:10.4g}  ({low:.4g} to {high:.4g}; {theirs[name]:.4g})")
    print(f"off by {report['mean_error']:.2%} on average, {report['max_error']:.2%} at most")
    for C, minimum in report["isoflop_minima"].items():
        print(f"C {C:.1e}: N_opt {optimal_allocation(C, law)[0]:,.0f} by the law, {minimum:,.0f} "
              "by a parabola through the budget's runs")
    low, high = heldout["interval_80"]
    print(f"held out, C {heldout['C']:.1e}: predicted {heldout['predicted']:.4f} ({low:.4f} to "
          f"{high:.4f}), measured {heldout['L']:.4f} nats per token: {heldout['error']:+.2%}")
    for tail in report["tails"]:
        print(f"fitted to the {tail['runs']} runs from C {tail['from']:.1e} on: off by "
              f"{tail['mean_error']:.2%} on average, held out {tail['heldout_error']:+.2%}")
    for C in (heldout["C"], RULE_BUDGET):
        print(f"\nbudget {C:.2g} FLOPs         parameters      tokens  tokens per parameter")
        for name, (N, D) in allocations(C, law).items():
            print(f"  {name:24s}{N:12.3g}{D:12.3g}{D / N:12.3g}")


def draw(report: dict, file: Path) -> None:
    """IsoFLOP curves: loss against N, one colour a budget; and each recipe's N against C."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    runs, heldout, law, minima = (report[key] for key in ("runs", "heldout", "law",
                                                          "isoflop_minima"))
    budgets = list(minima)
    colors = plt.cm.viridis(torch.linspace(0, 0.85, len(budgets) + 1).tolist())
    for C, color in zip([*budgets, heldout["C"]], colors):
        here = [run for run in [*runs, heldout] if run["C"] == C]
        fitted = C in budgets
        N_opt, D_opt = optimal_allocation(C, law)
        sizes = [N_opt, *(run["N"] for run in here)]
        N = torch.logspace(math.log10(min(sizes) / 1.3), math.log10(max(sizes) * 1.3), 99)
        left.plot(N, predicted_loss(N, C / (6 * N), law), "-" if fitted else ":", color=color)
        left.plot([run["N"] for run in here], [run["L"] for run in here], "o" if fitted else "*",
                  markersize=5 if fitted else 13, color=color,
                  label=f"C = {C:.1e}" + ("" if fitted else ", held out"))
        left.plot(N_opt, predicted_loss(N_opt, D_opt, law), "kx")
        if fitted:
            right.plot(C, minima[C], "o", color=color,
                       label="minimum of a parabola" if C == budgets[0] else None)
    left.set(xscale="log", xlabel="N (parameters = FLOPs per token / 6)",
             ylabel="validation loss (nats per token)",
             title="runs, and the law fitted to all but the star (x: its optimum)")
    C = torch.logspace(math.log10(budgets[0] / 2), math.log10(heldout["C"] * 2), 50).tolist()
    for name in allocations(C[0], law):
        right.plot(C, [allocations(c, law)[name][0] for c in C], label=name,
                   color="k" if name == "this fit" else None)
    right.set(xscale="log", yscale="log", xlabel="C (FLOPs)", ylabel="N_opt (parameters)",
              title="how large a model for a budget")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(cfg: Config) -> dict:
    if cfg.preset not in PRESETS:
        raise ValueError(f"--preset {cfg.preset}: give {', '.join(PRESETS)}")

    # 1. TRAIN the grid and, last, the held-out run
    runs, planned = [], plan(cfg, prepare_tokenizer(cfg))
    for number, (C, N, config) in enumerate(planned, 1):
        D = config.steps * config.batch_size * config.context_length
        print(f"run {number} of {len(planned)}: C {C:.1e} FLOPs, N {N:,.0f} parameters, D {D:,} "
              f"tokens, {config.steps} steps", flush=True)
        result = run_stage(train_pretrain.main, config)
        runs.append({"C": C, "N": N, "D": D, "L": result["val_loss"], "d_model": config.model.d_model,
                     "lr": config.lr, "minutes": result["minutes"]})
        print(f"run {number}: {result['val_loss']:.4f} nats per token", flush=True)
    *runs, heldout = runs

    # 2. FIT the law to the grid alone
    C, N, D, L = (torch.tensor([run[key] for run in runs], dtype=torch.float64) for key in "CNDL")
    law, resampled = as_law(fit(N, D, L)), bootstrap(N, D, L, cfg.bootstrap, cfg.seed)
    alpha, beta = resampled[:, 2], resampled[:, 3]
    intervals = dict(zip([*PARAMETERS, "a"],
                         map(interval, [*resampled.unbind(-1), beta / (alpha + beta)])))
    errors = (predicted_loss(N, D, law) / L - 1).abs()
    minima = {c: parabola_minimum(N[C == c], L[C == c]) for c in PRESETS[cfg.preset]["grid"]}

    # 3. PREDICT the held-out run
    predicted, spread = (predicted_loss(heldout["N"], heldout["D"], x)
                         for x in (law, dict(zip(PARAMETERS, resampled.unbind(-1)))))
    heldout |= {"predicted": predicted, "interval_80": interval(spread),
                "error": predicted / heldout["L"] - 1}

    # is it a power law? were it one, dropping the smallest budgets would change nothing
    tails = []
    for smallest in minima:
        kept = C >= smallest
        if kept.sum() >= 6:
            tail = as_law(fit(N[kept], D[kept], L[kept]))
            off = (predicted_loss(N[kept], D[kept], tail) / L[kept] - 1).abs().mean().item()
            error = predicted_loss(heldout["N"], heldout["D"], tail) / heldout["L"] - 1
            tails.append({"from": smallest, "runs": int(kept.sum()), "law": tail, "mean_error": off,
                          "heldout_error": error})

    # 4. ALLOCATE
    report = {"command": f"python experiments/scaling_laws.py --preset {cfg.preset}",
              "machine": f"{platform.machine()}, {pick_device(cfg.device)}, "
                         f"{torch.get_num_threads()} threads, torch {torch.__version__}",
              "date": str(datetime.date.today()), "law": law,
              "a": law["beta"] / (law["alpha"] + law["beta"]), "intervals_80": intervals,
              "mean_error": errors.mean().item(), "max_error": errors.max().item(),
              "isoflop_minima": minima, "tails": tails, "heldout": heldout, "runs": runs}
    print_report(report)
    draw(report, Path(cfg.figure))
    Path(cfg.figure).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    command_line(main, Config, __doc__)
