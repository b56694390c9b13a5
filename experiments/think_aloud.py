"""
"Let's think step by step": does a pretrained chat model do it when asked, and does it help?

The sentence of the documents (001 section 3.8): instruction tuning brings "chain-of-thought
elicitation: respond to 'think step by step' reliably". In the world all models answer sums in
steps, asked or not (instruction_tuning.py). Here any chat models answer word problems of a file,
greedily, as they stand and with a sentence behind them:

  as it is     nothing
  steps        "Let's think step by step." (Kojima et al. 2022)
  number       "Answer with the number only."

Of the answers: how many are right (the last number is the row's), have a step (an equation), are a
bare number, and end before the limit of tokens.

What came out (50 rows, seed 0): SmolLM2 with 135M parameters reasons in steps whatever is asked for
(84 to 86 % of its answers, after SFT on GSM8K 86 to 94) and never gives a number alone; 0 to 4 %
are right, two rows of fifty, from which no order of the three can be read. Half of its answers do
not end within 200 tokens. What 3.8 promises begins with larger models (Wei et al. 2022).

    python experiments/think_aloud.py --init out/smollm2,out/own/sft --data gsm8k_test.jsonl --n 50

writes results/think_aloud.png and .md. A row has "question" and "answer", the number at its end.
"""
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import readers
import sample
from experiments.base import fast_dtype, save, show_table
from plumbing.device import pick_device
from plumbing.folders import load_model
from plumbing.options import command_line
from rewards import NUMBER, number_in

ASKED = {"as it is": "", "steps": " Let's think step by step.",
         "number": " Answer with the number only."}
FIGURES = {"right": "right", "steps": "have a step", "bare": "are a number", "ended": "ended"}
EQUATION = re.compile(r"\d *=")


@dataclass
class Config:
    init: str = "out/smollm2"         # chat models, with commas
    data: str = "gsm8k_test.jsonl"    # rows with question and answer
    n: int = 100                      # rows, >= 1
    max_new_tokens: int = 200         # of an answer, >= 1
    seed: int = 0                     # of which rows
    figure: str = "results/think_aloud.png"   # the picture; the table beside it, as .md
    quick: bool = False               # eight rows, marked


def examine(folder: str, rows: list[dict], cfg: Config) -> dict[str, dict[str, float]]:
    """{what is asked for: FIGURES of a model's answers}."""
    model, tokenizer = load_model(folder, pick_device("auto"), fast_dtype(), to_answer=True)
    stop_tokens = (tokenizer.end, tokenizer.endoftext)
    found = {}
    for name, sentence in ASKED.items():
        prompts = []
        for row in rows:
            *before, last = row["messages"]
            asked = last | {"content": last["content"] + sentence}
            prompts.append(tokenizer.prompt([*before, asked]))
        answers = sample.generate(model, prompts, cfg.max_new_tokens, stop_tokens, batch_size=25)
        texts = [tokenizer.decode(ids).strip() for ids in answers]
        figures = [figures_of(row, text) for row, text in zip(rows, texts)]
        found[name] = {figure: float(np.mean([one[figure] for one in figures]))
                       for figure in figures[0]}
        found[name]["ended"] = float(np.mean([ids[-1] in stop_tokens for ids in answers]))
        print(folder, name, found[name], repr(texts[0]), file=sys.stderr, flush=True)
    return found


def figures_of(row: dict, text: str) -> dict[str, bool]:
    """Whether one answer is right, in steps, and a bare number."""
    return {"right": number_in(text) == number_in(row["answer"]),
            "steps": EQUATION.search(text) is not None,
            "bare": NUMBER.fullmatch(text.strip(" $.%")) is not None}


def draw(found: dict[str, dict], file: Path, mark: str) -> None:
    figure, axes = plt.subplots(1, len(FIGURES), figsize=(12, 3.5), sharey=True,
                                layout="constrained")
    for axis, (name, title) in zip(axes, FIGURES.items()):
        for number, (folder, asked) in enumerate(found.items()):
            places = np.arange(len(asked)) + 0.8 * number / len(found)
            axis.bar(places, [figures[name] for figures in asked.values()], 0.75 / len(found),
                     color=f"C{number}", alpha=0.7, label=folder)
        axis.set_xticks(np.arange(len(ASKED)) + 0.4 - 0.4 / len(found), list(ASKED))
        axis.set(title=f"answers that {title}" if name != "right" else f"right answers{mark}")
    axes[0].yaxis.set_major_formatter("{x:.0%}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(found))
    save(figure, file)


def table(found: dict[str, dict], cfg: Config) -> str:
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# Asked to think step by step{mark}", "",
             f"`python experiments/think_aloud.py --init {cfg.init} --data {Path(cfg.data).name} "
             f"--n {cfg.n}`, seed {cfg.seed}: greedy answers of at most "
             f"{cfg.max_new_tokens} tokens to {cfg.n} problems.", "",
             f"| model | asked for | {' | '.join(FIGURES.values())} |",
             "|---" * (len(FIGURES) + 2) + "|"]
    for folder, asked in found.items():
        for name, figures in asked.items():
            cells = [f"{figures[figure]:.0%}" for figure in FIGURES]
            lines.append(f"| {folder} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    if cfg.quick:
        cfg.n = min(cfg.n, 8)
    rows = readers.read_prompts(cfg.data, cfg.n, seed=cfg.seed)
    for row in rows:
        if number_in(row["answer"]) is None:
            raise ValueError(f"{row['where']}: no number in its answer")
    cfg.n = len(rows)
    found = {folder: examine(folder, rows, cfg) for folder in cfg.init.split(",")}
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
