"""sample.py: cached decoding against the full forward pass, filters and frequencies by hand."""
import io
import json
import math
import sys

import pytest
import torch
from tiny import folder_of, tiny_model

import lora
import sample
from architectures import ARCHITECTURES, SourceCache
from data import left_pad, response_batch
from heads import WithHead
from model import KVCache, ModelConfig, Transformer
from plumbing.folders import load_any_model, save_model
from sample import KEEP, filter_logits, generate, next_token, print_stream, respond, stream
from scoring import token_logps
from tokenizer import Tokenizer
from world.tasks import TRAINED_FAMILIES
from world.text import text_of
from world.world import World

torch.set_num_threads(1)
INF = math.inf
TOKENIZER = Tokenizer.bytes()


def tiny(seed=0, dtype=torch.float32, architecture="decoder", **changes) -> Transformer:
    """A small model that has opinions: no weight is still at its starting value."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "context_length": 32, "d_model": 32, "n_layers": 2, "n_heads": 4,
             "n_kv_heads": 2, "token_shift": True}
    model = ARCHITECTURES[architecture](ModelConfig(**sizes | changes), dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def some_prompts(*lengths, seed=1, vocab_size=40):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- the cache

@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward_at_every_step():
    model, rows = tiny(), some_prompts(3, 9, 1, 6)
    tokens, starts = left_pad(rows, pad=0)
    cache = KVCache(model.config, starts, 20, torch.float32)
    for _ in range(11):
        logits = model(tokens, cache=cache)
        assert logits.shape == (4, 1, 40)
        for row, cached in zip(rows, logits[:, 0]):
            full = model(torch.tensor([row]))[0, -1]
            torch.testing.assert_close(cached, full, atol=1e-5, rtol=1e-5)
        tokens = logits.argmax(-1)
        rows = [row + new for row, new in zip(rows, tokens.tolist())]
    assert len({tuple(row[-8:]) for row in rows}) == 4                 # the rows go different ways


@pytest.mark.parametrize("sizes", [
    {}, {"tied": False}, {"n_experts": 4, "n_shared_experts": 1, "router_noise": True},
    {"n_experts": 4, "expert_groups": 2, "balance": "bias"}, {"architecture": "encoder_decoder"}])
@torch.no_grad()
def test_weights_cast_once_for_a_generation_give_what_casting_them_at_each_token_gives(sizes):
    model = tiny(dtype=torch.bfloat16, **sizes).eval()
    before = torch.get_rng_state()
    cast = sample.cast_once(model, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before) and not cast.training
    assert sample.cast_once(model, torch.float32) is model
    assert sample.cast_once(cast, torch.bfloat16) is cast
    shared = {name for name, w in cast.named_parameters() if w.dtype == torch.float32}
    assert shared == {name for name, w in model.named_parameters()
                      if w.dim() == 1 or "router" in name}
    for name, w in cast.named_parameters():                            # norms are not even copied
        assert (w.data_ptr() == model.get_parameter(name).data_ptr()) == (name in shared)
    tokens, starts = left_pad(some_prompts(3, 9, 1, 6), pad=0)
    source, Cache = {}, KVCache
    if "architecture" in sizes:
        source = {"source": tokens, "source_lengths": torch.full((4,), 9)}
        Cache = SourceCache
    caches = [Cache(model.config, starts, 12, torch.bfloat16) for _ in range(2)]
    for _ in range(3):
        expected, found = (m(tokens, cache=cache, **source)
                           for m, cache in zip((model, cast), caches))
        assert torch.equal(found, expected)
        tokens, source = expected.argmax(-1), {}


@torch.no_grad()
def test_adapters_and_shards_are_cast_at_each_token_as_ever(monkeypatch):
    model, prompts = tiny(dtype=torch.bfloat16), some_prompts(3, 5)
    monkeypatch.setattr(sample, "SMALL", 0)
    expected = generate(model, prompts, 6)
    lora.attach(model, lora.Options("lora", 2, 4.0))         # B is 0: adds nothing
    assert sample.cast_once(model, torch.bfloat16) is model
    assert generate(model, prompts, 6) == expected
    model = tiny(dtype=torch.bfloat16)
    monkeypatch.setattr(sample, "is_sharded", lambda t: True)
    assert sample.cast_once(model, torch.bfloat16) is model


def test_cpus_decode_large_models_in_the_models_dtype_and_small_ones_in_float32(monkeypatch):
    model, seen = tiny(dtype=torch.bfloat16), []
    run_blocks = Transformer.run_blocks

    def watched(self, blocks, h, *others):
        seen.append((self.embedding.weight.dtype, h.dtype))
        return run_blocks(self, blocks, h, *others)
    monkeypatch.setattr(Transformer, "run_blocks", watched)
    generate(model, some_prompts(3, 5), 4)
    assert set(seen) == {(torch.float32, torch.float32)}
    seen.clear()
    monkeypatch.setattr(sample, "SMALL", 0)
    outputs = generate(model, some_prompts(3, 5), 4)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    for prompt, output in zip(some_prompts(3, 5), outputs):            # up to near ties
        logits = model(torch.tensor([prompt + output]))[0, len(prompt) - 1:-1]
        chosen = logits.gather(1, torch.tensor(output)[:, None]).squeeze(1)
        assert (logits.max(-1).values - chosen < 0.1 * logits.std()).all()


@torch.no_grad()
def test_a_prompt_read_in_pieces_gives_the_same_cache():
    model, rows = tiny(), some_prompts(12, 7)
    tokens, starts = left_pad(rows, pad=0)
    whole, pieces = (KVCache(model.config, starts, 12, torch.float32) for _ in range(2))
    expected = model(tokens, cache=whole)
    for piece in tokens.split([5, 1, 6], dim=1):
        logits = model(piece, cache=pieces)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for row, start in enumerate(starts):                               # padding holds anything
        torch.testing.assert_close(pieces.keys_values[:, :, row, start:],
                                   whole.keys_values[:, :, row, start:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_count_from_the_first_real_token():
    model, turned = tiny(), []
    model.blocks[0].register_forward_pre_hook(lambda block, args: turned.append(args[1]))
    cache = KVCache(model.config, torch.tensor([0, 3]), 6, torch.float32)
    model(torch.ones(2, 5, dtype=torch.long), cache=cache)
    model(torch.ones(2, 1, dtype=torch.long), cache=cache)
    cos = torch.cat(turned, dim=1)                                     # (B, T, C/2)
    assert torch.equal(cos[0], model.cos[:6]) and torch.equal(cos[1, 3:], model.cos[:3])


@torch.no_grad()
def test_left_padding_changes_nothing_whatever_it_holds():
    model, [prompt] = tiny(), some_prompts(6)
    expected = model(torch.tensor([prompt]))[0, -1]
    for padding in (0, 1, 9):
        answers = []
        for pad in (0, 17):
            tokens = torch.tensor([[pad] * padding + prompt])
            cache = KVCache(model.config, torch.tensor([padding]), tokens.shape[1], torch.float32)
            answers.append(model(tokens, cache=cache)[0, -1])
        torch.testing.assert_close(answers[0], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(answers[0], answers[1])


def test_a_dropped_row_leaves_the_others_as_they_were():
    model, rows = tiny(), some_prompts(4, 9, 6)
    tokens, starts = left_pad(rows, pad=0)
    cache = KVCache(model.config, starts, 10, torch.float32)
    with torch.no_grad():
        model(tokens, cache=cache)
        cache.keep(torch.tensor([2, 0]))
        logits = model(torch.tensor([[5], [7]]), cache=cache)[:, 0]
        for row, found in zip((rows[2] + [5], rows[0] + [7]), logits):
            torch.testing.assert_close(found, model(torch.tensor([row]))[0, -1], atol=1e-5,
                                       rtol=1e-5)


# ---------------------------------------------------------------------- batches

PROMPTS = some_prompts(*[1 + 5 * i % 11 for i in range(14)], seed=3)
STOP = (7, 21, 30)


def test_greedy_generation_is_the_argmax_of_the_full_forward_repeated():
    model = tiny()
    for prompt, output in zip(PROMPTS, generate(model, PROMPTS, 10)):
        row = list(prompt)
        for token in output:
            logits = model(torch.tensor([row]))[0, -1]
            assert token == logits.argmax()
            row.append(token)
        assert len(output) == 10


def test_a_row_answers_the_same_alone_and_in_a_batch():
    model = tiny()
    together = generate(model, PROMPTS, 12, STOP)
    assert together == [generate(model, [prompt], 12, STOP)[0] for prompt in PROMPTS]
    assert len({len(output) for output in together}) > 3               # they stop at various times
    assert len({tuple(output) for output in together}) > 8


@pytest.mark.parametrize("batch_size", [1, 3, 14])
def test_outputs_come_in_the_order_of_the_prompts_for_every_batch_size(batch_size):
    model = tiny()
    assert generate(model, PROMPTS, 6, STOP, batch_size=batch_size) == generate(model, PROMPTS, 6,
                                                                                STOP)


def test_the_stop_token_is_the_last_and_rows_stop_independently():
    model = tiny()
    endless = generate(model, PROMPTS, 12)
    stopped = generate(model, PROMPTS, 12, STOP)
    expected = []
    for output in endless:                                             # cut by hand
        ends = [i for i, token in enumerate(output) if token in STOP]
        expected.append(output[:ends[0] + 1] if ends else output)
    assert stopped == expected
    assert any(output[-1] in STOP for output in stopped)
    assert any(len(output) == 12 and output[-1] not in STOP for output in stopped)


def test_finished_rows_are_carried_along_until_a_quarter_has_finished(monkeypatch):
    model, sizes = tiny(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, **options: (
        sizes.append(len(tokens)), forward(tokens, **options))[1])
    outputs = generate(model, PROMPTS, 12, STOP)
    expected = [len(PROMPTS)]
    for step in range(1, len(sizes)):
        going = sum(len(output) > step for output in outputs)
        expected.append(going if going <= KEEP * expected[-1] else expected[-1])
    assert sizes == expected and sizes[-1] < len(PROMPTS)
    assert len(sizes) == max(map(len, outputs))


def test_streaming_yields_each_token_once_with_its_row():
    model, outputs = tiny(), [[] for _ in PROMPTS]
    for pairs in stream(model, PROMPTS, 12, STOP):
        assert len({row for row, _ in pairs}) == len(pairs)
        for row, token in pairs:
            outputs[row].append(token)
    assert outputs == generate(model, PROMPTS, 12, STOP)


def test_generation_leaves_the_mode_and_the_gradients_as_they_were():
    for training in (True, False):
        model = tiny().train(training)
        generate(model, PROMPTS[:2], 3)
        assert model.training == training and torch.is_grad_enabled()
        assert all(weight.grad is None for weight in model.parameters())


# ---------------------------------------------------------------------- filters, by hand

def logits_of(*probs):
    return torch.tensor([probs]).log()


def kept(logits):
    return [[i for i, value in enumerate(row) if value > -INF] for row in logits.tolist()]


@pytest.mark.parametrize("top_p, survivors", [
    (0.0, [1]), (0.01, [1]), (0.5, [1]), (0.6, [1, 2]), (0.79, [1, 2]), (0.81, [0, 1, 2]),
    (1.0, [0, 1, 2])])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, survivors):
    assert kept(filter_logits(logits_of(0.2, 0.5, 0.3), top_p=top_p)) == [survivors]


@pytest.mark.parametrize("top_k, survivors", [
    (0, [0, 1, 2, 3]), (1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]),
    (9, [0, 1, 2, 3])])
def test_top_k_keeps_the_k_likeliest(top_k, survivors):
    assert kept(filter_logits(logits_of(0.3, 0.1, 0.4, 0.2), top_k=top_k)) == [survivors]


def test_what_is_kept_keeps_its_logit():
    logits = logits_of(0.3, 0.1, 0.4, 0.2)
    assert filter_logits(logits, 3, 0.8)[0, [0, 2, 3]].tolist() == logits[0, [0, 2, 3]].tolist()


def test_top_p_counts_within_what_top_k_left():
    """Of .4 .3 .2 .1 top-k 2 leaves .57 .43: then p = .5 is reached by the first alone."""
    logits = logits_of(0.3, 0.1, 0.4, 0.2)
    assert kept(filter_logits(logits, top_k=2, top_p=0.5)) == [[2]]
    assert kept(filter_logits(logits, top_p=0.5)) == [[0, 2]]


def test_each_row_is_filtered_by_itself():
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.45, 0.45]]).log()
    assert kept(filter_logits(logits, top_p=0.55)) == [[0], [1, 2]]
    assert kept(filter_logits(logits, top_k=1)) == [[0], [1, 2]]       # a tie keeps both


def test_the_logits_given_are_not_changed():
    logits = logits_of(0.2, 0.5, 0.3)
    copy = logits.clone()
    filter_logits(logits, 1, 0.1)
    assert torch.equal(logits, copy)


# ---------------------------------------------------------------------- drawing

def chi_square(counts, probs):
    n = sum(counts)
    return sum((count - n * p) ** 2 / (n * p) for count, p in zip(counts, probs) if p)


@pytest.mark.parametrize("options, probs", [
    ((1.0, 0, 1.0), [0.1, 0.4, 0.2, 0.3]),
    ((0.5, 0, 1.0), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),                # p^(1/T) = p^2, normalised
    ((1.0, 2, 1.0), [0, 4 / 7, 0, 3 / 7]),
    ((1.0, 0, 0.8), [0, 4 / 9, 2 / 9, 3 / 9])])
def test_drawn_frequencies_are_the_distribution(options, probs):
    """Chi-square with 3 degrees of freedom exceeds 16.3 once in a thousand."""
    logits = logits_of(0.1, 0.4, 0.2, 0.3).expand(20_000, -1)
    counts = next_token(logits, *options, seeded()).bincount(minlength=4).tolist()
    assert chi_square(counts, probs) < 16.3
    assert all(count == 0 for count, p in zip(counts, probs) if p == 0)


def test_generated_first_tokens_follow_the_models_softmax():
    """7 degrees of freedom: 24.3 once in a thousand."""
    model, prompt = tiny(vocab_size=8), [1, 5, 2]
    probs = (model(torch.tensor([prompt]))[0, -1] / 0.8).softmax(-1).tolist()
    outputs = generate(model, [prompt] * 4000, 1, temperature=0.8, generator=seeded(),
                       batch_size=4000)
    counts = torch.tensor(outputs).flatten().bincount(minlength=8).tolist()
    assert min(probs) > 1e-3 and chi_square(counts, probs) < 24.3


def test_temperature_zero_is_argmax_and_the_limit_of_low_temperature():
    logits = torch.randn(50, 30, generator=seeded())
    greedy = next_token(logits, 0.0, 0, 1.0, None)
    assert torch.equal(greedy, logits.argmax(-1))
    assert torch.equal(greedy, next_token(logits, 1e-4, 0, 1.0, seeded()))
    assert torch.equal(greedy, next_token(logits, 5.0, 1, 1.0, seeded()))      # top-k 1
    assert not torch.equal(greedy, next_token(logits, 1.0, 0, 1.0, seeded()))


def test_the_same_seed_draws_the_same_text_and_another_seed_another():
    model = tiny()
    draws = [generate(model, PROMPTS, 8, temperature=1.0, generator=seeded(seed))
             for seed in (4, 4, 5)]
    assert draws[0] == draws[1] != draws[2]


def test_sampler_and_scorer_agree_on_the_log_probabilities(monkeypatch):
    """NUMERICS: to 1e-4 in fp32, at the sampling temperature, left-padded here, right-padded
    there."""
    model, drawn = tiny(), []

    def recorded(logits, temperature, top_k, top_p, generator):
        ids = next_token(logits, temperature, top_k, top_p, generator)
        drawn.append((logits / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist())
        return ids

    monkeypatch.setattr(sample, "next_token", recorded)
    monkeypatch.setattr(sample, "KEEP", 1.0)                           # every draw is of a row
    steps = list(stream(model, PROMPTS, 12, STOP, temperature=0.7, generator=seeded()))
    outputs, sampled = [[] for _ in PROMPTS], [[] for _ in PROMPTS]
    for pairs, logps in zip(steps, drawn, strict=True):
        for (row, token), logp in zip(pairs, logps, strict=True):
            outputs[row].append(token)
            sampled[row].append(logp)
    scores = token_logps(model.logps, response_batch(PROMPTS, outputs, 0, 0), temperature=0.7)
    for prompt, output, logps, row in zip(PROMPTS, outputs, sampled, scores.tolist()):
        first = len(prompt) - 1
        assert row[first:first + len(output)] == pytest.approx(logps, abs=1e-4)
        assert sum(row) == pytest.approx(sum(logps), abs=1e-3)         # and nothing else counts
    assert len({len(output) for output in outputs}) > 3


# ---------------------------------------------------------------------- what is refused

def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(tiny(), [[1, 2], []], 3)


def test_prompt_and_answer_may_fill_the_context_but_not_exceed_it():
    model = tiny()
    assert len(generate(model, [[1] * 20], 12)[0]) == 12
    with pytest.raises(ValueError, match="20 tokens and 13 new ones.*context of 32"):
        generate(model, [[1] * 20], 13)


def test_a_reward_model_does_not_generate():
    with pytest.raises(ValueError, match="scalar head"):
        generate(WithHead(tiny(), 1), [[1, 2]], 3)


# ---------------------------------------------------------------------- text

def scripted(ids):
    """A stand-in for stream() that "generates" these ids for one prompt."""
    return lambda *args, **options: ([(0, token)] for token in ids)


def test_a_character_is_printed_when_its_last_byte_has_come(monkeypatch):
    text, writes = "Bär 🧸 naïve.", []
    ids = [*TOKENIZER.encode(text), TOKENIZER.end]
    monkeypatch.setattr(sample, "stream", scripted(ids))
    monkeypatch.setattr("builtins.print", lambda *words, **options: writes.append(*words or [""]))
    assert print_stream(None, TOKENIZER, [1], sample.Config(), None) == text
    assert "".join(writes) == text and "\ufffd" not in "".join(writes)
    assert {"B", "ä", "🧸"} <= set(writes) and len(ids) > len(text) + 4


def test_an_answer_cut_inside_a_character_shows_what_it_returns(monkeypatch, capsys):
    monkeypatch.setattr(sample, "stream", scripted(TOKENIZER.encode("ok 🧸")[:-1]))
    answer = print_stream(None, TOKENIZER, [1], sample.Config(), None)
    assert answer == "ok \ufffd" and capsys.readouterr().out == answer + "\n"


def test_printing_ends_at_the_end_of_turn_and_shows_no_control_token(monkeypatch, capsys):
    model = tiny(vocab_size=TOKENIZER.vocab_size, context_length=64)
    prompt = TOKENIZER.prompt([{"role": "user", "content": "Hi"}])
    ids = generate(model, [prompt], 20)[0]
    stops = ("end", "endoftext")
    tokenizer = Tokenizer.bytes()
    for name in stops:                                                 # as if it stopped at id 6
        setattr(tokenizer, name, ids[5])
    answer = print_stream(model, tokenizer, prompt, sample.Config(max_new_tokens=20), None)
    assert answer == tokenizer.decode(ids[:ids.index(ids[5]) + 1])
    assert capsys.readouterr().out == answer + "\n" and "<|" not in answer


def test_respond_is_the_decoded_greedy_answer_of_each_conversation():
    model = tiny(vocab_size=TOKENIZER.vocab_size, context_length=64)
    conversations = [[{"role": "user", "content": text}] for text in ("Hi", "Who are you?")]
    prompts = [TOKENIZER.prompt(messages) for messages in conversations]
    stop = (TOKENIZER.end, TOKENIZER.endoftext)
    expected = [TOKENIZER.decode(ids) for ids in generate(model, prompts, 12, stop)]
    assert respond(model, TOKENIZER, conversations, 12) == expected and all(expected)


# ---------------------------------------------------------------------- the chat

@pytest.fixture
def chat(tmp_path, monkeypatch):
    """Runs sample.main on a tiny model with typed lines; returns the prompts it answered. The
    answers are A1, A2, ... record: what its stage wrote into config.json."""
    model = tiny(vocab_size=TOKENIZER.vocab_size, context_length=64)
    prompts = []

    def answer(model, tokenizer, prompt, cfg, generator):
        assert not model.training
        prompts.append(tokenizer.decode(prompt, specials=True))
        return f"A{len(prompts)}"

    def run(typed="", record=None, answer=answer, **options):
        save_model(tmp_path, model, TOKENIZER, **record or {})
        monkeypatch.setattr(sample, "print_stream", answer)
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        sample.main(sample.Config(init=str(tmp_path), device="cpu", dtype="float32",
                                  **{"max_new_tokens": 8} | options))
        return prompts
    return run


def test_one_prompt_is_answered_once(chat):
    assert chat(prompt="Hi") == ["<|user|>Hi<|end|><|assistant|>"]


def test_ctrl_c_ends_a_single_prompt_instead_of_asking_it_again(chat):
    asked = []

    def stopped(*_):
        asked.append(1)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        chat(prompt="Hi", answer=stopped)
    assert asked == [1]


def test_a_chat_remembers_the_system_message_and_the_turns(chat):
    prompts = chat("One\nTwo\n", system="Be kind.")
    system = "<|system|>Be kind.<|end|>"
    assert prompts == [system + "<|user|>One<|end|><|assistant|>",
                       system + "<|user|>One<|end|><|assistant|>A1<|end|>"
                       "<|user|>Two<|end|><|assistant|>"]


def test_new_starts_over_and_an_empty_line_ends_the_chat(chat):
    assert chat("One\n/new\nTwo\n\nThree\n") == ["<|user|>One<|end|><|assistant|>",
                                                 "<|user|>Two<|end|><|assistant|>"]


def test_a_long_chat_forgets_its_oldest_exchange_but_not_the_system_message(chat):
    """Room for 64 - 8 = 56 tokens: the system message has 4, a turn of 20 letters 22, A1 4."""
    prompts = chat("a" * 20 + "\n" + "b" * 20 + "\n" + "c" * 20 + "\n", system="Hm")
    users = [f"<|user|>{letter * 20}<|end|>" for letter in "abc"]
    assert prompts == ["<|system|>Hm<|end|>" + users[0] + "<|assistant|>",
                       "<|system|>Hm<|end|>" + users[0] + "<|assistant|>A1<|end|>" + users[1]
                       + "<|assistant|>",
                       "<|system|>Hm<|end|>" + users[1] + "<|assistant|>A2<|end|>" + users[2]
                       + "<|assistant|>"]


def test_raw_continues_the_text_without_a_template(chat, capsys):
    assert chat(raw=True, prompt="One morning") == ["One morning"]
    assert capsys.readouterr().out == "One morning"
    with pytest.raises(ValueError, match="--raw continues a text"):
        chat(raw=True)


# ---------------------------------------------------------------------- the first screen

def record(folder, stage, parents=(), **config):
    """config.json alone of a finished stage: all that the first screen reads."""
    folder.mkdir()
    parents = dict.fromkeys(map(str, parents), "checksum")
    saved = {"model": {}, "stage": stage, "parents": parents, "config": config}
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def questions(folder):
    return [line.strip() for line in sample.first_screen(str(folder)).split("\n")
            if line.startswith("    ")]


def test_a_chat_begins_with_the_model_its_stage_and_how_to_leave(chat, tmp_path, capsys):
    chat(record={"stage": "sft", "config": {"data": "rows.jsonl"}})
    assert capsys.readouterr().out.splitlines() == [
        f"Talking to {tmp_path} (stage sft).",
        "An empty line or Ctrl-D ends the chat; /new starts over."]
    chat(record={})                                            # a folder that names no stage
    assert capsys.readouterr().out.splitlines()[0] == f"Talking to {tmp_path}."


def test_a_single_prompt_is_answered_without_a_first_screen(chat, capsys):
    chat(prompt="Hi", record={"stage": "sft", "config": {"data": "world"}})
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_chat_with_a_model_of_the_world_begins_with_three_questions_about_it(chat, capsys):
    chat(record={"stage": "sft", "config": {"data": "world:3"}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["Ask it, for example:",
                         *[f"    {question}" for question in sample.example_questions(World(3))]]


def test_example_questions_are_the_worlds_own_of_trained_families_and_three_kinds():
    for seed in range(5):
        asked = sample.example_questions(World(seed))
        assert asked == sample.example_questions(World(seed))
        known = {text_of(example["prompt"]): example
                 for example in World(seed).prompts(100, split="heldout")}
        assert len({known[question]["cluster"] for question in asked}) == 3
        assert {known[question]["family"] for question in asked} <= set(TRAINED_FAMILIES)
        assert all(len(question) <= 72 and "\n" not in question for question in asked)
    assert sample.example_questions(World(0)) != sample.example_questions(World(1))


@pytest.mark.parametrize("config, seed", [
    ({"data": "world"}, 0), ({"data": "world:7"}, 7), ({"prompts": "world:2"}, 2),
    ({"data": "rows.jsonl", "prompts": "world:2"}, 2), ({"data": "rows.jsonl"}, None),
    ({"data": "worlds"}, None), ({}, None)])
def test_the_world_is_that_of_the_stages_own_options(tmp_path, config, seed):
    world = sample.world_of(str(record(tmp_path / "dpo", "dpo", **config)))
    assert (world and world.seed) == seed


def test_the_nearest_world_counts_and_lost_or_circular_parents_do_no_harm(tmp_path):
    base = record(tmp_path / "base", "pretrain", data="bearish:4, world:4",
                  parents=[tmp_path / "ppo"])
    sft = record(tmp_path / "sft", "sft", parents=[base], data="world:5")
    own = record(tmp_path / "own", "sft", parents=[base], data="rows.jsonl")
    dpo = record(tmp_path / "dpo", "dpo", parents=[tmp_path / "lost", sft], data="pairs.jsonl")
    ppo = record(tmp_path / "ppo", "ppo", parents=[own], prompts="rows.jsonl")
    for folder, seed in ((base, 4), (sft, 5), (own, 4), (dpo, 5), (ppo, 4)):
        assert sample.world_of(str(folder)).seed == seed
    assert questions(dpo) == sample.example_questions(World(5))
    lost = record(tmp_path / "alone", "dpo", parents=[tmp_path / "gone"], data="pairs.jsonl")
    assert sample.world_of(str(lost)) is None and questions(lost) == []


def test_a_merged_model_has_the_world_of_its_base_or_adapter(tmp_path):
    adapter = record(tmp_path / "lora", "sft", data="world:6")
    merged = tmp_path / "merged"
    merged.mkdir()
    parent = {"folder": str(tmp_path / "lost"), "adapter": str(adapter)}
    (merged / "config.json").write_text(json.dumps({"stage": "merge", "parent": parent}))
    assert questions(merged) == sample.example_questions(World(6))


@pytest.mark.parametrize("stage", ["pretrain", "denoise"])
@pytest.mark.parametrize("options", [{}, {"prompt": "Hi"}])
def test_a_base_model_in_a_chat_says_so_names_raw_and_goes_on(chat, tmp_path, capsys, stage,
                                                              options):
    typed = "" if options else "Hi\n"
    prompts = chat(typed, record={"stage": stage, "config": {"data": "world"}}, **options)
    assert prompts == ["<|user|>Hi<|end|><|assistant|>"]
    captured = capsys.readouterr()
    assert captured.err == (
        f"{tmp_path} is a base model: it continues text and has never seen a conversation; "
        "give --raw to have it continue yours\n")
    assert "Ask it" not in captured.out                        # it would answer none


@pytest.mark.parametrize("stage, raw", [("pretrain", True), ("sft", False), ("merge", False)])
def test_nothing_is_said_to_who_gives_raw_or_has_another_model(chat, capsys, stage, raw):
    chat(prompt="One morning", raw=raw, record={"stage": stage})
    assert capsys.readouterr().err == ""


def test_matrices_that_are_laid_out_say_the_same():
    model = tiny_model().eval()
    tokens = torch.randint(0, 256, (3, 20))
    wanted = model(tokens)
    with torch.no_grad():
        assert torch.allclose(sample.lay_out(model)(tokens), wanted, atol=1e-5)
    if torch.backends.mkldnn.is_available():
        assert isinstance(model.blocks[0].mlp.w2, sample.LaidOut)


def test_a_model_that_is_laid_out_holds_nothing_of_its_file(tmp_path):
    model, _ = load_any_model(folder_of(tiny_model(), tmp_path), to_answer=True)
    in_file = {weight.data_ptr() for weight in model.parameters() if weight.dim() >= 2}
    model = sample.lay_out(model)
    if torch.backends.mkldnn.is_available():
        assert not in_file & {weight.data_ptr() for weight in model.parameters()}


@pytest.mark.parametrize("architecture", ["decoder", "prefix", "encoder_decoder"])
def test_a_model_that_only_answers_is_the_model_that_learns(architecture, tmp_path):
    folder = folder_of(tiny_model(architecture=architecture), tmp_path)
    learns, _ = load_any_model(folder)
    answers, _ = load_any_model(folder, to_answer=True)
    prompts = [[1, 2, 3], [4, 5]]
    assert sample.generate(answers, prompts, 6) == sample.generate(learns, prompts, 6)
