"""
Data made by a model, as JSONL that train_sft.py and train_dpo.py read.

  --method best_of_n   the best of N own answers to each prompt, by a reward: rejection sampling,
                       once train_sft.py has learnt from them (001 section 4.9)
           pairs       the best against the worst of them: preferences for train_dpo.py (4.10)
           chains      reasoning before known answers, by few-shot prompting: data for
                       train_sft.py --cot_ratio (3.6, 3.7)

  1. SAMPLE   y_1, ..., y_N ~ pi_theta(.|x)     2. SCORE  r(x, y_i)
  3. SELECT   y* = argmax_i r(x, y_i)           4. WRITE  {"prompt", "response", "score"}

The best of N lies at most log N - (N - 1) / N nats from pi_theta, less if an answer is drawn twice
(scoring.best_of_n_kl). With chains x has worked examples before it, (x_1, r_1, a_1), ...,
(x_k, r_k, a_k), and y = (r, a) is kept if a is the known answer, as in STaR (Zelikman et al. 2022,
algorithm 1): the first such y of N. A wrong chain that ends in the right number is kept, too.

    python synthesize.py --n 8 --out best.jsonl && python train_sft.py --init out/sft \\
        --data best.jsonl --steps 200 --lr 5e-4 --out out/best
    python synthesize.py --method chains --prompts gsm8k.jsonl --out chains.jsonl
"""
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import readers
import sample
from data import fit_all, prompts_to_answer
from plumbing import claim
from plumbing.device import pick_device, pick_dtype
from plumbing.folders import load_model
from plumbing.options import command_line, refuse_unread
from preferences import best_and_worst
from rewards import FINAL_NUMBER, NUMBER, Reward, number_in
from scoring import best_of_n_kl


@dataclass
class Config:
    method: str = "best_of_n"         # best_of_n | pairs | chains
    init: str = "out/sft"             # model folder that answers
    reward: str = "out/rm"            # out/rm, several of them, world, gsm8k, module:function
    combine: str = "min"              # several reward models: min | mean | mean-std
    prompts: str = "world"            # prompts: world, world:SEED or JSONL
    shots: int = 4                    # chains: worked examples before each (k), >= 1
    n_prompts: int = 2000             # how many to take, at most, >= 1
    n: int = 8                        # answers to each (N), >= 2
    temperature: float = 1.0          # of the answers, > 0
    max_new_tokens: int = 64          # longest answer, in tokens, >= 1
    no_end_score: float = -1.0        # the score of an answer without <|end|>, any number
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # prompts too long for an answer to fit: error | left | drop
    out: str = "best.jsonl"           # new file to write
    seed: int = 0                     # of prompts and answers, in [0, 4e9]
    device: str = "auto"              # auto | cpu | cuda | cuda:1 | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16


# {option: the methods that read it}
READ_BY = {"reward": ("best_of_n", "pairs"), "combine": ("best_of_n", "pairs"),
           "no_end_score": ("best_of_n", "pairs"), "shots": ("chains",)}
BETWEEN = "\n\n"                      # the worked examples of a text


# ---------------------------------------------------------------------- best_of_n, pairs

def selected(cfg: Config, model, tokenizer, reward: Reward,
             generator: torch.Generator) -> tuple[list[dict], str]:
    """The best answer to each prompt, or the best against the worst, as rows to write, and what is
    said of them."""
    prompts, ids = prompts_to_answer(cfg, tokenizer, model.config.context_length)
    written = []
    for first in tqdm(range(0, len(prompts), 64), desc=cfg.method, unit="64 prompts"):
        asked = prompts[first:first + 64]
        # 1. SAMPLE, 2. SCORE, 3. SELECT
        answers, scores = sample.sample_and_score(
            model, tokenizer, asked, ids[first:first + 64], cfg.n, reward, cfg.max_new_tokens,
            cfg.no_end_score, cfg.temperature, generator)
        if cfg.method == "pairs":
            written += best_and_worst(asked, answers, scores.flatten().tolist(), cfg.n, tokenizer)
            continue
        for number, (row, best) in enumerate(zip(asked, scores.argmax(1).tolist())):
            answer = answers[number * cfg.n + best]
            text = tokenizer.decode(answer)
            # nor one that was cut off, because a model would learn to end there
            if text.strip() and answer[-1] == tokenizer.end:
                written.append({"prompt": row["messages"], "response": text,
                                "score": scores[number, best].item()})
    return written, (f"{len(written)} of {len(prompts)} prompts are in {cfg.out}; the best of "
                     f"{cfg.n} answers lies at most {best_of_n_kl(cfg.n):.2f} nats from the "
                     "model's own")


