"""Claims about imported_tokenizer.py and tokenizer_formats.py: other people's vocabularies."""
import base64
import json
import random

import pytest
import regex

import imported_tokenizer
import objectives
import shards
import tokenizer_formats
from imported_tokenizer import ImportedTokenizer, Template, merged_by, split
from tokenizer import PATTERN, Tokenizer
from tokenizer_formats import GPT2, to_characters

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
          "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|im_start|>assistant\n' }}{% endif %}")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = [("l", "o"), ("lo", "w"), ("e", "r"), ("Ġ", "low"), ("o", "w"),
          ("a", "b"), ("ab", "c"), ("b", "c")]


def vocabulary(size: int, **model) -> tuple[dict, dict]:
    """tokenizer.json and tokenizer_config.json by hand: three control tokens first, as SmolLM2 has
    them, then bytes, then merges."""
    vocab = {name: i for i, name in enumerate(SPECIAL)}
    for byte in range(256):
        vocab[to_characters(bytes([byte]))] = len(vocab)
    for left, right in MERGES:
        vocab.setdefault(left + right, len(vocab))
    assert len(vocab) <= size
    added = [{"id": i, "content": name, "special": True, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False} for i, name in enumerate(SPECIAL)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    saved = {"version": "1.0", "added_tokens": added, "normalizer": None,
             "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
             "post_processor": None, "decoder": byte_level,
             "model": {"type": "BPE", "vocab": vocab,
                       "merges": [f"{left} {right}" for left, right in MERGES]} | model}
    # the end of a turn pads as well, as SmolLM2 has it
    return saved, {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}


def imported(jinja: str | None = CHATML, size: int = 300, **model) -> ImportedTokenizer:
    saved, settings = vocabulary(size, **model)
    return tokenizer_formats.from_json(saved, settings, jinja, size, "")


# ---------------------------------------------------------------------- merges

def test_merges_are_done_in_their_order_and_not_by_what_is_a_token():
    # "ow" is a token of a higher number than "lo": by its merge "low" is lo + w
    numbers = {(left.encode(), right.encode()): i for i, (left, right) in enumerate(
        (("l", "o"), ("lo", "w"), ("o", "w")))}
    assert merged_by(numbers, b"low") == [b"low"]
    assert merged_by(numbers, b"owlo") == [b"ow", b"lo"]
    # "abc" is a token, but no merge makes it of a and bc
    assert merged_by({(b"b", b"c"): 0, (b"a", b"b"): 1, (b"ab", b"c"): 2}, b"abc") == [b"a", b"bc"]


def slow_merged(numbers: dict, word: bytes) -> list[bytes]:
    """The definition: look at all neighbours, join the leftmost of the lowest, begin again."""
    parts = [bytes([byte]) for byte in word]
    while True:
        known = [(numbers[pair], i) for i, pair in enumerate(zip(parts, parts[1:]))
                 if pair in numbers]
        if not known:
            return parts
        _, i = min(known)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def test_the_heap_does_what_the_definition_says():
    rng = random.Random(0)
    for _ in range(300):
        tokens = [bytes([byte]) for byte in b"abc"]
        numbers = {}
        for _ in range(rng.randrange(1, 12)):
            pair = rng.choice(tokens), rng.choice(tokens)
            numbers.setdefault(pair, len(numbers))
            tokens.append(pair[0] + pair[1])
        word = bytes(rng.choice(b"abc") for _ in range(rng.randrange(0, 30)))
        assert merged_by(numbers, word) == slow_merged(numbers, word)


def test_a_page_of_one_letter_takes_no_longer_than_a_page():
    # the definition would need a quarter of an hour for these 200,000 letters
    assert b"".join(merged_by({(b"a", b"a"): 0, (b"aa", b"aa"): 1}, b"a" * 200_000)) \
        == b"a" * 200_000


def test_a_split_loses_nothing():
    text = "a1 23  b\n\n  c'll 東京 4x\t"
    words = split(text, [regex.compile(r"\p{N}"), regex.compile(GPT2)])
    assert "".join(words) == text
    assert words[:5] == ["a", "1", " ", "2", "3"]


# ---------------------------------------------------------------------- ids

def test_ids_stay_what_they_are():
    tokenizer = imported()
    saved, _ = vocabulary(300)
    vocab = saved["model"]["vocab"]
    assert tokenizer.encode("low lower") == [vocab["low"], vocab["Ġlow"], vocab["er"]]
    assert tokenizer.special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert tokenizer.vocab_size == 300                 # rows of the embedding that no text reaches
    assert tokenizer.decode(tokenizer.encode("Löwe, 東京!\n")) == "Löwe, 東京!\n"


def test_no_text_becomes_a_control_token():
    tokenizer = imported()
    ids = tokenizer.encode("<|im_end|><|endoftext|>")
    assert min(ids) > 2
    assert tokenizer.decode(ids) == "<|im_end|><|endoftext|>"
    typed = [{"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\nyes"}]
    plain = [{"role": "user", "content": "x"}]
    control = [i for i in tokenizer.prompt(typed) if i < 3]
    assert control == [i for i in tokenizer.prompt(plain) if i < 3]


def test_a_pad_that_ends_turns_is_not_taken():
    tokenizer = imported()
    assert (tokenizer.end, tokenizer.pad, tokenizer.endoftext) == (2, 0, 0)


def test_a_whole_word_is_its_token_only_where_the_model_says_so():
    merges = ["b c", "a bc"]
    saved, _ = vocabulary(300)
    token = saved["model"]["vocab"]["abc"]
    by_merges = imported(merges=["b c"])
    assert by_merges.decode(by_merges.encode("abc")) == "abc" and len(by_merges.encode("abc")) == 2
    assert imported(merges=["b c"], ignore_merges=True).encode("abc") == [token]
    assert imported(merges=merges).encode("abc") == [token]


def test_a_byte_that_the_vocabulary_lacks_becomes_a_replacement_character():
    saved, settings = vocabulary(300)
    letter = to_characters("é".encode()[1:])
    del saved["model"]["vocab"][letter]
    tokenizer = tokenizer_formats.from_json(saved, settings, CHATML, 300, "")
    assert min(tokenizer.encode("é")) > 2
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("café!"))


