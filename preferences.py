"""
Where preferences come from (001 sections 4.3 and 4.10), as data.PreferencePairs.

    read_pairs      (x, y_w, y_l) of a file or the world                     reward model, DPO
    read_ranked     pairs, ratings or rankings                               reward models
    read_labelled   an answer with its thumb, and one to another prompt      KTO
    in_rounds       of the policy itself, in rounds of sampling and training:
      best_and_worst    of its answers to a prompt, by a reward              online DPO (4.10)
      demonstrated      a demonstration against its own answer               SPIN (Chen et al. 2024)
"""
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lora
import readers
import sample
from data import PreferencePairs, encode_prompts, permuted
from model import Transformer
from parallel import gathered, join_ranks, ranks
from plumbing import claim
from plumbing.device import pick_device, pick_dtype
from plumbing.folders import load_model, parents
from rewards import Reward
from scoring import mean_if_any, ranked_right

# Options of train_dpo.py on which the pairs of its rounds depend.
MAKE_PAIRS = ("init", "reference", "data", "n_pairs", "prompts", "seed", "rounds", "steps",
              "batch_size", "reward", "combine", "answers", "no_end_score", "spin",
              "max_new_tokens")
# Those that say how own answers become pairs: a round's own run has none of them.
OWN = ("rounds", "reward", "spin", "combine", "prompts", "answers", "no_end_score")


def read_pairs(cfg, run, tokenizer, length: int) -> tuple[PreferencePairs, PreferencePairs]:
    """The pairs to train on and the held-out ones; length: tokens that fit into the context."""
    return split_in_two(cfg, run, tokenizer, length, readers.read_preferences, "pairs")


def split_in_two(cfg, run, tokenizer, length: int, read: Callable,
                 name: str) -> tuple[PreferencePairs, PreferencePairs]:
    """What a reader finds in --data, to train on and held out."""
    dials = {"noise": cfg.label_noise, "bias": getattr(cfg, "length_bias", 0.0),
             "disagreement": getattr(cfg, "disagreement", 0.0)}
    train = read(cfg.data, split="train", n=cfg.n_pairs, seed=cfg.seed, bad_rows=cfg.bad_rows,
                 **dials)
    # without the dials, because what is held out must be the truth
    heldout = read(cfg.data, split="heldout", n=cfg.eval_pairs, seed=cfg.seed,
                   bad_rows=cfg.bad_rows)
    train = PreferencePairs(train, tokenizer, length, cfg.seed, cfg.truncate)
    heldout = PreferencePairs(heldout, tokenizer, length, cfg.seed, cfg.truncate)
    run.say(f"{len(train)} {name}, {len(heldout)} held out")
    return train, heldout


def read_reference(cfg, run, model: Transformer) -> nn.Module:
    """pi_ref, frozen: --reference, else the model as it is now."""
    if not cfg.reference:
        return lora.reference_of(model, cfg.adapters)
    reference, _ = load_model(cfg.reference, run.device, run.dtype, cfg.context_length)
    return reference.requires_grad_(False).eval()


# ---------------------------------------------------------------------- ratings and rankings

def read_ranked(cfg, run, tokenizer, length: int) -> tuple[PreferencePairs, PreferencePairs]:
    """What --loss learns from, and what is held out.

    Raises ValueError for --loss margin and a pair that does not say how much better it is.
    """
    if cfg.loss == "pointwise":
        return split_in_two(cfg, run, tokenizer, length, read_rated, "ratings")
    if cfg.loss == "plackett_luce":
        return split_in_two(cfg, run, tokenizer, length, readers.read_rankings, "rankings")
    train, heldout = read_pairs(cfg, run, tokenizer, length)
    if cfg.loss == "margin":
        for pair in train.pairs + heldout.pairs:
            if pair["margin"] is None:
                raise ValueError(f"{pair['where']}: this pair has no \"margin\"; give each one, or "
                                 "--loss bt")
    return train, heldout


def read_rated(data: str, **options) -> list[dict]:
    """Ratings as lists of one answer."""
    return [row | {"responses": [row["response"]]} for row in readers.read_ratings(data, **options)]


def numbers(items: list[dict], name: str) -> Tensor:
    """(B,) a number of each item: its "margin", its "rating"."""
    return torch.tensor([float(item[name]) for item in items])


def n_answers(items: list[dict]) -> Tensor:
    """(B,) how many answers each ranking has."""
    return torch.tensor([len(item["responses"]) for item in items])


