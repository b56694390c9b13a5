"""
Stage 1: autoregressive pretraining (001 section 1.6): a corpus in, a base model out.

  1. DATA PREPARATION   tokenize, join with <EOS>, cut into windows, shuffle, share among the ranks
  2. INITIALIZE         Xavier/He weights with zero residual projections, optimizer
  3. TRAINING LOOP      3.1 sample  3.2 forward  3.3 loss  3.4 backward  3.5 synchronise
                        3.6 clip  3.7 update  3.8 log and checkpoint  3.9 next step
  4. RETURN theta*

Minimise  L = -(1/n) sum_t log p_theta(x_t | x_<t)  over the n target tokens of the whole step, or
with --objective mlm, span or ul2 the log-probability of what objectives.py hides (section 1.2).

Differs from the document:
  1.1-1.2  deduplication and quality filters are not applied: the corpus is taken as clean.
  1.5      a window holds context_length + 1 tokens and shares its first with the window before, so
           that every token is predicted once; attention stays inside a document (--document_masks).
  2.2      Muon for the inner matrices (muon.py) unless --optimizer adamw.
  3.1      the first --copy_steps steps of a new model sample random tokens said again and again,
           not text, and --token_shift adds each predecessor's embedding: with both, a small model
           soon looks back and copies (names, passages); with neither not within these few tokens.
  3.2-3.3  not a mean of means: summed loss over the number of target tokens of the whole step.
  3.4      gradient checkpointing only with --gradient_checkpointing: small models need none.

    python train_pretrain.py                              # the embedded world, minutes on two cores
    python train_pretrain.py --data book.txt --tokenizer bytes --n_layers 4 --d_model 128
    python train_pretrain.py --objective mlm --next_sentence           # BERT; span: T5; ul2: UL2
    torchrun --nproc_per_node 8 train_pretrain.py ...     # data parallel, one process per GPU
    torchrun --nproc_per_node 8 train_pretrain.py --shard fsdp --tensor_parallel 2 ...  # 4 x 2
"""
import math
from dataclasses import dataclass, fields, replace

import torch.nn.functional as F

import corpus
import data
import evaluate
import forecast
import objectives
import shards
import training
from model import (
    ModelConfig,
    Transformer,
    active_parameter_count,
    extend_vocabulary,
    load_model,
    parameter_count,
    token_logps,
    with_encoder,
)
from tokenizer import Tokenizer


