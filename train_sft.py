"""
Stages 2-3: supervised fine-tuning (001 section 2.5) over several task families (section 3.7).

  1. INITIALIZATION     theta <- theta*; with --peft lora freeze it and train only A and B
  2. DATA FORMATTING    template, loss mask, mixing weights w_k of the task families (3.7 step 1)
  3. TRAINING LOOP      3.1 sample  3.2 forward  3.3 backward  3.4 update
                        periodically evaluate, also on families never trained on (3.7 step 3.4, its
                        zero-shot half)
  4. MERGE              W_0 + (alpha / r) B A, when adapters were trained
  5. RETURN phi*, theta_ft

Minimise  L = -sum_t m_t log p_theta(s_t | s_<t) / sum_t m_t,  m_t = 1 on the assistant's tokens and
their <|end|> (the <EOS> of the document).

Differs from the document:
  1.    everything is trained unless --peft lora: 3.7 trains all of theta, 2.5 only phi.
  1.    Muon for the inner matrices (muon.py) unless --optimizer adamw; adapters go by AdamW.
  1.    A of LoRA is uniform with the variance 1 / (3 d_in), as peft has it, not normal.
  2.1   several examples share a row ("packing"); attention and loss stay inside each.
  2.1   templates and reasoning chains (3.7 steps 1.1) are the data's: the world words its tasks in
        several ways and reasons in arithmetic; rows of a file are taken as they are.
  3.2   the sums run over the whole optimizer step, all micro-batches and ranks.

    python train_sft.py                                            # the embedded world
    python train_sft.py --peft lora --lora_rank 16 --lr 3e-3
    python train_sft.py --init out/base --data tasks.jsonl --context_length 512
"""
import math
from dataclasses import dataclass

import data
import evaluate
import forecast
import lora
import training
from model import load_model, parameter_count, token_logps


@dataclass
class Config:
    init: str = "out/pretrain"        # model folder to start from
    out: str = "out/sft"              # model folder to write
    data: str = "world"               # examples: world, world:SEED or JSONL (README: formats)
    n_examples: int = 30_000          # how many to take, at most
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # examples longer than the context: error | left | drop
    tau: float = 1.0                  # task mixing p_k ~ N_k^(1/tau): 1 proportional, inf uniform
    context_length: int = 0           # tokens in a row; 0: the model's own
    peft: str = "none"                # none (train everything) | lora
    lora_rank: int = 16               # r
    lora_alpha: float = 32.0          # alpha; the change is scaled by alpha / r
    lora_targets: str = "wq,wv"       # matrices to adapt, of wq,wk,wv,wo,w13,w2
    steps: int = 1000                 # optimizer steps (T_ft)
    batch_size: int = 16              # rows per micro-batch and rank
    grad_accum: int = 1               # micro-batches per optimizer step
    optimizer: str = "muon"           # muon (inner matrices; the rest by AdamW) | adamw
    lr: float = 4e-3                  # peak learning rate
    warmup: int = 30                  # steps of linear warmup, before the cosine
    weight_decay: float = 0.0         # on matrices only
    max_norm: float = 1.0             # gradient clipping
    seed: int = 0                     # of batches and adapters
    device: str = "auto"              # auto | cpu | cuda | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16
    gradient_checkpointing: bool = False   # recompute activations in the backward pass: less memory
    compile: bool = False             # torch.compile: 15-25 s once, then faster steps
    shard: str = "none"               # under torchrun: none | fsdp, weights shared among the ranks
    tensor_parallel: int = 1          # under torchrun: so many ranks divide each matrix
    log_every: int = 10               # steps between rows of metrics.jsonl
    eval_every: int = 500             # steps between evaluations
    eval_examples: int = 200          # held-out examples answered at each evaluation
    save_every: int = 200             # steps between checkpoints
    resume: bool = False              # go on from --out if anything is there
    overwrite: bool = False           # throw away what is in --out