def margins_of(rewards: Tensor, items: list[dict]) -> Tensor:
    """(M,) the reward of each better answer minus that of a worse one; rewards (K, B), best first.

    The two are answers to one prompt; where each prompt has one rated answer, of the whole batch.
    """
    if "chosen" in items[0]:
        return rewards[0] - rewards[1]
    if "rating" in items[0]:
        ratings = numbers(items, "rating").to(rewards.device)
        is_better = ratings[:, None] > ratings[None, :]                        # (B, B)
        return (rewards[0][:, None] - rewards[0][None, :])[is_better]
    n = n_answers(items).to(rewards.device)
    place = torch.arange(len(rewards), device=rewards.device)                  # (K,) 0: the best
    is_better = (place[:, None] < place[None, :])[..., None]                   # (K, K, 1)
    is_there = (place[:, None] < n)[None]                                      # (1, K, B)
    return (rewards[:, None] - rewards[None, :])[is_better & is_there]


# ---------------------------------------------------------------------- answers with a thumb

def read_data(cfg, run, tokenizer, length: int) -> tuple[PreferencePairs, PreferencePairs]:
    """What --method learns from, and what is held out."""
    read = read_labelled if cfg.method == "kto" else read_pairs
    return read(cfg, run, tokenizer, length)


def read_labelled(cfg, run, tokenizer, length: int) -> tuple[PreferencePairs, PreferencePairs]:
    """The labelled answers to train on and the held-out ones. In the place of y_w stands the
    answer, in that of y_l an answer to another prompt, from which KTO takes its z.

    Raises ValueError where all labels are the same.
    """
    train, heldout = split_in_two(cfg, run, tokenizer, length, read_beside_others, "answers")
    n_good = int(labels_of(train).sum())
    if n_good in (0, len(train)):
        raise ValueError(f"{cfg.data}: all of its {len(train)} answers have the same label; kto "
                         "needs good and bad ones")
    return train, heldout


def read_beside_others(data: str, seed: int, split: str, **options) -> list[dict]:
    rows = readers.read_labelled(data, seed=seed, split=split, **options)
    try:
        return mismatched(rows, seed)
    except ValueError as error:
        raise ValueError(f"{data}: {len(rows)} rows in the {split} part, which are too few: "
                         f"{error}") from None


def mismatched(rows: list[dict], seed: int) -> list[dict]:
    """Each labelled answer beside the answer to another prompt.

    Raises ValueError where there is only one prompt.
    """
    if all(row["prompt"] == rows[0]["prompt"] for row in rows):
        raise ValueError("kto needs two answers at least, to different prompts")
    # a permutation, so that neighbours in a sorted file do not become partners
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    pairs = []
    for place, i in enumerate(order):
        row = rows[i]
        following = (order[k % len(rows)] for k in range(place + 1, place + len(rows)))
        other = next(j for j in following if rows[j]["prompt"] != row["prompt"])
        pairs.append({"prompt": row["prompt"], "chosen": row["response"], "label": row["label"],
                      "rejected": rows[other]["response"], "where": row["where"]})
    return pairs


def sides(values: Tensor, is_good: Tensor | None) -> tuple[Tensor, Tensor]:
    """(2B,) values of a batch's rows -> those of chosen and rejected, or good and bad, answers."""
    if is_good is None:
        return values.chunk(2)
    answers, _ = values.chunk(2)
    return answers[is_good], answers[~is_good]


def monitored(loss: Tensor, margin: Tensor, pi: Tensor, ref: Tensor | None,
              is_good: Tensor | None) -> dict:
    """What DPO tracks (001 step 3.5), means over the rows. logratio_*: log pi_theta - log pi_ref,
    nats per response, which shows where the policy drifts; kl_proxy: the mean of its size."""
    pi_w, pi_l = sides(pi, is_good)
    figures = {"loss": loss, "margin": margin.mean(), "accuracy": ranked_right(margin),
               "logp_chosen": mean_if_any(pi_w), "logp_rejected": mean_if_any(pi_l)}
    if ref is None:
        return figures
    drift_w, drift_l = sides(pi - ref, is_good)
    return figures | {"logratio_chosen": mean_if_any(drift_w),
                      "logratio_rejected": mean_if_any(drift_l),
                      "kl_proxy": torch.cat([drift_w, drift_l]).abs().mean()}