# ---------------------------------------------------------------------- chains

def reasoned(cfg: Config, model, tokenizer,
             generator: torch.Generator) -> tuple[list[dict], str]:
    """The first answer to each question that reasons and is right, as rows to write, and what is
    said of them."""
    examples, questions = worked_examples(cfg)
    is_text = sample.is_base(cfg.init)                 # it has never seen a conversation
    longest = model.config.context_length - cfg.max_new_tokens

    def sequences_of(question):
        for n in range(len(examples), 0, -1):
            ids = few_shot_ids(tokenizer, examples[:n], question, is_text)
            if len(ids) <= longest:
                break
        question["shots"] = n
        return [(ids, [0] * len(ids))]                 # a prompt has no targets

    questions, sequences = fit_all(questions, sequences_of, longest, cfg.truncate)
    ids = [prompt.tolist() for [(prompt, _)] in sequences]
    written = []
    counts = Counter()
    for first in tqdm(range(0, len(questions), 64), desc=cfg.method, unit="64 prompts"):
        # 1. SAMPLE (r, a) ~ pi_theta(.|x_1, r_1, a_1, ..., x_k, r_k, a_k, x)
        answers = sample.generate(model, ids[first:first + 64], cfg.max_new_tokens,
                                  (tokenizer.end, tokenizer.endoftext), cfg.temperature,
                                  generator=generator, group=cfg.n)
        texts = [ended_text(tokenizer, answer, is_text) for answer in answers]
        for number, question in enumerate(questions[first:first + 64]):
            # 2. SCORE, 3. SELECT the first right one
            row = first_right(question, texts[number * cfg.n:(number + 1) * cfg.n], counts)
            if row:
                written.append(row)
    shots = [question["shots"] for question in questions]
    return written, (f"{len(written)} of {len(questions)} questions are in {cfg.out}; of "
                     f"{counts.total()} answers {counts['right']} are right, {counts['wrong']} "
                     f"wrong, {counts['bare']} without a chain, {counts['cut off']} cut off; "
                     f"before each question {min(shots)} to {max(shots)} examples (--shots "
                     f"{cfg.shots})")


def worked_examples(cfg: Config) -> tuple[list[list[dict]], list[dict]]:
    """Of the rows of --prompts the first --shots that have a chain, as conversations, and the
    others, as questions whose number is known. Raises ValueError where no row has a chain, or no
    question is left, and for an answer without a number."""
    options = {}
    if readers.world_named(cfg.prompts):
        options["families"] = ("arithmetic",)          # which alone has chains
    rows = readers.read_examples(cfg.prompts, split="train", n=cfg.n_prompts + cfg.shots,
                                 seed=cfg.seed, bad_rows=cfg.bad_rows, **options)
    examples = []
    questions = []
    for row in rows:
        *prompt, answer = row["messages"]
        known = number_in(answer["content"])
        if known is None:
            raise ValueError(f"{row['where']}: its answer has no number by which a chain could be "
                             'judged; give answers with one, as "#### 72" or "The answer is 72."')
        chain, final = parts_of(answer["content"])
        chain = row["chain"] or chain
        if chain and final and len(examples) < cfg.shots:
            shown = {"role": "assistant", "content": f"{chain} {final}"}
            examples.append([*prompt, shown])
        else:
            questions.append({"messages": prompt, "known": known, "where": row["where"]})
    if not examples or not questions:
        raise ValueError(f"--prompts {cfg.prompts}: of {len(rows)} rows {len(examples)} can be "
                         f"worked examples, and {len(questions)} are left as questions; give more, "
                         'some with a column "chain", or with reasoning before "#### 72"')
    return examples, questions[:cfg.n_prompts]


