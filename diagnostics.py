"""
What a reward model knows (001 section 4.4): on held-out pairs, in numbers and one picture.

    accuracy            by how much the better answer is better, and by the axis in which the two
                        differ: helpful, harmless, honest, coherent
    calibration         p = sigma(|r_w - r_l|), its confidence, beside how often it is right; their
                        mean distance is the expected calibration error (evaluate.calibration_error)
    length correlation  of r and |y|: a model that likes length will be given length

    figures = diagnostics.of(model, pairs, Path("out/rm/diagnostics.png"))
"""
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data import PreferencePairs
from evaluate import calibration_error
from heads import WithHead
from scoring import ranked_right, response_rewards
from world.world import AXES

BINS = 10                                      # of confidence, from 1/2 to 1
PARTS = 4                                      # of the pairs, by how far apart the two answers are


def of(model: WithHead, pairs: PreferencePairs, picture: Path) -> dict:
    """The figures, and their picture. {} for rankings and ratings, which are not pairs."""
    if len(pairs.sequences[0]) != 2 or "responses" in pairs.pairs[0]:
        return {}
    rewards, lengths = scored(model, pairs)                                    # (N, 2) each
    margin = rewards[:, 0] - rewards[:, 1]                                     # (N,)
    figures = {"accuracy": ranked_right(margin).item(), "ece": calibration_error(margin),
               "calibration": calibration(margin),
               "length_correlation": correlation(rewards.flatten(), lengths.flatten()),
               "by_axis": accuracy_by(axis_of, pairs.pairs, margin),
               "by_distance": accuracy_by_distance(pairs.pairs, margin)}
    draw(figures, rewards, lengths, picture)
    return figures


@torch.no_grad()
def scored(model: WithHead, pairs: PreferencePairs) -> tuple[Tensor, Tensor]:
    """r_psi(x, y) and |y| of each pair's two answers, (N, 2) each, in the order of .pairs."""
    rewards = torch.empty(len(pairs), 2)
    for batch in pairs.epoch(16):
        found = response_rewards(model, batch.to(model.device)).float().cpu()
        rewards[batch.index.cpu()] = found.view(2, -1).T
    return rewards, pairs.response_tokens().float()


def calibration(margin: Tensor) -> list[tuple[float, float, int]]:
    """(mean confidence, share ranked right, pairs) of each part of [1/2, 1] that has pairs."""
    confidence = torch.sigmoid(margin.abs())
    part = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    found = []
    for number in range(BINS):
        inside = part == number
        if inside.any():
            found.append((confidence[inside].mean().item(), ranked_right(margin[inside]).item(),
                          int(inside.sum())))
    return found


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, in [-1, 1]; 0 where one of them does not vary."""
    a = a - a.mean()
    b = b - b.mean()
    scale = (a.norm() * b.norm()).item()
    return (a @ b).item() / scale if scale > 0 else 0.0


def axis_of(pair: dict) -> str:
    """The axis in which a pair of the world differs; "" elsewhere."""
    return AXES.get(pair["example"].get("kind", ""), "")


def accuracy_by(name_of: Callable[[dict], str], pairs: list[dict], margin: Tensor) -> dict:
    """{name: share ranked right} over the pairs that have a name."""
    names = [name_of(pair) for pair in pairs]
    found = {}
    for name in sorted({*names} - {""}):
        inside = torch.tensor([other == name for other in names])
        found[name] = ranked_right(margin[inside]).item()
    return found


def accuracy_by_distance(pairs: list[dict], margin: Tensor) -> list[tuple[float, float]]:
    """(mean distance, share ranked right) of PARTS equal parts of the pairs, by how much better the
    chosen answer is; [] where a pair does not say."""
    distances = [pair.get("margin") for pair in pairs]
    if None in distances or len(pairs) < PARTS:
        return []
    distances = torch.tensor(distances, dtype=torch.float32)
    found = []
    for part in distances.argsort(stable=True).chunk(PARTS):
        found.append((distances[part].mean().item(), ranked_right(margin[part]).item()))
    return found


def draw(figures: dict, rewards: Tensor, lengths: Tensor, file: Path) -> None:
    import matplotlib  # not at the top, because it takes a second
    matplotlib.use("Agg")                                  # because a server has no screen
    from matplotlib import pyplot as plt

    plot, axes = plt.subplots(2, 2, figsize=(10, 8), constrained_layout=True)
    confidence, right, n = zip(*figures["calibration"])
    axes[0, 0].plot([0.5, 1], [0.5, 1], color="grey", linestyle=":", label="calibrated")
    axes[0, 0].scatter(confidence, right, s=[20 + 400 * count / sum(n) for count in n],
                       label="area: number of pairs")
    axes[0, 0].set(title=f"calibration: ECE {figures['ece']:.3f}", ylabel="share ranked right",
                   xlabel="confidence, sigma(|r_w - r_l|)")
    axes[0, 0].legend()
    draw_bars(axes[0, 1], figures["by_axis"], "what the two answers differ in")
    distance = {f"{mean:.2f}": share for mean, share in figures["by_distance"]}
    draw_bars(axes[1, 0], distance, "how much better the chosen one is")
    axes[1, 1].scatter(lengths.flatten(), rewards.flatten(), s=3, alpha=0.4)
    axes[1, 1].set(title=f"length correlation: {figures['length_correlation']:.2f}",
                   xlabel="tokens of the answer", ylabel="reward")
    plot.suptitle(f"reward model: {figures['accuracy']:.1%} of {len(rewards):,} held-out pairs "
                  "ranked right")
    plot.savefig(file, dpi=120)
    plt.close(plot)


def draw_bars(axis, shares: dict[str, float], title: str) -> None:
    """Shares ranked right by name; without names a line that says so."""
    if not shares:
        axis.text(0.5, 0.5, "these pairs do not say", ha="center", transform=axis.transAxes)
    bars = axis.bar(list(shares), list(shares.values()))
    axis.bar_label(bars, fmt="%.2f")
    axis.axhline(0.5, color="grey", linestyle=":")
    axis.set(title=f"accuracy by {title}", ylim=(0, 1.05), ylabel="share ranked right")