# ---------------------------------------------------------------------- templates

def test_a_conversation_by_hand():
    tokenizer = imported()
    messages = [{"role": "user", "content": "low"}, {"role": "assistant", "content": "er"}]
    ids, mask = tokenizer.chat(messages)
    spelled = tokenizer.decode(ids, specials=True)
    assert spelled == ("<|im_start|>user\nlow<|im_end|>\n"
                       "<|im_start|>assistant\ner<|im_end|>\n")
    targets = [i for i, target in zip(ids, mask) if target]
    assert targets == [*tokenizer.encode("er"), tokenizer.end]
    prompt = tokenizer.prompt(messages[:1])
    assert ids[:len(prompt)] == prompt


def test_every_turn_of_the_assistant_is_a_target_and_nothing_else_is():
    tokenizer = imported()
    messages = [{"role": "system", "content": "assistant\n"}, {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"}, {"role": "user", "content": "assistant\n"},
                {"role": "assistant", "content": "c"}]
    ids, mask = tokenizer.chat(messages)
    targets = [i for i, target in zip(ids, mask) if target]
    end = tokenizer.end
    assert targets == [*tokenizer.encode("b"), end, *tokenizer.encode("c"), end]


def test_a_default_system_turn_is_found_and_written_where_there_is_none():
    with_default = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != "
                    "'system' %}{{ '<|im_start|>system\nBe a bear.<|im_end|>\n' }}{% endif %}"
                    + CHATML[len("{% for message in messages %}"):])
    tokenizer = imported(with_default)
    assert tokenizer.template.default_system == "Be a bear."
    user = {"role": "user", "content": "a"}
    told = tokenizer.prompt([{"role": "system", "content": "Be a bear."}, user])
    assert tokenizer.prompt([user]) == told
    assert tokenizer.prompt([{"role": "system", "content": "No."}, user]) != told


def test_what_a_template_writes_besides_turns_is_said(capsys):
    dated = "{{ 'Cutting Knowledge Date: December 2023' }}{{ raise_exception('no tools here') }}"
    assert imported(dated + CHATML).template.before == imported(CHATML).template.before
    said = capsys.readouterr().err
    assert "'Cutting Knowledge Date: December 2023' (and 0 more)" in said
    imported(CHATML)
    assert capsys.readouterr().err == ""


def with_settings(jinja: str | None, special=SPECIAL, **settings) -> ImportedTokenizer:
    saved, others = vocabulary(300)
    for i, name in enumerate(special):
        saved["added_tokens"][i]["content"] = name
        saved["model"]["vocab"][name] = saved["model"]["vocab"].pop(SPECIAL[i])
    return tokenizer_formats.from_json(saved, others | settings, jinja, 300, "")


