"""
Stage 1: autoregressive pretraining (001 section 1.6): a corpus in, a base model out.

  1. DATA PREPARATION   1.1 deduplicate  1.2 filter  1.3 tokenize  1.4 join with <EOS>
                        1.5 cut into windows  1.6 shuffle, share among the ranks
  2. INITIALIZE         2.1 weights  2.2 AdamW  2.3 step <- 0
  3. TRAINING LOOP      3.1 sample  3.2 forward  3.3 loss  3.4 backward  3.5 synchronise
                        3.6 clip  3.7 update  3.8 log and checkpoint  3.9 next step
  4. RETURN theta*

Minimise  L = -(1/n) sum_t log p_theta(x_t | x_<t)  over the n target tokens of the whole step
(and, of a Mixture of Experts, the routers' balance loss).

Differs from the document:
  1.1      only documents that are the same to the letter are dropped, by hash.
  1.2      only documents without a letter or digit are dropped.
  1.5      a window holds context_length + 1 tokens and shares its first with the window before, so
           that every token is predicted once; attention stays inside a document (--document_masks).
  2.1      N(0, 1 / fan-in); zero for the residual output projections.
  2.2      weight decay on matrices only.
  3.2-3.3  not a mean of means: summed loss over the number of target tokens of the whole step.
  3.4      gradient checkpointing only with --gradient_checkpointing: small models need none.
  3.7      an update whose loss or gradient is NaN or leaps is skipped (plumbing/guard.py).
  3.8      perplexity of the validation text only.

    python train_pretrain.py                              # the embedded world, minutes on two cores
    python train_pretrain.py --token_shift true --copy_steps 250  # AdamW then learns to look back
    python train_pretrain.py --data book.txt --tokenizer bytes --n_layers 4 --d_model 128
    torchrun --nproc_per_node 8 train_pretrain.py ...     # data parallel, one process per GPU
    torchrun --nproc_per_node 8 train_pretrain.py --shard fsdp --tensor_parallel 2 ...  # 4 x 2
"""
import sys
from dataclasses import dataclass, fields, replace

import corpus
import evaluate
import shards
from architectures import extend_vocabulary
from model import (
    ModelConfig,
    Transformer,
    active_parameter_count,
    parameter_count,
)
from moe import balance_routers, router_loss
from plumbing.folders import load_model
from plumbing.optimizers import learning_rate, pick_optimizer, warmup_stable_decay
from plumbing.options import Options, command_line, nested
from plumbing.run import start
from scoring import token_logps


@dataclass
class Config(Options):
    preset: str = ""                  # gpt2-124m: that size and recipe, where no option is given
    init: str = ""                    # model folder to go on from, with its sizes and tokenizer
    out: str = "out/pretrain"         # model folder to write
    data: str = "world"               # corpora, with commas: world, bearish, file, folder, shards
    alpha: float = 1.0                # each of several has p = n^alpha / sum n^alpha, in [0, 1]
    shares: str = ""                  # ... or these shares, "0.8,0.2": replay of what was learned
    max_bytes: int = 20_000_000       # read at most this much of a corpus (of shards all), >= 1
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    tokenizer: str = "bpe"            # bpe (trained on the corpus) | bytes | a folder with one
    new_words: int = 0                # with --init: extend its vocabulary by words of the corpus
    context_length: int = 0           # tokens a prediction can look back on; 0: 256, or --init's
    document_masks: bool = True       # attention stays inside a document
    model: ModelConfig = nested(ModelConfig, ("context_length",), vocab_size=2048)   # a new model
    gradient_checkpointing: bool = False   # recompute activations in the backward pass: less memory
    copy_steps: int = 0               # first (<= steps / 6) copy: 250 and token_shift gain 0.4 nats
    steps: int = 1800                 # optimizer steps (T_max), copying included, >= 1
    batch_size: int = 8               # windows per micro-batch and rank (B), >= 1
    grad_accum: int = 1               # micro-batches per optimizer step, >= 1
    optimizer: str = "adamw"          # adamw | adam | muon: gains .6 nats in the lifecycle
    lr: float = 4e-3                  # peak learning rate (document: by schedule)
    warmup: int = 30                  # steps of linear warmup
    schedule: str = "cosine"          # cosine (to lr / 10) | wsd: constant, then a line to 0
    decay: float = 0.2                # wsd: the line's share of the steps, in [0, 1]
    anneal_data: str = ""             # wsd: corpora of the line, the best text last; empty: --data
    weight_decay: float = 0.1         # on matrices only
    max_norm: float = 1.0             # gradient clipping, > 0
    shard: str = "none"               # under torchrun: none | fsdp, weights shared among the ranks
    tensor_parallel: int = 1          # under torchrun: so many ranks divide each matrix, >= 1
    eval_every: int = 300             # steps between validations
    eval_windows: int = 64            # validation windows, the same every time, >= 1


