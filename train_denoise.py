"""
Stage 1, other objectives: BERT, T5 and UL2 (001 sections 1.2.2 to 1.2.4, 004): text of which
something is hidden, and a model that says what it was.

  1. DATA PREPARATION   as in train_pretrain.py, and objectives.py hides
  2. INITIALIZE         an encoder, prefix model or encoder-decoder, AdamW
  3. TRAINING LOOP      as in train_pretrain.py, but for 3.2 and 3.3
  4. RETURN theta*

    mlm    L = -(1/n) sum_{t in S} log p_theta(x_t | x_\\S), S: 15 % of the tokens        BERT
    span   L = -(1/n) sum_i sum_t log p_theta(s_i^t | s_i^<t, x_corrupted), s_i: spans    T5
    ul2    a mixture of R, S and X denoisers, announced by a mode token                   UL2

n: the target tokens of the whole step. --next_sentence adds the cross-entropy of "does the second
segment follow the first", read at [CLS].

Differs from the document:
  1.2.4  UL2's seven denoisers are those of the paper (Tay et al. 2022), not 001's ranges.

    python train_denoise.py --objective mlm --next_sentence            # BERT
    python train_denoise.py --objective span --init out/pretrain       # T5, from a decoder
    python train_denoise.py --objective ul2                            # UL2
    python train_denoise.py --objective causal --architecture prefix   # prefix language model
"""
from dataclasses import dataclass, replace

import torch.nn.functional as F

import corpus
import evaluate
import objectives
import train_pretrain
from architectures import ARCHITECTURES, Encoder, extend_vocabulary, with_encoder
from heads import WithHead
from moe import balance_routers, router_loss
from plumbing.folders import load_any_model
from plumbing.optimizers import pick_optimizer
from plumbing.options import command_line
from plumbing.run import start
from scoring import denoised_logps


@dataclass
class Config(train_pretrain.Config):
    out: str = "out/denoise"          # model folder to write
    objective: str = "mlm"            # mlm | span | ul2 | causal (objectives.py)
    architecture: str = ""            # encoder|prefix|encoder_decoder|decoder; "": the usual one
    next_sentence: bool = False       # with mlm: also whether the second half follows the first


def with_architecture(cfg: Config) -> Config:
    """The config with its architecture spelled out. Raises ValueError for one that cannot learn
    the objective."""
    known = objectives.ARCHITECTURES_OF
    if cfg.architecture not in ("", *known[cfg.objective]):
        raise ValueError(f"--architecture {cfg.architecture} does not go with --objective "
                         f"{cfg.objective}; give {', '.join(known[cfg.objective])}")
    if cfg.next_sentence and (cfg.objective != "mlm" or "," in cfg.data):
        raise ValueError("--next_sentence goes with --objective mlm and one corpus")
    if cfg.next_sentence and corpus.shards.found(cfg.data):
        raise ValueError(f"--next_sentence reads text, and --data {cfg.data} holds shards of "
                         "tokens; give the text that they were made from")
    return replace(cfg, architecture=cfg.architecture or known[cfg.objective][0])


def new_model(cfg: Config, sizes, dtype):
    """theta_0 of the architecture; with --next_sentence with its head."""
    if cfg.architecture != "encoder":
        return ARCHITECTURES[cfg.architecture](sizes, dtype)
    if not cfg.next_sentence:
        return Encoder(sizes, dtype)
    encoder = Encoder(sizes, dtype, n_segments=2)
    return WithHead(encoder, 2, zero=True, keep_lm_head=True)          # "random" and "next"


def load_init(cfg: Config, run):
    """The model of --init under this run's architecture and its tokenizer, or (None, None).

    A decoder's weights are those of a prefix model, and begin both stacks of an encoder-decoder.
    Raises ValueError for any other change of architecture.
    """
    if not cfg.init:
        return None, None
    model, tokenizer = load_any_model(cfg.init, run.device, run.dtype, cfg.context_length)
    train_pretrain.check_sizes(cfg, model.config)
    has_head = isinstance(model, WithHead)
    trunk = model.trunk if has_head else model
    found = trunk.architecture
    if has_head and found != "encoder":
        raise ValueError(f"--init {cfg.init} is a classifier; give the model that it was made of")
    if {found, cfg.architecture} <= {"decoder", "prefix"} and found != cfg.architecture:
        weights = model.state_dict()
        model = ARCHITECTURES[cfg.architecture](model.config, run.dtype).to(run.device)
        model.load_state_dict(weights)
    elif (found, cfg.architecture) == ("decoder", "encoder_decoder"):
        model = with_encoder(model)
    elif found != cfg.architecture or cfg.next_sentence and not has_head:
        needed = cfg.architecture + (" with 2 segments" if cfg.next_sentence else "")
        raise ValueError(f"--init {cfg.init} is an {found} with {getattr(trunk, 'n_segments', 0)} "
                         f"segments; this run needs another model: an {needed}")
    return model, tokenizer


def heldout_figures(model, heldout: dict, shares: dict[str, float], bytes_per_token: dict,
                    cfg: Config) -> dict:
    """Loss in nats per target token of each corpus and of all together; what is rebuilt of the
    first corpus' hidden text, or for causal, where nothing is hidden, bits per byte."""
    trunk = model.trunk if isinstance(model, WithHead) else model
    losses = {}
    for name, source in heldout.items():
        losses[name] = evaluate.validation_loss(trunk, source, cfg.eval_windows, cfg.batch_size,
                                                denoised_logps)
    if cfg.objective == "causal":
        return evaluate.corpus_figures(losses, shares, bytes_per_token)
    figures = evaluate.corpus_figures(losses, shares)
    first = next(iter(heldout.values()))
    if cfg.objective == "mlm":
        return figures | evaluate.masked_figures(model, first, cfg.eval_windows, cfg.batch_size)
    return figures | evaluate.span_figures(model, first, cfg.eval_windows)


