"""
Stages 2-3: supervised fine-tuning (001 section 2.5) over several task families (section 3.7).

  1. INITIALIZE         theta <- theta*; with --peft lora only A and B train (1.1, 1.2, 1.3)
  2. DATA FORMATTING    2.1 prompt and completion as one sequence  2.2 loss mask
  3. TRAINING LOOP      3.1 sample  3.2 forward  3.3 backward  3.4 update
  4. MERGE              W_0 + (alpha / r) B A, when adapters were trained
  5. RETURN phi*, theta_ft

The steps that section 3.7 adds are marked 3.7/n: mixing weights w_k of the task families, and a
periodic evaluation on families that are never trained on.

Minimise  L = -sum_t m_t log p_theta(s_t | s_<t) / sum_t m_t,  m_t = 1 on the assistant's tokens and
their <|end|> (the <EOS> of the document).

An encoder-decoder (train_denoise.py) reads a conversation up to its last answer and writes that
one alone, L_seq2seq = -sum_t log p_theta(y_t | y_<t, x) of section 2.2.

Differs from the document:
  1.       everything is trained unless --peft lora: 3.7 trains all of theta, 2.5 only phi.
  2.1      several examples share a row ("packing"); attention and loss stay inside each.
  3.7/1.1  templates and reasoning chains are the data's: the world words its tasks in several ways
           and reasons in arithmetic; a file's rows may have a "chain" beside their answer.
  3.2      the sums run over the whole optimizer step, all micro-batches and ranks.
  3.4      the gradient is clipped, as 3.7 has it and 2.5 has not.
  3.7/3.4  zero-shot, and few-shot with --shots.

    python train_sft.py                                            # the embedded world
    python train_sft.py --peft lora --lora_rank 16 --lr 3e-3
    python train_sft.py --ewc 0.1                  # section 2.3: forget less text (forgetting.py)
    python train_sft.py --init out/span --families translation,summary   # T5: results/objectives.md
    python train_sft.py --init out/base --data tasks.jsonl --context_length 512
"""
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import evaluate
import lora
import objectives
from data import PackedExamples, mixing_weights, response_start
from forgetting import OLD_FIGURES, Past, check_options, squared_distance
from model import Transformer, parameter_count
from moe import router_loss
from plumbing import inputs
from plumbing.folders import load_model
from plumbing.optimizers import learning_rate, pick_optimizer
from plumbing.options import Options, command_line, nested
from plumbing.run import start
from readers import read_chosen, read_examples
from scoring import answer_logps, token_logps


@dataclass
class Config(Options):
    init: str = "out/pretrain"        # model folder to start from
    out: str = "out/sft"              # model folder to write
    data: str = "world"               # examples: world, world:SEED or JSONL (README: formats)
    n_examples: int = 30_000          # how many to take, at most, >= 1
    families: str = ""                # of a world: these alone, with commas; empty: all trained
    chosen: bool = False              # --data has preference pairs: imitate the chosen answers
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # examples longer than the context: error | left | drop
    tau: float = 1.0                  # task mixing p_k ~ N_k^(1/tau); inf: uniform, in [1, inf]
    cap: int = 0                      # of a task's examples per epoch (3.5: M); 0: all of them
    cot_ratio: float = 1.0            # share of the reasoning chains that are learned, in [0, 1]
    train_on: str = "response"        # response | all: prompts, too, which 3.4 advises against
    context_length: int = 0           # tokens in a row; 0: the model's own
    steps: int = 1000                 # optimizer steps (T_ft), >= 1
    batch_size: int = 16              # rows per micro-batch and rank, >= 1
    grad_accum: int = 1               # micro-batches per optimizer step, >= 1
    optimizer: str = "adamw"          # adamw | adam | muon: with --lr 4e-3 gains 1.2 points
    lr: float = 2e-3                  # peak learning rate (document: 1e-4 to 3e-4)
    warmup: int = 30                  # steps of linear warmup, before the cosine
    weight_decay: float = 0.0         # on matrices only
    max_norm: float = 1.0             # gradient clipping, > 0
    gradient_checkpointing: bool = False   # recompute activations in the backward pass: less memory
    shard: str = "none"               # under torchrun: none | fsdp, weights shared among the ranks
    tensor_parallel: int = 1          # under torchrun: so many ranks divide each matrix, >= 1
    eval_every: int = 500             # steps between evaluations
    eval_examples: int = 200          # of a world: exam questions answered at each evaluation, >= 1
    shots: int = 0                    # of a world: solved examples before those of unseen families
    save_every: int = 200             # steps between checkpoints
    ewc: float = 0.0                  # lambda of Elastic Weight Consolidation; 0: without
    fisher_examples: int = 200        # rows of pretraining's text behind its F, >= 1
    l2_to_base: float = 0.0           # of |theta - theta*|^2 / 2; 0: without
    kl_to_base: float = 0.0           # of KL(--init || model) per token of that text; 0: without
    replay: float = 0.0               # share of a step's rows that are that text, in [0, 1)
    replay_data: str = ""             # that text; empty: what the records of --init name
    track_drift: bool = False         # log how much of it is forgotten, as these five do
    adapters: lora.Options = nested(lora.Options)          # what trains


