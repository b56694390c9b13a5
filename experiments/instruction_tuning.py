"""
What instruction tuning brings that nobody trained for, and what alignment adds.

The list of the documents (001 section 3.8): "zero-shot task transfer", "format control", "refusal
precursors: rudimentary ability to decline (but unreliable without alignment)", "improved few-shot
performance", "chain-of-thought elicitation: respond to 'think step by step' reliably". The base,
the SFT model of a seed and what DPO makes of it answer the same unseen prompts, greedily:

  unseen tasks   two families that no stage trained on, with no, one and three solved ones of the
                 family before each, or as many as fit: of the longer family two, rarely one
  form           "Begin with "Answer:"" and "Use a whole sentence": is it kept? JSON: does it parse?
  declining      what would do harm is refused, what does none is not; what nobody has told is
                 admitted not to be known, what the corpus has told is not
  step by step   the same sums with "Do it step by step." behind them and without it

The base has never seen a conversation: it goes on with the prompt as a text, and of what it writes
as many sentences count as an answer has; that they are whole ones is no answer to "Use a whole
sentence", but counts. The world's sums are nearly always answered in steps, in the corpus and by
most hands, so that there is little left for being asked to bring.

What came out (three seeds): unseen tasks go from 45 to 50 % right to 89 to 93, by seed. Two of the
list depend on alignment. Of the harmful prompts SFT refuses 1 %, DPO all, and neither any harmless
one; what is not known is admitted in 11 and 100 %; a form that is asked for is kept in 8 and 99 %,
because the hands that wrote most demonstrations did not care. JSON parses and sums come in steps
from SFT on; DPO costs 6 points of the sums. What does not show is a gain by examples: solved tasks
before the question mislead, most so behind three. Dials tried on SFT of seed 0 of an earlier world,
120 tasks: 92 % alone, 85 % behind one, with a careful answer in it 87 %; families that were trained
on 92, 83 and 71 %; a turn of another family, small talk 92 %, reading 83 %. Perhaps because the
wording says all about the task already, and a longer context has more words that can be mistaken
for the question's. More room brings no gain either: on a base of context 512 (seed 0, 50 prompts),
where five fit, tasks of the families held out are 78 % right alone and 22 behind five. No
conversation that it learned from has so many turns.

    python train_pretrain.py --data world:0 --optimizer muon --common 3 --n_heads 2 \
        --rope_theta 1000 --context_length 512 --batch_size 4 --out out/p512
    python train_sft.py --init out/p512 --data world:0 --optimizer muon --lr 4e-3 --steps 900 \
        --batch_size 8 --eval_every 450 --shots 8 --out out/s512

A pretrained chat model (--init: it is the base, and learns the world's tasks and then 480 of its
pairs, by LoRA) shows what the small one cannot: solved tasks help. SmolLM2 (135M, seed 0, 60
prompts a figure) has 15 % of the unseen tasks right, 43 and 35 behind one and three; after SFT 48,
52 and 60, aligned 58, 57 and 63. The form that is asked for is kept in 43, 77 and 99 %, JSON parses
in 15, 78 and 88. Of what would do harm it refuses nothing, nothing and 18 %, and what it cannot
know it never admits: pairs by the hundred are too few for that
(results/instruction_tuning_smollm2.md).

    python experiments/instruction_tuning.py            # results/instruction_tuning.png and .md
    python experiments/instruction_tuning.py --quick    # one seed, a tenth of the steps and prompts
    python experiments/instruction_tuning.py --init out/smollm2 --seeds 0 \
        --figure results/instruction_tuning_smollm2.png
"""
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import evaluate
import own_life
import train_dpo
import train_sft
from experiments.base import (
    base_models,
    cell,
    continued,
    cut_texts,
    fast_dtype,
    kept,
    run,
    save,
    seed_folder,
    show_table,
    turns_of,
)
from plumbing.device import pick_device
from plumbing.folders import load_model, read_record
from plumbing.options import command_line
from world.judge import admits, claims_in, keeps_form, parse_answer, refuses
from world.tasks import HELDOUT_FAMILIES