def parts_of(text: str) -> tuple[str, str]:
    """The chain and the final answer of an answer, "" and "" where it has none.

    "6 + 6 = 12. The answer is 12. Bye." -> "6 + 6 = 12.", "The answer is 12."
    "It is 6 + 6.\\n#### 12"             -> "It is 6 + 6.", "#### 12"
    "Of course! The answer is 12."       -> "", "The answer is 12.": a chain has numbers
    """
    found = list(FINAL_NUMBER.finditer(text))
    if not found:
        return "", ""
    last = found[-1]
    # its whole sentence, of which FINAL_NUMBER is the end
    start = 1 + max(text.rfind(stop, 0, last.start()) for stop in ".!?\n")
    chain = text[:start].strip()
    return chain if NUMBER.search(chain) else "", text[start:end_of(last)].strip()


def end_of(final: re.Match) -> int:
    """Where a final answer ends, with its full stop."""
    return final.end() + final.string.startswith(".", final.end())


def few_shot_ids(tokenizer, examples: list[list[dict]], question: dict,
                 is_text: bool) -> list[int]:
    """The examples and then the question: earlier turns of a conversation, or paragraphs of a text
    that a base model goes on with."""
    if not is_text:
        turns = [turn for example in examples for turn in example]
        return tokenizer.prompt([*turns, *question["messages"]])
    paragraphs = []
    for turns in (*examples, question["messages"]):
        paragraphs.append(" ".join(turn["content"] for turn in turns))
    return tokenizer.encode(BETWEEN.join(paragraphs))


def ended_text(tokenizer, answer: list[int], is_text: bool) -> str | None:
    """What the model has written; None where it was cut off. A base model, which knows no end, has
    answered with its first final answer, and with its first paragraph at the latest."""
    text = tokenizer.decode(answer)
    if is_text:
        paragraph, between, _ = text.partition(BETWEEN)
        final = FINAL_NUMBER.search(paragraph)
        # something behind it, because "The answer is 1" may be about to become 12
        if final and final.end() < len(text):
            return paragraph[:end_of(final)]
        if between:
            return paragraph
    is_whole = answer[-1] in (tokenizer.end, tokenizer.endoftext)
    return text if is_whole else None


def first_right(question: dict, texts: list[str | None], counts: Counter) -> dict | None:
    """The first of the texts with a chain and the known answer, as a row to write; counts: of all
    texts, is changed."""
    kept = None
    for text in texts:
        chain, final = parts_of(text or "")
        if text is None:
            counts["cut off"] += 1
        elif not chain:
            counts["bare"] += 1
        elif number_in(final) != question["known"]:
            counts["wrong"] += 1
        else:
            counts["right"] += 1
            kept = kept or {"prompt": question["messages"], "response": final, "chain": chain}
    return kept


def main(cfg: Config) -> list[dict]:
    refuse_unread(cfg, READ_BY)
    claim.check_new_file("--out", cfg.out)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    model, tokenizer = load_model(cfg.init, device, dtype)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    if cfg.method == "chains":
        written, said = reasoned(cfg, model, tokenizer, generator)
    else:
        reward = Reward(cfg.reward, cfg.combine, tokenizer, device, dtype)
        written, said = selected(cfg, model, tokenizer, reward, generator)
    # 4. WRITE
    if not written:
        raise ValueError(f"--prompts {cfg.prompts}: no answer is worth keeping: all are empty, "
                         "cut off, with --method pairs worth the same, or with --method chains "
                         "wrong or without a chain")
    text = "".join(json.dumps(row) + "\n" for row in written)
    claim.write_whole(Path(cfg.out), lambda file: file.write_text(text))
    print(said)
    return written


if __name__ == "__main__":
    command_line(main, Config, __doc__)