@dataclass
class Config:
    preset: str = ""                  # gpt2-124m: that size and recipe, where no option is given
    init: str = ""                    # model folder to go on from; empty: a new model
    out: str = "out/pretrain"         # model folder to write
    data: str = "world"               # corpora, with commas: world, bearish, file, folder, shards
    alpha: float = 1.0                # of several, each has p = n^alpha / sum n^alpha; 0: all alike
    shares: str = ""                  # ... or these shares, "0.8,0.2": replay of what was learned
    max_bytes: int = 20_000_000       # read at most this much of a corpus; shards: all of them
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    tokenizer: str = "bpe"            # bpe (trained on the corpus) | bytes | a folder with one
    vocab_size: int = 2048            # tokens of a newly trained tokenizer, special ones included
    new_words: int = 0                # with --init: extend its vocabulary by words of the corpus
    objective: str = "causal"         # causal | mlm | span | ul2 (objectives.py)
    architecture: str = ""            # decoder|encoder|prefix|encoder_decoder; "": the usual one
    next_sentence: bool = False       # with mlm: also whether the second half follows the first
    d_model: int = 128                # width of the model
    n_layers: int = 4                 # Transformer blocks
    n_heads: int = 4                  # query heads
    n_kv_heads: int = 0               # key/value heads; 0: as many as n_heads
    context_length: int = 0           # tokens a prediction can look back on; 0: 256, or --init's
    tied: bool = True                 # the output projection is the embedding
    token_shift: bool = True          # a token also sees its neighbour's embedding (model.py)
    n_experts: int = 0                # Mixture of Experts: so many feed-forwards; 0: a dense model
    top_k: int = 2                    # experts per token
    n_shared_experts: int = 0         # experts that every token visits besides
    d_expert: int = 0                 # width of an expert; 0: the FLOPs of the dense model
    n_dense_layers: int = 0           # the first so many blocks stay dense
    router: str = "token_choice"      # token_choice | expert_choice (sees the future)
    expert_groups: int = 0            # two-level routing: experts stand in so many groups
    top_groups: int = 1               # ... of which a token visits so many
    capacity_factor: float = 0.0      # places per expert, over its fair share; 0: for all tokens
    router_noise: bool = False        # noisy top-k: the router learns how much to explore
    balance: str = "loss"             # loss | bias (nudged after every step) | none
    balance_coef: float = 0.01        # weight of the balance loss
    z_coef: float = 0.001             # weight of the router's z-loss
    bias_rate: float = 0.001          # step of the biases
    document_masks: bool = True       # attention stays inside a document
    gradient_checkpointing: bool = False   # recompute activations in the backward pass: less memory
    copy_steps: int = 250             # a new model's first steps copy, at most steps / 6; 0: none
    steps: int = 1800                 # optimizer steps (T_max), copying included
    batch_size: int = 8               # windows per micro-batch and rank (B)
    grad_accum: int = 1               # micro-batches per optimizer step
    optimizer: str = "muon"           # muon (inner matrices; the rest by AdamW) | adamw
    lr: float = 4e-3                  # peak learning rate
    warmup: int = 30                  # steps of linear warmup
    schedule: str = "cosine"          # cosine (to lr / 10) | wsd: constant, then a line to 0
    decay: float = 0.2                # wsd: the line's share of the steps
    anneal_data: str = ""             # wsd: corpora of the line, the best text last; empty: --data
    weight_decay: float = 0.1         # on matrices only
    max_norm: float = 1.0             # gradient clipping
    seed: int = 0                     # of weights and batches
    device: str = "auto"              # auto | cpu | cuda | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16
    compile: bool = False             # torch.compile: 15-25 s once, then faster steps
    shard: str = "none"               # under torchrun: none | fsdp, weights shared among the ranks
    tensor_parallel: int = 1          # under torchrun: so many ranks divide each matrix
    log_every: int = 10               # steps between rows of metrics.jsonl
    eval_every: int = 300             # steps between validations
    eval_windows: int = 64            # validation windows, the same every time
    save_every: int = 500             # steps between checkpoints
    resume: bool = False              # go on from --out if anything is there
    overwrite: bool = False           # throw away what is in --out


# GPT-2's smallest size, trained on 19,000 * 512 * 1024 = 10B tokens. Learning rate, its warmup and
# decay, clipping, 2^19 tokens a step: the recipe of nanoGPT and llm.c.
PRESETS = {"gpt2-124m": {
    "vocab_size": 50_304, "n_layers": 12, "d_model": 768, "n_heads": 12, "context_length": 1024,
    "token_shift": False, "copy_steps": 0, "steps": 19_000, "batch_size": 16, "grad_accum": 32,
    "optimizer": "adamw", "lr": 6e-4, "warmup": 700, "compile": True, "eval_every": 250,
    "eval_windows": 1024, "save_every": 500}}