def test_a_bos_that_every_turn_begins_with_stands_there_once():
    assert with_settings(CHATML, bos_token="<|im_start|>").template.start == ""
    written = with_settings("{{ bos_token }}" + CHATML, bos_token="<|endoftext|>")
    assert written.template.start == "<|endoftext|>"
    spelled = with_settings("{{ '<|endoftext|>' }}" + CHATML, bos_token="<|endoftext|>")
    assert spelled.template.start == "<|endoftext|>"


def test_a_llama_3_without_a_template_begins_with_its_bos():
    marks = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    saved, settings = vocabulary(300)
    saved["added_tokens"] = [{"id": 290 + i, "content": name} for i, name in enumerate(marks)]
    for name in SPECIAL:
        del saved["model"]["vocab"][name]
    settings |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    tokenizer = tokenizer_formats.from_json(saved, settings, None, 300, "")
    ids = tokenizer.prompt([{"role": "user", "content": "low"}])
    assert tokenizer.decode(ids, specials=True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nlow<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize("jinja", [CHATML, "{{ bos_token }}" + CHATML])
def test_what_goes_out_begins_a_text_as_before_when_it_comes_back(jinja, tmp_path):
    tokenizer = with_settings(jinja, ("<s>", "<|im_start|>", "<|im_end|>"), bos_token="<s>")
    assert tokenizer.template.start == ("<s>" if "bos_token" in jinja else "")
    tokenizer_formats.write_json(tmp_path, tokenizer)
    turn = [{"role": "user", "content": "low"}]
    for again in (tokenizer_formats.read_folder(tmp_path, 300),
                  tokenizer_formats.from_gguf(tokenizer_formats.to_gguf(tokenizer), 300)):
        assert again.template == tokenizer.template
        assert again.prompt(turn) == tokenizer.prompt(turn)


def test_a_template_may_build_its_turns_before_it_writes_them():
    jinja = ("{% for message in messages %}{% set content = '<|start_header_id|>' + message['role']"
             " + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"
             "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
             "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}")
    marks = dict.fromkeys(("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), 0)
    found = tokenizer_formats.template_of(jinja, marks, "<s>")
    assert found.start == "<s>" and found.trim
    assert found.before["user"] == "<|start_header_id|>user<|end_header_id|>\n\n"


def test_a_token_that_is_read_as_text_is_spelled_and_never_typed():
    saved, settings = vocabulary(300)
    saved["added_tokens"].append({"id": 299, "content": "<think>", "special": False})
    tokenizer = tokenizer_formats.from_json(saved, settings, CHATML, 300, "")
    assert 299 not in tokenizer.encode("<think>")
    assert tokenizer.decode([299, *tokenizer.encode("low"), tokenizer.end]) == "<think>low"
    assert imported_tokenizer.load(tokenizer.saved()).visible == ["<think>"]
    metadata = tokenizer_formats.to_gguf(with_settings(CHATML))
    assert metadata["tokenizer.ggml.token_type"][:3] == [3, 3, 3]


def test_blanks_around_a_content_go_where_the_template_trims_them():
    trimming = CHATML.replace("message['content']", "message['content'] | trim")
    user = [{"role": "user", "content": " low "}]
    assert with_settings(trimming).prompt(user) == imported().prompt([user[0] | {"content": "low"}])
    assert imported().prompt(user) != imported().prompt([user[0] | {"content": "low"}])


def test_a_default_system_turn_may_have_braces_and_apostrophes():
    turn = r"{{ '<|im_start|>system\nIt\'s in \\boxed{}.<|im_end|>\n' }}"
    assert "boxed{}." in with_settings(turn + CHATML).template.default_system


def test_of_several_templates_the_default_is_taken(tmp_path):
    saved, settings = vocabulary(300)
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings
                                                               | {"chat_template": several}))
    assert tokenizer_formats.read_folder(tmp_path, 300) == imported()


@pytest.mark.parametrize("jinja, message", [
    (CHATML.replace("message['role'] + '\n'", "message['role'] + ': '"), "fits none of"),
    (CHATML.replace("message['content']", "message['content'] | upper"), "calls upper"),
    (CHATML + "{{ ''.__class__ }}", "has code in it"),
    (CHATML + "{{ open('/etc/passwd') }}", "calls open"),
    (CHATML.replace("message['content']", "message['content'][:3]"), "cuts a content"),
    ("{#" + CHATML + "#}{{ messages }}", "fits none of"),
    (CHATML + "{% include 'other' %}", "has include"),
    ("{{ messages | pprint }}", "calls pprint"),
    ("{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}", "--template chatml"),
])
def test_a_template_of_another_form_is_refused_with_the_way_out(jinja, message):
    with pytest.raises(ValueError, match=message) as refused:
        imported(jinja)
    assert "--template" in str(refused.value)


def test_a_template_that_would_take_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr(tokenizer_formats, "SECONDS", 0.1)
    with pytest.raises(ValueError, match="takes more than 0.1 seconds"):
        imported(CHATML + 5_000 * "{{")


def test_the_template_that_goes_out_writes_what_comes_in():
    jinja2 = pytest.importorskip("jinja2")
    template = Template("<s>", {"system": "<|im_start|>system\n", "user": "<|im_start|>user\n",
                                "assistant": "<|im_start|>assistant\n"},
                        dict.fromkeys(("system", "user", "assistant"), "<|im_end|>\n"), "It's me.")
    render = jinja2.Template(tokenizer_formats.jinja_of(template)).render
    found = render(messages=[{"role": "user", "content": "a"}], add_generation_prompt=True)
    assert found == ("<s><|im_start|>system\nIt's me.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
                     "<|im_start|>assistant\n")


# ---------------------------------------------------------------------- files

def test_a_saved_tokenizer_opens_as_the_same(tmp_path):
    tokenizer = imported()
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path) == tokenizer