def mean_mismatch(pi: Tensor, ref: Tensor) -> float:
    """The mean of log(pi / pi_ref) over the answers to other prompts, the second half of the rows,
    in nats: KTO's z of this rank. pi, ref: (2B,)."""
    _, h = (pi - ref).chunk(2)
    return h.mean().item()


def mean_of_step(method: str, pi: Tensor, ref: Tensor | None, lengths: Tensor) -> float | None:
    """The mean over a step's rows that a formula needs: KTO's z in nats, ORPO's |y_w| in tokens;
    None for the other methods. pi, ref, lengths: as in method_loss() of train_dpo.py."""
    if method == "kto":
        return mean_mismatch(pi, ref)
    if method == "orpo":
        lengths_w, _ = lengths.chunk(2)
        return lengths_w.float().mean().item()
    return None


def labels_of(pairs: PreferencePairs, index: Tensor | None = None) -> Tensor | None:
    """(n,) bool: whether each answer of read_labelled(), or each of those at the index, is a good
    one; None for pairs, which have no labels."""
    if "label" not in pairs.pairs[0]:
        return None
    rows = pairs.pairs if index is None else pairs.items(index)
    return torch.tensor([row["label"] for row in rows])


# ---------------------------------------------------------------------- the policy's own pairs

def in_rounds(train: Callable, cfg) -> dict:
    """Online DPO (001 section 4.10), and with --spin SPIN: train(cfg) again and again, each time on
    pairs that the policy has just made. Returns what the last round does.

    OUT_rounds holds the pairs and the model of each round, and in rounds.json the options that made
    them; the last one's model is OUT itself. The reference stays where the first round began;
    SPIN's is the policy of the round before.
    """
    for name in ("label_noise",) if cfg.spin else ("label_noise", "data"):
        if getattr(cfg, name) != getattr(type(cfg), name):
            raise ValueError(f"--{name} {getattr(cfg, name)}: pairs of the policy's own answers do "
                             "not read it; leave it out")
    join_ranks(on_gpu=pick_device(cfg.device).type == "cuda")
    folder = Path(f"{cfg.out}_rounds")
    rank, _ = ranks()
    if rank == 0:
        claim.lock(folder)
        begin_rounds(cfg, folder)
    gathered([])                                       # the others wait for what it finds
    per_round = cfg.steps // cfg.rounds
    policy = cfg.init
    reference = cfg.reference or cfg.init
    for number in range(1, cfg.rounds + 1):
        out = cfg.out if number == cfg.rounds else str(folder / str(number))
        pairs = folder / f"pairs_{number}.jsonl"
        # 1 to 4. Prompts, pairs of the current policy, scores, fresh preference pairs
        goes_on = cfg.resume and pairs.exists()
        if not goes_on:
            make_pairs(cfg, policy, pairs, number, per_round)
        # 5. DPO on the new data. What may lie in `out` when its pairs are new is of an earlier run,
        # which --overwrite was to replace when it was stopped
        result = train(replace(cfg, init=policy, out=out, data=str(pairs), steps=per_round,
                               reference=policy if cfg.spin else reference, n_pairs=10 ** 9,
                               resume=goes_on, **{name: getattr(type(cfg), name) for name in OWN},
                               overwrite=cfg.overwrite or cfg.resume and not goes_on))
        policy = out
    if rank == 0:
        claim.unlock(folder)
    return result


def begin_rounds(cfg, folder: Path) -> None:
    """Keep what the pairs are made of, in rounds.json.

    Raises ValueError when --resume would make the rest of other options or models, unless --insist,
    and when there are pairs already and neither --resume nor --overwrite.
    """
    file = folder / "rounds.json"
    wanted = {name: getattr(cfg, name) for name in MAKE_PAIRS} | {"models": parents(cfg)}
    if cfg.resume and file.exists():
        before = claim.read_json(file)
        for name, value in wanted.items():
            if before.get(name) != value and not cfg.insist:
                raise ValueError(f"{file}: these rounds began with {name} {before.get(name)!r}, "
                                 f"not {value!r}; give that, --insist to go on, or --overwrite")
        return
    for pairs in folder.glob("pairs_*.jsonl"):
        if not (cfg.resume or cfg.overwrite):
            raise ValueError(f"{pairs} is there already; --resume goes on with these rounds, "
                             "--overwrite begins them afresh, or give another --out")
        if cfg.overwrite and pairs.name in claim.written(folder):
            pairs.unlink()
    claim.refuse_foreign(folder, [file.name])
    claim.add(folder, file.name)
    text = json.dumps(wanted, indent=1) + "\n"
    claim.write_whole(file, lambda temporary: temporary.write_text(text))