STAGES = ("base", "SFT", "aligned")
DPO = {"method": "dpo", "beta": 1.0, "n_pairs": 8000, "steps": 500, "batch_size": 16, "lr": 1e-4}
# A chat model from elsewhere learns the world's tasks first, then its pairs, both by LoRA.
LORA_SFT = own_life.LORA | own_life.PLAN["sft"] | {"context_length": 384, "eval_every": 60}
LORA_DPO = own_life.LORA | own_life.PLAN["dpo"] | {"batch_size": 8, "beta": 1.0, "n_pairs": 500,
                                                   "eval_pairs": 50}
SHOTS = (0, 1, 3)                      # solved tasks before each
ASKED = "Do it step by step."          # a wording that training has
FORMED = ("lists", "length", "middle", "translation")          # of which a form may be asked
# {figure: its name}; all are shares
ROWS = {
    "shots_0": "unseen tasks, right",
    "shots_1": "... behind one solved one",
    "shots_3": "... behind up to three",
    "form": "form kept that was asked for",
    "json": "JSON that parses",
    "refused": "harm refused",
    "refused_wrongly": "... and what does no harm",
    "admitted": "not known, admitted",
    "admitted_wrongly": "... and what could be known",
    "steps_asked": "steps, where asked for",
    "steps_unasked": "... where not",
    "sums_asked": "sums right, asked for steps",
    "sums_unasked": "... not asked",
}


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models and batches
    init: str = ""                    # a chat model's folder, instead of the world's base
    out: str = "out/instruction_tuning"           # folder for the models
    figure: str = "results/instruction_tuning.png"        # the picture; the table beside it, as .md
    quick: bool = False               # one seed, a tenth of the steps and prompts, marked


# ---------------------------------------------------------------------- answers

def asked_for_steps(example: dict) -> dict:
    """The same prompt, and the sentence that asks for steps behind it."""
    *before, last = turns_of(example)
    return example | {"prompt": [*before, last | {"content": f"{last['content']} {ASKED}"}]}


def with_shots(world: str, examples: list[dict], k: int, tokenizer,
               context_length: int) -> list[dict]:
    """Each example behind k solved ones of its family, or as many as fit: longer prompts have room
    for fewer, and should not keep the others from theirs."""
    shown = []
    for example in examples:
        [alone], _ = evaluate.few_shot(world, [example], k, tokenizer, context_length)
        shown.append(alone)
    return shown


# ---------------------------------------------------------------------- figures

def share(said: Callable[[str], bool], texts: list[str]) -> float:
    return float(np.mean([said(text) for text in texts]))


def in_form(example: dict, text: str) -> bool:
    claims = claims_in(text)
    return bool(claims) and keeps_form(example, claims)


def in_steps(text: str) -> bool:
    """"7 + 5 = 12. 12 - 3 = 9. The answer is 9." -> True; a result alone is no step."""
    return "=" in text


def figures_of(folder: Path, seed: int, answers: Callable, n: int) -> dict[str, float]:
    """ROWS of one model, each of n prompts or about as many; answers: (model, tokenizer, examples)
    -> texts."""
    model, tokenizer = load_model(folder, pick_device("auto"), fast_dtype())
    answer = partial(answers, model, tokenizer)
    world = f"world:{seed}"

    def exam(*families: str) -> list[dict]:
        return evaluate.exam(world, n, families)

    def right(examples: list[dict], texts: list[str]) -> float:
        return evaluate.accuracy_by_family(examples, texts)["all"]

    found = {}
    unseen = exam(*HELDOUT_FAMILIES)
    for k in SHOTS:
        shown = with_shots(world, unseen, k, tokenizer, model.config.context_length)
        found[f"shots_{k}"] = right(shown, answer(shown))
    # twice as many, because half of these prompts ask for a form
    formed = [example for example in evaluate.exam(world, 2 * n, FORMED)
              if "form" in example["key"]]
    found["form"] = float(np.mean(list(map(in_form, formed, answer(formed)))))
    records = exam("json")
    objects = list(map(parse_answer, records, answer(records)))
    found["json"] = float(np.mean([one is not None for one in objects]))
    found["refused"] = share(refuses, answer(exam("unsafe")))
    found["refused_wrongly"] = share(refuses, answer(exam("advice")))
    found["admitted"] = share(admits, answer(exam("unanswerable")))
    found["admitted_wrongly"] = share(admits, answer(exam("facts")))
    # and half of these ask for steps already
    sums = [example for example in evaluate.exam(world, 2 * n, ("arithmetic",))
            if "form" not in example["key"]]
    for name, examples in (("asked", list(map(asked_for_steps, sums))), ("unasked", sums)):
        texts = answer(examples)
        found[f"steps_{name}"] = share(in_steps, texts)
        found[f"sums_{name}"] = right(examples, texts)
    return found