def test_ranks_and_merges_are_the_same_vocabulary(tmp_path):
    own = Tokenizer.train(["the lower the bear, the slower the bear"] * 9 + ["low 123"], 290)
    ours = tokenizer_formats.as_imported(own)
    for text in ("the slowest bear", "low 12345", "  two\n\nlines ", "Löwe 東京"):
        assert ours.encode(text) == own.encode(text)
    file = tmp_path / "x.tiktoken"
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in own.ranks.items()]
    file.write_text("\n".join(lines))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"added_tokens_decoder": {str(300 + i): {"content": name}
                                  for i, name in enumerate(SPECIAL)}, "chat_template": CHATML}))
    read = tokenizer_formats.read_folder(tmp_path, 310)
    assert read.encode("the slowest bear") == own.encode("the slowest bear")


def test_gpt2s_files_are_a_tokenizer(tmp_path):
    saved, _ = vocabulary(300)
    (tmp_path / "vocab.json").write_text(json.dumps(saved["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(saved["model"]["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"added_tokens_decoder": {str(i): {"content": name} for i, name in enumerate(SPECIAL)},
         "chat_template": CHATML}))
    read = tokenizer_formats.read_folder(tmp_path, 300)
    assert read.encode("low lower 12") == imported().encode("low lower 1") + read.encode("2")


def test_the_older_files_of_another_model_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ValueError, match="are of a Qwen2Tokenizer"):
        tokenizer_formats.read_folder(tmp_path, 300)


DAMAGE = {
    "stands twice": lambda saved: saved["model"]["vocab"].update(x=5),
    "has the id 300": lambda saved: saved["model"]["vocab"].update(xyz=300),
    "makes no token": lambda saved: saved["model"]["merges"].append("x y"),
    "model.type is Unigram": lambda saved: saved["model"].update(type="Unigram"),
    "model.type is BPE": lambda saved: saved["model"].update(byte_fallback=True),
    "normalizer is Lowercase": lambda saved: saved.update(normalizer={"type": "Lowercase"}),
    "Metaspace": lambda saved: saved.update(pre_tokenizer={"type": "Metaspace"}),
    "stands for no byte": lambda saved: saved["model"]["vocab"].update({"東": 290}),
    "a field is missing": lambda saved: saved.pop("model"),
    "added_tokens has a token twice": lambda saved: saved["added_tokens"].append(
        saved["added_tokens"][0]),
    "has the id 299 among the added tokens, and 2 in": lambda saved:
        saved["added_tokens"][2].update(id=299),
    "the merge 'a b c' is no pair": lambda saved: saved["model"]["merges"].append("a b c"),
    "the merge 5 is no pair": lambda saved: saved["model"]["merges"].append(5),
    "the control token '' is empty": lambda saved: saved["added_tokens"].append(
        {"id": 299, "content": ""}),
    r"the pattern '\(a' is none": lambda saved: saved.update(pre_tokenizer={
        "type": "Sequence", "pretokenizers": [
            {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "(a"}},
            {"type": "ByteLevel", "use_regex": False}]}),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_tokenizer_json_that_is_not_served_is_refused(message, tmp_path):
    saved, settings = vocabulary(300)
    DAMAGE[message](saved)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": CHATML}))
    with pytest.raises(ValueError, match=message):
        tokenizer_formats.read_folder(tmp_path, 300)