def main(cfg: Config) -> dict:
    run = training.start(cfg, "sft")

    # 1. INITIALIZATION: theta <- theta*, and adapters A ~ U, B = 0 beside frozen weights
    model, tokenizer = load_model(cfg.init, run.device, run.dtype,
                                  context_length=cfg.context_length)
    if cfg.peft == "lora":
        lora.apply(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
    elif cfg.peft != "none":
        raise ValueError(f"--peft {cfg.peft}: give none or lora")
    model.gradient_checkpointing = cfg.gradient_checkpointing

    # 2. DATA FORMATTING: template, loss mask, mixing weights (3.7 steps 1.1-1.3), packed rows
    examples = data.read_examples(cfg.data, split="train", n=cfg.n_examples, seed=cfg.seed,
                                  bad_rows=cfg.bad_rows)
    heldout = data.read_examples(cfg.data, split="heldout", n=min(1000, 1 + cfg.n_examples // 10),
                                 seed=cfg.seed, bad_rows=cfg.bad_rows)
    length = model.config.context_length
    train = data.PackedExamples(examples, tokenizer, length, cfg.seed, cfg.truncate, tau=cfg.tau)
    val = data.PackedExamples(heldout, tokenizer, length, cfg.seed, cfg.truncate)
    quiz = evaluate.quiz(cfg.data, cfg.eval_examples)              # [] unless the world marks it

    forward = run.prepare(model)
    optimizer = training.pick_optimizer(cfg.optimizer, model, cfg.lr, cfg.weight_decay, run.dtype)
    unigram = evaluate.unigram_response_loss(train, val, tokenizer.vocab_size)
    base_loss = evaluate.response_loss(model, val, cfg.batch_size)
    run.track(model=model, optimizer=optimizer)        # with --resume other weights from here on
    run.say(f"{len(examples)} examples, {parameter_count(model, trainable=True) / 1e6:.3f}M of "
            f"{parameter_count(model) / 1e6:.2f}M parameters train; held-out response loss to "
            f"beat: unigram {unigram:.2f}, the model as it is {base_loss:.2f} nats per token")

    forecast.announce(run, model)

    # 3. TRAINING LOOP
    for step in run.steps(cfg.steps):
        # 3.1 Sample mini-batch
        batches = [train.batch(step * cfg.grad_accum + i, cfg.batch_size, run.replica, run.replicas)
                   .to(run.device) for i in range(cfg.grad_accum)]
        n_targets = sum(batch.n_targets for batch in batches)
        figures = {"loss": 0.0}

        for batch in batches:
            # 3.2 FORWARD PASS: masked per-token loss
            logps = token_logps(forward, batch)                        # (B, T), 0 where m_t = 0
            loss = -logps.sum() / run.mean_over_ranks(n_targets)
            # a Mixture of Experts: keep its routers balanced
            router_loss = model.auxiliary_loss() / cfg.grad_accum
            # 3.3 BACKWARD PASS
            run.backward(loss + router_loss, step)
            figures["loss"] += loss.detach()

        # 3.4 UPDATE
        lr = training.learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        grad_norm = run.update(optimizer, lr, cfg.max_norm)

        # (3.7 step 3.4) PERIODIC EVALUATION
        if run.due(step, cfg.eval_every):
            val_loss = evaluate.response_loss(model, val, cfg.batch_size)
            figures |= {"val_loss": val_loss, "perplexity": math.exp(val_loss)}
            figures |= evaluate.quiz_accuracy(model, tokenizer, quiz)
        run.log(step, tokens=sum(batch.tokens.numel() for batch in batches), grad_norm=grad_norm,
                lr=lr, **figures)
        run.checkpoint(step)

    # 4. MERGE (the adapters alone are kept too), 5. RETURN
    if cfg.peft == "lora":
        if run.rank == 0:
            lora.save_adapter(run.out, model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
        lora.merge(model)
    return run.finish(model, tokenizer, {"val_loss": run.last["val_loss"], "base_loss": base_loss,
                                         "unigram_loss": unigram})


if __name__ == "__main__":
    training.command_line(main, Config, __doc__)