# ---------------------------------------------------------------------- what is shown

def draw(found: dict[str, list[dict]], file: Path, mark: str) -> None:
    """A group of bars for each row, a color for each stage, a dot for each seed."""
    figure, axis = plt.subplots(figsize=(10, 7), layout="constrained")
    for number, (stage, exams) in enumerate(found.items()):
        places = np.arange(len(ROWS)) + 0.27 * (number - 1)
        values = np.array([[exam[name] for name in ROWS] for exam in exams])       # (seeds, rows)
        axis.barh(places, values.mean(0), 0.25, color=f"C{number}", alpha=0.6, label=stage)
        for of_seed in values:
            axis.plot(of_seed, places, "k.", markersize=4)
    axis.set_yticks(range(len(ROWS)), ROWS.values())
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="share of the answers",
             title=f"What instruction tuning and alignment bring{mark}")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(found))
    save(figure, file)


def table(found: dict[str, list[dict]], cfg: Config) -> str:
    """found: {stage: [figures of a seed, ...]}."""
    mark = " (quick)" if cfg.quick else ""
    command = "python experiments/instruction_tuning.py" + f" --init {cfg.init}" * bool(cfg.init)
    lines = [f"# What instruction tuning and alignment bring{mark}", "",
             f"`{command}`, seeds {cfg.seeds}: shares of greedy "
             "answers to unseen prompts; the mean, and from the lowest to the highest.", "",
             f"| {' | '.join(['', *found])} |", "|---" * (len(found) + 1) + "|"]
    for name, label in ROWS.items():
        cells = [cell([exam[name] for exam in exams], ".1%") for exams in found.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shorter(options: dict) -> dict:
    """A tenth of the steps, and of their data."""
    counts = ("steps", "n_examples", "n_pairs")
    return options | {name: options[name] // 10 for name in counts if name in options}


def stages_of_world(seed: int, out: Path, shorten: Callable) -> dict[str, tuple[Path, Callable]]:
    """{stage: (its folder, how it answers)} from the lifecycle's own base of the seed; shorten:
    what --quick does to a run's options, or dict."""
    base = base_models(seed)
    run(train_dpo, init=str(base / "sft"), data=f"world:{seed}", out=str(out / "dpo"), seed=seed,
        **shorten(DPO))
    return {"base": (base / "pretrain", continued), "SFT": (base / "sft", evaluate.greedy_texts),
            "aligned": (out / "dpo", evaluate.greedy_texts)}


def stages_of(init: str, seed: int, out: Path, shorten: Callable
              ) -> dict[str, tuple[Path, Callable]]:
    """The same from a chat model from elsewhere, whose SFT stage is made here as well."""
    of_both = {"data": f"world:{seed}", "seed": seed}
    run(train_sft, init=init, out=str(out / "sft"), **of_both, **shorten(LORA_SFT))
    run(train_dpo, init=str(out / "sft"), out=str(out / "dpo"), **of_both, **shorten(LORA_DPO))
    folders = {"base": Path(init), "SFT": out / "sft", "aligned": out / "dpo"}
    return {stage: (folder, cut_texts) for stage, folder in folders.items()}


def main(cfg: Config) -> None:
    n = 60 if cfg.init else 300                        # prompts of a figure
    shorten = dict
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        n = 30
        shorten = shorter
    found = {stage: [] for stage in STAGES}
    for seed in map(int, cfg.seeds.split(",")):
        out = seed_folder(cfg, seed) / Path(cfg.init).name     # apart from the world's own
        stages = partial(stages_of, cfg.init) if cfg.init else stages_of_world
        for stage, (folder, answers) in stages(seed, out, shorten).items():
            of = {"model": read_record(folder)["sha256"], "n": n}
            found[stage].append(kept(out / f"{stage}.json", of,
                                     partial(figures_of, folder, seed, answers, n)))
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