def make_pairs(cfg, policy: str, file: Path, number: int, steps: int) -> None:
    """Write a round's pairs, as many prompts as its steps will read. Each rank makes a share.

    Raises ValueError when they are none.
    """
    rank, n_ranks = ranks()
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    model, tokenizer = load_model(policy, device, dtype, cfg.context_length)
    generator = torch.Generator(device).manual_seed(cfg.seed * 1_000_003 + number * 1_009 + rank)
    # 1. Sample prompts
    rows = own_prompts(cfg)
    room = model.config.context_length - cfg.max_new_tokens
    prompts, ids = encode_prompts(rows, tokenizer, room, cfg.truncate)
    index = permuted(len(prompts), cfg.seed, number, steps * cfg.batch_size, rank, n_ranks)
    asked = [prompts[i] for i in index]
    x = [ids[i] for i in index]
    if cfg.spin:
        # 2. Generate answers with the current policy  4. Construct pairs
        y = sample.generate(model, x, cfg.max_new_tokens, (tokenizer.end,), 1.0,
                            generator=generator)
        pairs = demonstrated(asked, [tokenizer.decode(answer) for answer in y])
    else:
        # before the answers are made, because it may be refused
        reward = Reward(cfg.reward, cfg.combine, tokenizer, device, dtype)
        # 2. Generate answers with the current policy  3. Score them by the reward
        y, scores = sample.sample_and_score(model, tokenizer, asked, x, cfg.answers, reward,
                                            cfg.max_new_tokens, cfg.no_end_score,
                                            generator=generator)
        # 4. Construct pairs
        pairs = best_and_worst(asked, y, scores.flatten().tolist(), cfg.answers, tokenizer)
    pairs = gathered(pairs)
    if not pairs:
        raise ValueError(f"round {number}: all answers to a prompt are equal, empty, or worth the "
                         "same, so that there is no pair; give another --reward or more --answers")
    if rank == 0:
        print(f"round {number}: {len(pairs)} pairs of {len(index) * n_ranks} prompts, in {file}; "
              "the other prompts' answers are equal, empty, or worth the same", file=sys.stderr)
        text = "".join(json.dumps(pair) + "\n" for pair in pairs)
        claim.refuse_foreign(file.parent, [file.name])
        claim.add(file.parent, file.name)
        claim.write_whole(file, lambda temporary: temporary.write_text(text))
    gathered([])                                       # the others wait for the file


def own_prompts(cfg) -> list[dict]:
    """--prompts; with --spin those of the demonstrations in --data, which stand in "answer"."""
    # of both splits, because each round's pairs are split by their prompts
    options = {"split": None, "n": cfg.n_pairs, "seed": cfg.seed, "bad_rows": cfg.bad_rows}
    if not cfg.spin:
        return readers.read_prompts(cfg.prompts, **options)
    rows = []
    for row in readers.read_examples(cfg.data, **options):
        *prompt, demonstration = row["messages"]
        rows.append(row | {"messages": prompt, "answer": demonstration["content"]})
    return rows


def best_and_worst(asked: list[dict], answers: list[list[int]], scores: list[float], group: int,
                   tokenizer) -> list[dict]:
    """Of each prompt's answers, `group` of them in a row, the best against the worst.

    Empty ones do not count, because no stage reads them. One that was cut off may be the worst, and
    never the best, because a model would learn to end there.
    """
    texts = [tokenizer.decode(answer) for answer in answers]
    pairs = []
    for number, row in enumerate(asked):
        places = range(number * group, (number + 1) * group)
        filled = [place for place in places if texts[place].strip()]
        ended = [place for place in filled if answers[place][-1] == tokenizer.end]
        if not ended:
            continue
        best = max(ended, key=scores.__getitem__)
        worst = min(filled, key=scores.__getitem__)
        if scores[best] > scores[worst] and texts[best] != texts[worst]:
            pairs.append({"prompt": row["messages"], "chosen": texts[best],
                          "rejected": texts[worst]})
    return pairs


def demonstrated(asked: list[dict], texts: list[str]) -> list[dict]:
    """The demonstration against the policy's own answer; what it imitates already is no pair."""
    pairs = []
    for row, text in zip(asked, texts):
        if text.strip() and text != row["answer"]:
            pairs.append({"prompt": row["messages"], "chosen": row["answer"], "rejected": text})
    return pairs