# GPT-2's smallest size, trained on 19,000 * 512 * 1024 = 10B tokens. Learning rate, its warmup and
# decay, clipping, 2^19 tokens a step: the recipe of nanoGPT and llm.c.
PRESETS = {"gpt2-124m": {
    "vocab_size": 50_304, "n_layers": 12, "d_model": 768, "n_heads": 12, "context_length": 1024,
    "steps": 19_000, "batch_size": 16, "grad_accum": 32, "lr": 6e-4, "warmup": 700,
    "compile": True, "eval_every": 250, "eval_windows": 1024, "save_every": 500}}


def check(cfg: Config) -> None:
    """Raises ValueError for options that do not go together."""
    if cfg.anneal_data and cfg.schedule != "wsd":
        raise ValueError("--anneal_data is read during the decay of --schedule wsd")
    if cfg.new_words and not cfg.init:
        raise ValueError("--new_words extends the vocabulary of --init; a new model takes "
                         "--vocab_size")
    for name in corpus.names_of(cfg.data):
        if cfg.new_words and shards.found(name):
            raise ValueError(f"--new_words reads text, and --data {name} holds shards of "
                             "tokens; give the text that they were made from")


def check_sizes(cfg: Config, found: ModelConfig) -> None:
    """Raises ValueError for a size that was asked for and is not that of the model in --init."""
    defaults = Config().model
    for field in fields(ModelConfig):
        asked = getattr(cfg.model, field.name)
        has = getattr(found, field.name)
        chosen = asked != getattr(defaults, field.name)
        if chosen and asked != has and field.name not in ("vocab_size", "context_length"):
            raise ValueError(f"--{field.name} {asked}, but the model in --init {cfg.init} has "
                             f"{has}; leave the option out, or train a new model without --init")


def load_init(cfg: Config, run) -> tuple[Transformer | None, object]:
    """The model of --init and its tokenizer, or (None, None)."""
    if not cfg.init:
        return None, None
    model, tokenizer = load_model(cfg.init, run.device, run.dtype, cfg.context_length)
    check_sizes(cfg, model.config)
    return model, tokenizer


def describe(model, streams: dict, shares: dict[str, float], baselines: dict) -> str:
    """A sentence about the run: sizes, and the losses that counting alone reaches."""
    flops = model.flops_per_token(model.config.context_length)
    n_tokens = sum(len(stream.tokens) for (_, split), stream in streams.items() if split == "train")
    bytes_of = corpus.bytes_per_token(streams)
    mean_bytes = sum(share * bytes_of[name] for name, share in shares.items())
    return (f"{parameter_count(model) / 1e6:.2f}M parameters, "
            f"{active_parameter_count(model) / 1e6:.2f}M at work on a token "
            f"({flops / 1e6:.1f} MFLOPs in training), {n_tokens / 1e6:.2f}M training tokens, "
            f"{mean_bytes:.2f} bytes per token; validation loss to beat: unigram "
            f"{baselines['unigram_loss']:.2f}, bigram {baselines['bigram_loss']:.2f} nats")


def rate(step: int, cfg: Config) -> float:
    if cfg.schedule == "wsd":
        return warmup_stable_decay(step, cfg.steps, cfg.lr, cfg.warmup, cfg.decay)
    return learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)


def heldout_figures(model, windows: dict, shares: dict[str, float], bytes_per_token: dict,
                    cfg: Config) -> dict:
    """Loss in nats per token, perplexity, and bits per byte, of each corpus and of all together."""
    losses = {}
    for name in bytes_per_token:
        losses[name] = evaluate.validation_loss(model, windows[name, "heldout"], cfg.eval_windows,
                                                cfg.batch_size)
    return evaluate.corpus_figures(losses, shares, bytes_per_token)