def copy_steps(cfg: Config) -> int:
    """Steps of copying before text; none for a model from --init, which can look back already."""
    return 0 if cfg.init else min(cfg.copy_steps, cfg.steps // 6)


def with_architecture(cfg: Config) -> Config:
    """The config with its architecture spelled out. Raises ValueError for one that cannot learn
    the objective."""
    known = objectives.ARCHITECTURES_OF
    if cfg.objective not in known:
        raise ValueError(f"--objective {cfg.objective}: give {', '.join(known)}")
    if cfg.architecture not in ("", *known[cfg.objective]):
        raise ValueError(f"--architecture {cfg.architecture} does not go with --objective "
                         f"{cfg.objective}; give {', '.join(known[cfg.objective])}")
    if cfg.next_sentence and (cfg.objective != "mlm" or "," in cfg.data):
        raise ValueError("--next_sentence goes with --objective mlm and one corpus")
    of_shards = [name for name in corpus.names_of(cfg.data) if shards.found(name)]
    for name in ("next_sentence", "new_words"):
        if getattr(cfg, name) and of_shards:
            raise ValueError(f"--{name} reads text, and --data {of_shards[0]} holds shards of "
                             "tokens; give the text that they were made from")
    if cfg.schedule not in ("cosine", "wsd"):
        raise ValueError(f"--schedule {cfg.schedule}: give cosine or wsd")
    if cfg.anneal_data and cfg.schedule != "wsd":
        raise ValueError("--anneal_data is read during the decay of --schedule wsd")
    if cfg.new_words and not cfg.init:
        raise ValueError("--new_words extends the vocabulary of --init; a new model takes "
                         "--vocab_size")
    return replace(cfg, architecture=cfg.architecture or known[cfg.objective][0])


def anneal_from(cfg: Config) -> int:
    """The first step of the learning rate's last line, where --anneal_data takes over."""
    return round((1 - cfg.decay) * cfg.steps) if cfg.schedule == "wsd" else cfg.steps


SIZES = ({field.name for field in fields(ModelConfig)} & {field.name for field in fields(Config)}
         - {"vocab_size", "architecture"})             # what makes a new model; --init has its own


def start_from(model: Transformer, cfg: Config) -> Transformer:
    """A model from --init, under this run's architecture. Raises ValueError for another one, and
    for sizes that were asked for and are not the model's."""
    for name in sorted(SIZES):
        asked, has = getattr(cfg, name), getattr(model.config, name)
        if asked != has and asked != getattr(Config, name):
            raise ValueError(f"--{name} {asked}, but the model in --init {cfg.init} has {has}; "
                             "leave the option out, or train a new model without --init")
    if {model.config.architecture, cfg.architecture} <= {"decoder", "prefix"}:
        model.config.architecture = cfg.architecture               # the same weights
    elif (model.config.architecture, cfg.architecture) == ("decoder", "encoder_decoder"):
        model = with_encoder(model)
    if model.config.architecture != cfg.architecture or \
            cfg.next_sentence and not model.config.n_segments:
        raise ValueError(f"--init {cfg.init} is an {model.config.architecture} with "
                         f"{model.config.n_segments} segments; this run needs another model: "
                         f"an {cfg.architecture}{' with 2 segments' * cfg.next_sentence}")
    return model


def main(cfg: Config) -> dict:
    run = training.start(cfg, "pretrain")
    cfg = with_architecture(cfg)

    # 1. DATA PREPARATION
    model, own_tokenizer = load_model(cfg.init, run.device, run.dtype,
                                      context_length=cfg.context_length or None,
                                      any_architecture=True) if cfg.init else (None, None)
    cfg = replace(cfg, context_length=model.config.context_length if model is not None
                  else cfg.context_length or 256)
    if cfg.resume and (run.out / "tokenizer.json").exists():       # that of the checkpoint
        read = corpus.read(replace(cfg, new_words=0), Tokenizer.load(run.out))
    else:
        read = corpus.read(cfg, own_tokenizer)
    tokenizer, train, [val, *_] = read.tokenizer, read.train, read.vals.values()

    # 2. INITIALIZE: theta_0 (or what --init holds), optimizer
    if model is not None:
        model = start_from(model, cfg)
        if tokenizer != own_tokenizer:
            model = extend_vocabulary(model, own_tokenizer, tokenizer)
    else:
        config = ModelConfig(tokenizer.vocab_size, architecture=cfg.architecture,
                             n_segments=2 * cfg.next_sentence,
                             **{name: getattr(cfg, name) for name in SIZES})
        model = Transformer(config, run.dtype).to(run.device)
    if run.rank == 0:
        tokenizer.save(run.out)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    length, causal = model.config.context_length, cfg.objective == "causal"
    copying = getattr(train, "copying_batch", data.copying_batch)
    forward = run.prepare(model)
    optimizer = training.pick_optimizer(cfg.optimizer, model, cfg.lr, cfg.weight_decay, run.dtype)
    run.track(model=model, optimizer=optimizer)
    unigram, bigram = (sum(parts) for parts in zip(*(
        [share * loss for loss in evaluate.ngram_losses(
            read.trains[name].tokens, read.vals[name].tokens, tokenizer.vocab_size)]
        for name, share in read.shares.items())))
    bytes_per_token = sum(share * read.bytes_per_token[name]
                          for name, share in read.shares.items())
    run.say(f"{parameter_count(model) / 1e6:.2f}M parameters, "
            f"{active_parameter_count(model) / 1e6:.2f}M at work on a token "
            f"({model.config.flops_per_token(length) / 1e6:.1f} MFLOPs in training), "
            f"{sum(len(part.tokens) for part in read.trains.values()) / 1e6:.2f}M training tokens, "
            f"{bytes_per_token:.2f} bytes per token; validation loss to beat: "
            f"unigram {unigram:.2f}" + f", bigram {bigram:.2f} nats" * causal)

    forecast.announce(run, model)

    # 3. TRAINING LOOP
    for step in run.steps(cfg.steps):
        # 3.1 Sample mini-batch
        numbers = [step * cfg.grad_accum + i for i in range(cfg.grad_accum)]
        if step < copy_steps(cfg):
            batches = [copying(len(tokenizer.ranks), 2 * cfg.batch_size,
                               min(64, train.context_length), cfg.seed,
                               n * run.replicas + run.replica) for n in numbers]
        else:
            source = train if step < anneal_from(cfg) else read.anneal
            batches = [source.batch(n, cfg.batch_size, run.replica, run.replicas) for n in numbers]
        if step in (copy_steps(cfg), anneal_from(cfg)):
            run.history.clear()                    # losses of other text are no measure of a spike
        batches = [batch.to(run.device) for batch in batches]
        n_targets = sum(batch.n_targets for batch in batches)
        figures = {"loss": 0.0}

        for batch in batches:
            # 3.2 FORWARD PASS: log softmax(z_t)[x_t] of every token
            logps = token_logps(forward, batch)                        # (B, T)
            if batch.segments is not None:
                logps, next_sentence = logps                           # ..., (B, 2)
            # 3.3 Batch loss
            loss = -logps.sum() / run.mean_over_ranks(n_targets)
            if batch.segments is not None:
                loss = loss + F.cross_entropy(next_sentence, batch.is_next) / cfg.grad_accum
            # a Mixture of Experts: keep its routers balanced
            router_loss = model.auxiliary_loss() / cfg.grad_accum
            # 3.4 BACKWARD PASS, 3.5 GRADIENT SYNCHRONIZATION (DDP's all-reduce)
            run.backward(loss + router_loss, step)
            figures["loss"] += loss.detach()

        # 3.6 GRADIENT PROCESSING (clip), 3.7 PARAMETER UPDATE
        lr = training.learning_rate(step, cfg.steps, cfg.lr, cfg.warmup) \
            if cfg.schedule == "cosine" else training.warmup_stable_decay(
                step, cfg.steps, cfg.lr, cfg.warmup, cfg.decay)
        skipped = run.skipped
        grad_norm = run.update(optimizer, lr, cfg.max_norm)
        load = model.balance_experts(nudge=run.skipped == skipped)
        if load is not None:                               # (sparse blocks, E); even: 1 / E
            figures |= {"busiest_expert": load.max() * load.shape[1],
                        **{f"load/{e}": share for e, share in enumerate(load.mean(0))},
                        "dropped": model.dropped()}

        # 3.8 LOGGING & CHECKPOINTING
        if run.due(step, cfg.eval_every):
            losses = {name: evaluate.validation_loss(model, part, cfg.eval_windows, cfg.batch_size)
                      for name, part in read.vals.items()}
            val_loss = sum(share * losses[name] for name, share in read.shares.items())
            figures |= {"val_loss": val_loss, "perplexity": math.exp(val_loss)}
            bits = {name: loss / read.bytes_per_token[name] / evaluate.LN2
                    for name, loss in losses.items()} if causal else {}
            for measure, found in (("val_loss", losses), ("bits_per_byte", bits)):
                figures |= {f"{measure}/{name}" if len(losses) > 1 else measure: value
                            for name, value in found.items()}
            if cfg.objective == "mlm":
                figures |= evaluate.masked_figures(model, val, cfg.eval_windows, cfg.batch_size)
            elif not causal:
                figures |= evaluate.span_figures(model, val, cfg.eval_windows)
        n_tokens = n_targets if causal else sum(batch.n_tokens for batch in batches)
        run.log(step, tokens=n_tokens, grad_norm=grad_norm, lr=lr, **figures)
        run.checkpoint(step)
        # 3.9 step <- step + 1

    # 4. RETURN theta*
    measured = {name: value for name, value in run.last.items() if name.startswith(
        ("val_loss", "bits_per", "masked_", "guess_", "next_sentence_", "short_", "single_"))}
    return run.finish(model, tokenizer, measured | {"unigram_loss": unigram}
                      | ({"bigram_loss": bigram} if causal else {}))


if __name__ == "__main__":
    training.command_line(main, Config, __doc__, PRESETS)
