"""
What keeps a policy from gaming its reward (001 section 4.12; 003), as options of train_ppo.py.

  --kl_budget   KL <= delta: training stops beyond it, and the last policy inside is the result
  --gold        another reward looks at held-out answers, and the policy that it liked best stays
  --lm_coef     demonstrations are still learned from, so that less is forgotten

The KL penalty and its controller are train_ppo.py's own; ensembles of rewards are in rewards.py.
"""
import math

import sample
from data import PackedExamples, format_examples, prompts_to_answer
from readers import read_examples
from rewards import Reward
from scoring import score_responses


def read_lm_data(cfg, tokenizer, length: int) -> PackedExamples | None:
    """Demonstrations to go on learning from (003: general data mixed in; Ouyang et al. 2022)."""
    if not cfg.lm_coef:
        return None
    rows = read_examples(cfg.lm_data, split="train", n=10_000, seed=cfg.seed, bad_rows=cfg.bad_rows)
    return PackedExamples(format_examples(rows, tokenizer), tokenizer, length, cfg.seed, "drop")


def why_stop(actor, kept, controller, kl: float, figures: dict, cfg) -> str:
    """Keep the policy that is to be the result if training ends here. Returns why it must end, ""
    while it may go on.

    kept: a model like the actor; controller: train_ppo's Controller; kl: nats per response;
    figures["gold"] is there after --gold's looks.
    """
    if cfg.kl_budget and kl > cfg.kl_budget:
        return f"its KL of {kl:.2f} nats is beyond --kl_budget {cfg.kl_budget:g}"
    if cfg.gold and "gold" not in figures:
        return ""
    # within a budget every policy is better than the one before
    if cfg.kl_budget or figures["gold"] > controller.best_gold:
        kept.load_state_dict(actor.state_dict())
        controller.best_gold = figures.get("gold", -math.inf)
        controller.looks_since = 0
        return ""
    controller.looks_since += 1
    if controller.looks_since < cfg.gold_patience:
        return ""
    return f"--gold was better {controller.looks_since} looks ago: {controller.best_gold:.3f}"


def read_gold(cfg, run, tokenizer, length: int) -> tuple | None:
    """The reward behind --gold, and the held-out prompts, none of the exam's, and their ids."""
    if not cfg.gold:
        return None
    gold = Reward(cfg.gold, cfg.combine, tokenizer, run.device, run.dtype)
    unseen = {"split": "heldout", "n": cfg.gold_prompts, "seed": cfg.seed + 10_007}
    return gold, *prompts_to_answer(cfg, tokenizer, length, **unseen)


def look(gold: tuple[Reward, list, list], actor, tokenizer, cfg) -> float:
    """The mean gold reward of greedy answers to the held-out prompts."""
    reward, prompts, x = gold
    y = sample.generate(actor, x, cfg.max_new_tokens, (tokenizer.end,))
    score, _ = score_responses(reward, prompts, x, y, tokenizer.end, cfg.no_end_score)
    return score.mean().item()