def main(cfg: Config) -> dict:
    run = start(cfg, __file__)
    check(cfg)
    model, init_tokenizer = load_init(cfg, run)

    # 1. DATA PREPARATION
    texts = corpus.read_texts(cfg)
    # 1.1 Apply deduplication
    texts, n_duplicates = corpus.drop_duplicates(texts)
    # 1.2 Apply quality filtering
    texts, n_empty = corpus.drop_empty(texts)
    run.say(f"dropped {n_duplicates:,} duplicates and {n_empty:,} empty documents")
    # 1.3 Tokenize all documents
    tokenizer = corpus.pick_tokenizer(cfg, texts, init_tokenizer, run.out)
    run.save_tokenizer(tokenizer)
    ids = corpus.tokenize(texts, tokenizer)
    # 1.4 Concatenate all token sequences with <EOS> separators
    streams = corpus.concatenate(ids, texts, tokenizer) | corpus.open_shards(cfg, tokenizer)
    # 1.5 Chunk into segments of length ctx_len
    length = model.config.context_length if model else cfg.context_length or 256
    windows = corpus.cut(streams, cfg, length, tokenizer.endoftext)
    # 1.6 Shuffle segments; distribute them across the ranks
    train = corpus.TrainingData(windows, cfg, run, n_words=len(tokenizer.ranks))

    # 2. INITIALIZE
    # 2.1 theta <- theta_0
    if model is None:
        sizes = replace(cfg.model, vocab_size=tokenizer.vocab_size, context_length=length)
        run.refuse_too_large(sizes)
        model = Transformer(sizes, run.dtype).to(run.device)
    elif tokenizer != init_tokenizer:
        model = extend_vocabulary(model, init_tokenizer, tokenizer)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    forward = run.prepare(model, "logps")
    # 2.2 optimizer_state <- AdamW(0.9, 0.95, 1e-8, 0.1)
    optimizer = pick_optimizer(cfg.optimizer, model, cfg.lr, cfg.weight_decay, run.dtype,
                               betas=(0.9, 0.95))
    # 2.3 step <- 0; with --resume the checkpoint's weights, optimizer_state and step
    run.track(model=model, optimizer=optimizer)
    baselines = evaluate.ngram_baselines(windows, train.shares, tokenizer.vocab_size)
    bytes_per_token = corpus.bytes_per_token(streams)
    run.say(describe(model, streams, train.shares, baselines))
    run.forecast(model)

    # 3. TRAINING LOOP
    for step in run.steps(cfg.steps):          # 3.9 step <- step + 1
        # 3.1 Sample mini-batch
        batches = train.batch(step)
        # the mean over ranks and not the sum, because DDP will divide the gradients by their number
        n_targets = run.mean_over_ranks(sum(batch.n_targets for batch in batches))
        if step in train.changes:
            run.guard.forget()                 # losses of other text are no measure of a spike
        loss = 0.0                             # of the whole step
        for batch in batches:
            # 3.5 GRADIENT SYNCHRONIZATION: with the last micro-batch's backward pass (FSDP: each)
            forward.require_backward_grad_sync = batch is batches[-1]
            # 3.2 FORWARD PASS: log softmax(z_t)[x_t] of every token
            logps = token_logps(forward, batch)                            # (B, T)
            # 3.3 Aggregate batch loss
            batch_loss = -logps.sum() / n_targets
            # 3.4 BACKWARD PASS
            run.backward(batch_loss + router_loss(model) / cfg.grad_accum)
            loss += batch_loss.detach()

        # 3.6 GRADIENT PROCESSING: clip to max_norm
        grad_norm = run.clip(model, cfg.max_norm)
        # 3.7 PARAMETER UPDATE
        lr = rate(step, cfg)
        updated = run.step(optimizer, lr, loss, grad_norm)     # AdamW_step; none that would harm
        optimizer.zero_grad()
        load_figures = balance_routers(model, nudge=updated)   # {} for a dense model

        # 3.8 LOGGING & CHECKPOINTING
        figures = {"loss": loss} | load_figures
        if run.due(step, cfg.eval_every):
            figures |= heldout_figures(model, windows, train.shares, bytes_per_token, cfg)
        tokens = sum(batch.n_targets for batch in batches)
        run.log(step, tokens=tokens, grad_norm=grad_norm, lr=lr, **figures)
        if run.due(step, cfg.save_every):
            run.save_checkpoint(step + 1)

    # 4. RETURN theta*
    results = run.last_with("val_loss", "bits_per") | baselines
    return run.finish(model, tokenizer, results)


def refuse_moved_options(arguments: list[str]) -> None:
    """BERT, T5 and UL2 have a script of their own: answer their options with its command."""
    for argument in arguments:
        if argument.split("=")[0] in ("--objective", "--next_sentence", "--architecture"):
            sys.exit(f"train_pretrain.py: {argument} is an option of train_denoise.py:\n"
                     f"    python train_denoise.py {' '.join(arguments)}")


if __name__ == "__main__":
    refuse_moved_options(sys.argv[1:])
    command_line(main, Config, __doc__, PRESETS)