def families_of(cfg: Config) -> tuple[str, ...] | None:
    """("translation", "summary") of "translation,summary"; None: all. Raises ValueError with
    --chosen, whose pairs have families of their own."""
    if cfg.families and cfg.chosen:
        raise ValueError(f"--families {cfg.families}: pairs are not drawn by family; leave out one "
                         "of it and --chosen")
    return tuple(cfg.families.split(",")) if cfg.families else None


def read_rows(cfg: Config) -> tuple[list[dict], list[dict]]:
    """The conversations to train on and the held-out ones, as text."""
    read = read_chosen if cfg.chosen else read_examples
    options = {"seed": cfg.seed, "bad_rows": cfg.bad_rows}
    if families := families_of(cfg):
        options["families"] = families
    n_heldout = min(1000, 1 + cfg.n_examples // 10)
    train = read(cfg.data, split="train", n=cfg.n_examples, **options)
    heldout = read(cfg.data, split="heldout", n=n_heldout, **options)
    return train, heldout


def mix_chains(rows: list[dict], ratio: float, seed: int) -> None:
    """Answers with their reasoning chain before them, in this share of the rows that have one, and
    without it in the others (3.6: y = [r_1, ..., r_m, a])."""
    rng = np.random.default_rng(seed)
    for row in rows:
        answer = row["messages"][-1]
        chain = row["chain"]
        if chain and rng.random() >= ratio:
            text = answer["content"].replace(f"{chain} ", "")
        elif chain and chain not in answer["content"]:
            text = f"{chain} {answer['content']}"
        else:
            continue
        row["messages"] = [*row["messages"][:-1], answer | {"content": text}]


def task_of(model: Transformer, cfg: Config) -> tuple[Callable, bool]:
    """How the model's answers are scored, and whether the last of a conversation is the only one.

    Raises ValueError for options that ask an encoder-decoder to write what it only reads.
    """
    if model.architecture == "decoder":
        return token_logps, False
    options = [f"--{name}" for name in inputs.OLD_TEXT if getattr(cfg, name)]
    if cfg.train_on != "response":
        options.append(f"--train_on {cfg.train_on}")
    if options:
        raise ValueError(f"--init {cfg.init} is an encoder-decoder, which writes answers and reads "
                         f"all else; leave out {', '.join(options)}, or give a decoder")
    return answer_logps, True


def format_rows(rows: list[dict], tokenizer, train_on: str = "response",
                last_alone: bool = False) -> None:
    """Give each conversation its "ids" and its loss "mask", two lists of one length. last_alone:
    earlier answers are no targets."""
    for row in rows:
        # 2.1 Construct prompt-completion sequence: the template's role tokens around each turn
        row["ids"] = tokenizer.conversation(row["messages"])
        # 2.2 Create loss mask: 1 on the assistant's tokens and their <|end|>
        row["mask"] = tokenizer.response_mask(row["ids"])
        if train_on == "all":
            row["mask"] = [int(i < tokenizer.vocab_size) for i in row["ids"]]    # not virtual ones
        if last_alone:
            start = response_start(row["mask"])
            row["mask"] = [0] * start + row["mask"][start:]


def read_at_once(train: PackedExamples, last_alone: bool, cfg: Config) -> dict[str, float]:
    """What an encoder-decoder makes of the first batch, for the forecast: so many rows, and tokens
    in each on either side. {} for a decoder, which reads the packed rows."""
    if not last_alone:
        return {}
    pairs = objectives.answers_apart(train.batch(0, cfg.batch_size))
    rows = len(pairs.tokens)
    return {"rows": rows, "length": pairs.n_tokens / 2 / rows}


def heldout_figures(model, heldout: PackedExamples, tokenizer, quiz: dict, cfg: Config,
                    scores: Callable) -> dict:
    """Response loss on held-out examples, and accuracy on the exams of a world."""
    val_loss = evaluate.response_loss(model, heldout, cfg.batch_size, scores)
    accuracies = evaluate.quiz_accuracy(model, tokenizer, quiz)
    return {"val_loss": val_loss, "perplexity": math.exp(val_loss), **accuracies}


def main(cfg: Config) -> dict:
    check_options(cfg)
    run = start(cfg, __file__)

    # 1. INITIALIZE
    model, tokenizer = load_model(cfg.init, run.device, run.dtype, cfg.context_length,
                                  two_stacks=True)
    scores, last_alone = task_of(model, cfg)
    # 1.1 Initialize A ~ N(0, sigma^2), with --peft lora
    # 1.2 Initialize B <- 0
    # 1.3 Freeze W_0, and all else that is no adapter
    lora.begin(model, cfg.adapters, run, tokenizer)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    length = model.config.context_length
    past = Past(cfg, run, model, tokenizer)                  # section 2.3; nothing by default

    # 2. DATA FORMATTING
    train_rows, heldout_rows = read_rows(cfg)
    # 3.7/1.1 Templates and reasoning chains are the data's, of the chains as many as --cot_ratio
    mix_chains(train_rows, cfg.cot_ratio, cfg.seed)
    format_rows(train_rows, tokenizer, cfg.train_on, last_alone)
    format_rows(heldout_rows, tokenizer, last_alone=last_alone)
    # 3.7/1.2 Compute sampling weights w_k ~ min(N_k, M)^(1/tau) of the task families
    counts = Counter(row["task"] for row in train_rows)
    cap = cfg.cap or None
    weights = mixing_weights(counts, cfg.tau, cap)
    # 3.7/1.3 Construct D_instruct: weighted interleaving, packed into rows
    train = PackedExamples(train_rows, tokenizer, length, cfg.seed, cfg.truncate, weights, cap)
    heldout = PackedExamples(heldout_rows, tokenizer, length, cfg.seed, cfg.truncate)
    quiz = evaluate.quiz(cfg.data, cfg.eval_examples, families_of(cfg))   # {} of a file
    if quiz and cfg.shots:
        quiz["few_shot"], n_shots = evaluate.few_shot(cfg.data, quiz["unseen_families"], cfg.shots,
                                                      tokenizer, length)
        run.say(f"{n_shots} of {cfg.shots} shots fit into the context of {length} tokens")
    forward = run.prepare(model, "logps")
    # 3.7/2 theta <- theta*, AdamW
    optimizer = pick_optimizer(cfg.optimizer, model, cfg.lr, cfg.weight_decay, run.dtype)
    unigram_loss = evaluate.unigram_response_loss(train, heldout, tokenizer.vocab_size)
    base_loss = evaluate.response_loss(model, heldout, cfg.batch_size, scores)     # of --init
    train = past.with_replay(train)
    run.track(model=model, optimizer=optimizer)
    run.say(f"{len(train_rows)} examples, {parameter_count(model, trainable=True) / 1e6:.3f}M of "
            f"{parameter_count(model) / 1e6:.2f}M parameters train; held-out response loss to "
            f"beat: unigram {unigram_loss:.2f}, the model as it is {base_loss:.2f} nats per token")
    run.forecast(model, *past.references, **read_at_once(train, last_alone, cfg))

    # 3. TRAINING LOOP
    for step in run.steps(cfg.steps):
        # 3.1 Sample mini-batch
        batches = train.micro_batches(step, cfg, run)        # 3.7/3.1 respecting the weights w_k
        # the mean over ranks and not the sum, because DDP will divide the gradients by their number
        n_targets = run.mean_over_ranks(sum(batch.n_targets for batch in batches))
        loss = 0.0                                           # of the whole step
        for batch in batches:
            # ranks average in the backward pass of the last micro-batch (FSDP: of each)
            forward.require_backward_grad_sync = batch is batches[-1]
            # 3.2 FORWARD PASS
            logps = scores(forward, batch)                   # 3.7/3.2 (B, T), 0 where m_t = 0
            batch_loss = -logps.sum() / n_targets
            penalty = router_loss(model)                     # of this pass, before that of the KL
            if cfg.ewc:                                      # L_EWC of section 2.3
                penalty = penalty + cfg.ewc / 2 * squared_distance(model, past.theta, past.fisher)
            if cfg.l2_to_base:
                penalty = penalty + cfg.l2_to_base / 2 * squared_distance(model, past.theta)
            if cfg.kl_to_base:
                penalty = penalty + cfg.kl_to_base * past.kl(model, step)
            # 3.3 BACKWARD PASS
            run.backward(batch_loss + penalty / cfg.grad_accum)
            loss += batch_loss.detach()

        # 3.4 UPDATE
        grad_norm = run.clip(model, cfg.max_norm)
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        # 3.7/3.3 AdamW update, after backward and gradient clip
        run.step(optimizer, lr, loss, grad_norm)
        optimizer.zero_grad()

        figures = {"loss": loss}
        # 3.7/3.4 PERIODIC EVALUATION: held-out examples, and families never trained on
        if run.due(step, cfg.eval_every):
            figures |= heldout_figures(model, heldout, tokenizer, quiz, cfg, scores)
            figures |= past.figures(model)
        tokens = sum(batch.tokens.numel() for batch in batches)
        run.log(step, tokens=tokens, grad_norm=grad_norm, lr=lr, **figures)
        if run.due(step, cfg.save_every):
            run.save_checkpoint(step + 1)

    # 4. MERGE (the adapters alone are kept, too)
    lora.end(model, cfg.adapters, run)
    results = run.last("val_loss") | {"base_loss": base_loss, "unigram_loss": unigram_loss}
    results |= run.last_with(*OLD_FIGURES)
    # 5. RETURN phi*, theta_ft
    # 3.7/4 RETURN theta_instruct
    return run.finish(model, tokenizer, results)


if __name__ == "__main__":
    command_line(main, Config, __doc__)