def main(cfg: Config) -> dict:
    run = start(cfg, __file__)
    train_pretrain.check(cfg)
    cfg = with_architecture(cfg)
    model, init_tokenizer = load_init(cfg, run)

    # 1. DATA PREPARATION
    texts = corpus.read_texts(cfg)
    # 1.1 Apply deduplication
    texts, n_duplicates = corpus.drop_duplicates(texts)
    # 1.2 Apply quality filtering
    texts, n_empty = corpus.drop_empty(texts)
    run.say(f"dropped {n_duplicates:,} duplicates and {n_empty:,} empty documents")
    # 1.3 Tokenize all documents
    length = model.config.context_length if model else cfg.context_length or 256
    window = objectives.window_length(cfg.objective, cfg.architecture, length)
    tokenizer = corpus.pick_tokenizer(cfg, texts, init_tokenizer, run.out)
    tokenizer = objectives.with_special_tokens(tokenizer, cfg.objective, window)
    run.save_tokenizer(tokenizer)
    ids = corpus.tokenize(texts, tokenizer)
    # 1.4 Concatenate all token sequences with <EOS> separators
    streams = corpus.concatenate(ids, texts, tokenizer) | corpus.open_shards(cfg, tokenizer)
    # 1.5 Chunk into segments of such a length that inputs and targets fit the context
    windows = corpus.cut(streams, cfg, window, tokenizer.endoftext)

    # 1.6 Shuffle segments; distribute them across the ranks; hide something in each
    def hide(source):
        return objectives.Denoised(source, tokenizer, cfg.objective, cfg.architecture,
                                   cfg.next_sentence)

    train = corpus.TrainingData(windows, cfg, run, n_words=len(tokenizer.ranks), wrap=hide)
    heldout = {name: hide(windows[name, "heldout"]) for name in corpus.all_names(cfg)}

    # 2. INITIALIZE
    # 2.1 theta <- theta_0
    if model is None:
        sizes = replace(cfg.model, vocab_size=tokenizer.vocab_size, context_length=length)
        run.refuse_too_large(sizes)
        model = new_model(cfg, sizes, run.dtype).to(run.device)
    elif tokenizer != init_tokenizer:
        model = extend_vocabulary(model, init_tokenizer, tokenizer)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    method = "values_and_logps" if cfg.next_sentence else "logps"
    # batches that copy have no next sentences, so that the head gets no gradient from them
    forward = run.prepare(model, method, unused_parameters=cfg.next_sentence)
    # 2.2 optimizer_state <- AdamW(0.9, 0.95, 1e-8, 0.1)
    optimizer = pick_optimizer(cfg.optimizer, model, cfg.lr, cfg.weight_decay, run.dtype,
                               betas=(0.9, 0.95))
    # 2.3 step <- 0, or that of the checkpoint with --resume
    run.track(model=model, optimizer=optimizer)
    baselines = evaluate.ngram_baselines(windows, train.shares, tokenizer.vocab_size)
    bytes_per_token = corpus.bytes_per_token(streams)
    run.say(train_pretrain.describe(model, streams, train.shares, baselines))
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
            # 3.2 FORWARD PASS: log p of the hidden tokens, and with --next_sentence (B, 2) logits
            logps = denoised_logps(forward, batch)                         # (B, T)
            if cfg.next_sentence:
                values, logps = logps                                      # (B, T, 2), (B, T)
            # 3.3 Aggregate batch loss
            batch_loss = -logps.sum() / n_targets
            if batch.is_next is not None:
                next_loss = F.cross_entropy(values[:, 0], batch.is_next)       # at [CLS]
                batch_loss = batch_loss + next_loss / cfg.grad_accum
            # 3.4 BACKWARD PASS
            run.backward(batch_loss + router_loss(model) / cfg.grad_accum)
            loss += batch_loss.detach()

        # 3.6 GRADIENT PROCESSING: clip to max_norm
        grad_norm = run.clip(model, cfg.max_norm)
        # 3.7 PARAMETER UPDATE
        lr = train_pretrain.rate(step, cfg)
        updated = run.step(optimizer, lr, loss, grad_norm)
        optimizer.zero_grad()
        load_figures = balance_routers(model, nudge=updated)   # {} for a dense model

        # 3.8 LOGGING & CHECKPOINTING
        figures = {"loss": loss} | load_figures
        if run.due(step, cfg.eval_every):
            figures |= heldout_figures(model, heldout, train.shares, bytes_per_token, cfg)
        tokens = sum(batch.n_tokens for batch in batches)
        run.log(step, tokens=tokens, grad_norm=grad_norm, lr=lr, **figures)
        if run.due(step, cfg.save_every):
            run.save_checkpoint(step + 1)

    # 4. RETURN theta*
    results = run.last_with("val_loss", "bits_per", "masked_", "guess_", "next_sentence_", "short_",
                            "single_")
    results["unigram_loss"] = baselines["unigram_loss"]
    if cfg.objective == "causal":              # a hidden token is guessed from both sides
        results["bigram_loss"] = baselines["bigram_loss"]
    return run.finish(model, tokenizer, results)


if __name__ == "__main__":
    command_line(main, Config, __doc__, train_pretrain.PRESETS)