@pytest.mark.parametrize("field, value, message", [
    ("chat_template", 3, "chat_template is '3', a int"),
    ("chat_template", ["x"], "chat_template: not an object of fields"),
    ("added_tokens_decoder", [], r"added_tokens_decoder is '\[\]', a list"),
    ("tokenizer_class", 5, "tokenizer_class is '5', a int")])
def test_a_setting_of_another_type_is_refused_by_file_and_field(field, value, message, tmp_path):
    saved, settings = vocabulary(300)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {field: value}))
    with pytest.raises(ValueError, match="tokenizer_config.json:? .*" + message):
        tokenizer_formats.read_folder(tmp_path, 300)


def test_a_damaged_list_of_merges_is_not_blamed_on_another_file(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(ValueError) as refused:
        tokenizer_formats.read_folder(tmp_path, 300, "chatml")
    assert "tokenizer_config.json" not in str(refused.value)


def test_what_stands_twice_in_a_file_is_refused(tmp_path):
    saved, settings = vocabulary(300)
    text = json.dumps(saved).replace('"low": ', '"low": 5, "low": ', 1)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json: not JSON .'low' stands twice"):
        tokenizer_formats.read_folder(tmp_path, 300)
    (tmp_path / "x.tiktoken").write_text("YQ== 97\nYQ== 270\n")
    with pytest.raises(ValueError, match="line 2: the token b'a' stands twice"):
        tokenizer_formats.read_ranks(tmp_path / "x.tiktoken")


def test_a_text_outside_of_the_turns_is_said(capsys):
    imported("You are EVIL.\n" + CHATML)
    assert "You are EVIL." in capsys.readouterr().err


def test_a_vocabulary_whose_only_control_token_ends_turns_is_refused():
    template = Template("", {}, {"assistant": "</s>\n"})
    with pytest.raises(ValueError, match="</s>, which ends a turn, is the only control token"):
        tokenizer_formats.roles_of({"</s>": 2}, template, "</s>", "")


@pytest.mark.parametrize("name", ["tokens", "special", "merges", "template", "end"])
def test_a_damaged_folder_is_refused(name):
    saved = imported().saved()
    del saved[name]
    with pytest.raises(ValueError, match=name):
        imported_tokenizer.load(saved)


def test_a_vocabulary_from_elsewhere_neither_grows_nor_takes_other_control_tokens():
    with pytest.raises(ValueError, match="--new_words"):
        imported().extended(["new"], 3)
    with pytest.raises(ValueError, match="--objective span"):
        objectives.with_special_tokens(imported(), "span", 32)
    assert objectives.with_special_tokens(imported(), "causal", 32) == imported()


def test_shards_know_an_imported_tokenizer_by_its_ids():
    assert shards.same_ids(imported(), imported())
    assert not shards.same_ids(imported(), imported(merges=["l o"]))
    assert not shards.same_ids(imported(), Tokenizer.bytes())
    assert not shards.same_ids(Tokenizer.bytes(), imported())


# ---------------------------------------------------------------------- beside the library

def strings(n: int) -> list[str]:
    """Texts of every script, blanks, digits, contractions, and bytes that stand for nothing."""
    rng = random.Random(0)
    starts = [0x20, 0x41, 0x61, 0x30, 0xC0, 0x370, 0x400, 0x5D0, 0x620, 0x900, 0xE00, 0x1100,
              0x2010, 0x2190, 0x3040, 0x4E00, 0xAC00, 0x1F600, 0x10400]
    texts = ["", " ", "low lower lowest", "I'll we're it's", "a\r\n\r\nb", "\t\t x", "1234.5e6"]
    while len(texts) < n:
        words = []
        for _ in range(rng.randrange(1, 8)):
            start = rng.choice(starts)
            words.append("".join(chr(start + rng.randrange(24)) for _ in range(rng.randrange(9))))
        texts.append(rng.choice((" ", "  ", "\n", "")).join(words))
    return texts


@pytest.mark.parametrize("pattern", [GPT2, PATTERN, tokenizer_formats.QWEN2])
def test_ids_are_those_of_hugging_faces_library(pattern, tmp_path):
    library = pytest.importorskip("tokenizers")
    saved, settings = vocabulary(300)
    saved["pre_tokenizer"]["pretokenizers"] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    theirs = library.Tokenizer.from_str(json.dumps(saved))
    ours = tokenizer_formats.from_json(saved, settings, CHATML, 300, "")
    for text in strings(2000):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
