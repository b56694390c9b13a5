r"""
Other people's tokenizers and chat templates: what convert.py reads and writes.

  tokenizer.json     of Hugging Face: byte-level BPE with merges, added tokens, a pattern; what is
                     none, as SentencePiece, goes to library_tokenizer.py as it is
  GGUF               tokenizer.ggml.*: tokens, merges, types, the name of a pattern
  *.tiktoken         ranks: a token in base64 and its number in each line
  vocab.json, merges.txt             of GPT-2

A chat template is a program in Jinja. None is run: FORMS lists what templates write around a turn,
one is chosen by the control tokens it names, and what else it would do is refused.
"""
import base64
import binascii
import json
import sys
from pathlib import Path
from typing import NamedTuple

import regex

from imported_tokenizer import ImportedTokenizer, Template
from library_tokenizer import LibraryTokenizer
from messages import ROLES
from tokenizer import PATTERN, Tokenizer, merged

GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
QWEN2 = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
DIGITS = r"\p{N}"                      # each by itself
# What GGUF calls the patterns, with how llama.cpp splits by them.
GGUF_PATTERNS = {"gpt-2": [GPT2], "smollm": [DIGITS, GPT2], "llama-bpe": [PATTERN],
                 "qwen2": [QWEN2]}
NORMAL = 1                             # of tokenizer.ggml.token_type; other types have no text
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
LONGEST_TOKEN = 1000                   # bytes of a token in a file of ranks

# The fields that are read, where they are there, and of which type each must be.
SETTINGS = {"chat_template": (str, list), "added_tokens_decoder": (dict,),
            "tokenizer_class": (str,), "bos_token": (str, dict), "eos_token": (str, dict),
            "pad_token": (str, dict)}
OF_SEVERAL = {"name": (str,), "template": (str,)}      # of each template in a list
GGUF_FIELDS = {"tokenizer.ggml.tokens": (list,), "tokenizer.ggml.token_type": (list,),
               "tokenizer.ggml.merges": (list,), "tokenizer.chat_template": (str,),
               "tokenizer.ggml.bos_token_id": (int,), "tokenizer.ggml.eos_token_id": (int,),
               "tokenizer.ggml.padding_token_id": (int,)}


class Form(NamedTuple):
    before: str                        # of a turn; {role} is the role's own name
    after: str
    has_bos: bool = False              # whether a conversation begins with it, if nothing says so
    marks: tuple[str, ...] = ()        # its control tokens, if others are ordinary text


FORMS = {
    "chatml": Form("<|im_start|>{role}\n", "<|im_end|>\n"),
    "llama3": Form("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", True),
    "lifecycle": Form("<|{role}|>", "<|end|>"),
    "zephyr": Form("<|{role}|>\n", "</s>\n", marks=("</s>",)),
}
# What may stand before a bracket or behind a |: calls and filters, and the words of Jinja that a
# bracket may follow. All else could be a program.
CALLS = ("trim", "strip", "raise_exception", "tojson", "namespace", "strftime_now", "range", "if",
         "elif", "and", "or", "not", "in", "else", "length", "split", "startswith", "endswith",
         "lstrip", "rstrip", "items", "is")
SECONDS = 2                            # in which a pattern finds all that a template has of it
REMEDY = f"choose one with --template {' | '.join(FORMS)}"


# ---------------------------------------------------------------------- bytes as characters

def byte_characters() -> dict[str, int]:
    """The character that GPT-2's vocabulary writes for each byte: itself where it can be seen, the
    next one from U+0100 on where not. "Ġ" is the blank."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
            *range(ord("®"), ord("ÿ") + 1)]
    found = {chr(byte): byte for byte in seen}
    hidden = [byte for byte in range(256) if byte not in seen]
    return found | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = byte_characters()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def to_bytes(token: str) -> bytes:
    """A token as vocabularies spell it -> its bytes: "Ġthe" -> b" the"."""
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError as error:
        raise ValueError(f"the token {token!r} has the character {error}, which stands for no "
                         "byte: this is no byte-level vocabulary") from None


def to_characters(token: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in token)


# ---------------------------------------------------------------------- templates

def found_in(text: str, pattern: str) -> list:
    """All that a pattern finds. Raises ValueError for a text that is made to take for ever."""
    try:
        return regex.findall(pattern, text, flags=regex.DOTALL, timeout=SECONDS)
    except TimeoutError:
        raise ValueError(f"the chat template takes more than {SECONDS} seconds to read; "
                         f"{REMEDY}") from None


def check_template(jinja: str) -> None:
    """Raises ValueError for a template that does more than put texts around turns."""
    for code in found_in(jinja, r"\{[{%](.*?)[%}]\}"):
        if found_in(code, r"content['\"\]]*\s*\[\s*[^'\"\s]"):
            raise ValueError(f"the chat template cuts a content: {code.strip()[:60]!r}; {REMEDY}")
        code = regex.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "''", code)    # no texts
        if "__" in code:
            raise ValueError(f"the chat template has code in it: {code.strip()[:60]!r}; {REMEDY}")
        for word in found_in(code, r"\b(\w+)\s*\(|\|\s*(\w+)"):
            name = "".join(word)
            if name not in CALLS:
                raise ValueError(f"the chat template calls {name}, which is not served; {REMEDY}")
        statement = regex.match(r"-?\s*(include|import|from|extends)\b", code)
        if statement:
            raise ValueError(f"the chat template has {statement[1]}, which is not served; "
                             f"{REMEDY}")


def template_of(jinja: str | None, special: dict[str, int], bos: str = "", eos: str = "",
                form: str = "") -> Template:
    """The template of a model: by the name of a form, or the one whose control tokens the Jinja
    text names. Without either that of FORMS whose control tokens the vocabulary has.

    Raises ValueError, with the way out, for another one.
    """
    jinja = "".join(found_in(jinja or "", r"(.*?)(?:\{#.*?#\}|$)"))           # without comments
    if jinja and not form:
        check_template(jinja)
    if jinja:                                          # some call the end of a turn by this name
        jinja = regex.sub(r"\beos_token\b", lambda _: f"'{eos}'", jinja)
    texts = texts_in(jinja)
    fitting = []
    for name, (before, after, _, marks) in FORMS.items():
        needed = marks or regex.findall(r"<\|\w+\|>", before.format(role="user") + after)
        # without a template a vocabulary shows only what is a control token of its own
        stands = form or (is_spelled(jinja, before, after) if jinja else not marks)
        if stands and all(mark in special for mark in needed):
            fitting.append(name)
    if form and form not in fitting:
        raise ValueError(f"--template {form}: the vocabulary does not have its control tokens")
    if not form and len(fitting) != 1:
        what = "its chat template" if jinja else "it has no chat template, and its vocabulary"
        raise ValueError(f"{what} fits {' and '.join(fitting) or 'none of'} the forms that are "
                         f"served ({', '.join(FORMS)}); {REMEDY}")
    before, after, has_bos, _ = FORMS[form or fitting[0]]
    if jinja:
        # spelled out it may also be what every turn begins or ends with
        is_spelled_out = any(bos in text for text in texts) and bos not in before + after
        has_bos = "bos_token" in jinja or is_spelled_out
    found = Template(bos if has_bos else "", {role: before.format(role=role) for role in ROLES},
                     dict.fromkeys(ROLES, after), default_system(texts, before, after),
                     is_trimmed(jinja))
    outside = found_in(jinja, r"(?:^|[%}]\})([^{}]+)(?=\{[{%]|$)")
    if others := other_texts([*texts, *outside], found):
        print("the chat template writes other texts, too, which conversations here do not have: "
              f"{others[0]!r} (and {len(others) - 1} more)", file=sys.stderr)
    return found


# of a template: a text in quotes, what stands in {{ }} or in {% set %}
STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
WRITTEN = (r"\{\{((?:" + STRING + r"|[^'\"}]|\}(?!\}))*)\}\}"
           r"|\{%-?\s*set((?:" + STRING + r"|[^'\"%]|%(?!\}))*)%\}")


def texts_in(jinja: str) -> list[str]:
    """The texts that a template writes, as it spells them in {{ }} and {% set %}: neither names of
    fields, in brackets, nor what a call is given."""
    found = []
    for code in found_in(jinja, WRITTEN):
        code = "".join(code)                           # one of the two is empty
        for match in regex.finditer(STRING, code):
            if not code[:match.start()].rstrip().endswith(("(", "[")):
                found.append(unquoted(match.group()))
    return found


def unquoted(string: str) -> str:
    return string[1:-1].replace("\\n", "\n").replace("\\'", "'").replace('\\"', '"')


def is_spelled(jinja: str, before: str, after: str) -> bool:
    """Whether a template writes turns of a form: its control tokens, and what it has behind the
    role."""
    texts = texts_in(jinja)
    head, tail = before.split("{role}")
    behind_role = regex.findall(r"role['\"\]]*\s*\+\s*(" + STRING + ")", jinja)
    return (any(head in text for text in texts) and any(after.strip() in text for text in texts)
            and all(unquoted(string).startswith(tail) for string in behind_role))


def other_texts(texts: list[str], template: Template) -> list[str]:
    """Those texts of a template that are no part of its turns."""
    turns = [template.start]
    for role in ROLES:
        turn = template.before[role] + template.default_system + template.after[role]
        turns += [template.before[role], turn, template.after[role] + template.before["assistant"]]
    return [text.strip() for text in texts
            if text.strip() and not any(text in turn or text.strip() in turn for turn in turns)]


def default_system(texts: list[str], before: str, after: str) -> str:
    """The system turn that a template writes where a conversation has none: a text that it spells
    out between the marks of a system turn."""
    head = regex.escape(before.format(role="system"))
    tail = regex.escape(after.strip())
    for text in texts:
        found = regex.search(f"{head}(.+?){tail}", text, flags=regex.DOTALL)
        if found:
            return found[1]
    return ""


def is_trimmed(jinja: str) -> bool:
    """Whether a template takes the blanks from both ends of a content."""
    return regex.search(r"content['\"\]]*\s*(\|\s*trim|\.strip\(\))", jinja) is not None


def jinja_of(template: Template) -> str:
    """A chat template for Hugging Face's apply_chat_template and for llama.cpp."""
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

    parts = []
    if template.start:
        parts.append(f"{{{{ {quoted(template.start)} }}}}")
    if template.default_system:
        turn = (template.before["system"] + template.default_system + template.after["system"])
        parts.append("{% if messages[0]['role'] != 'system' %}"
                     f"{{{{ {quoted(turn)} }}}}{{% endif %}}")
    content = "message['content'] | trim" if template.trim else "message['content']"
    parts.append("{% for message in messages %}")
    for number, role in enumerate(template.before):
        word = "elif" if number else "if"
        parts.append(f"{{% {word} message['role'] == {quoted(role)} %}}"
                     f"{{{{ {quoted(template.before[role])} + {content} + "
                     f"{quoted(template.after[role])} }}}}")
    parts.append("{% endif %}{% endfor %}{% if add_generation_prompt %}"
                 f"{{{{ {quoted(template.before['assistant'])} }}}}{{% endif %}}")
    return "".join(parts)


# ---------------------------------------------------------------------- roles

def roles_of(special: dict[str, int], template: Template, eos: str, pad: str) -> dict[str, str]:
    """Which control token ends a turn, ends a document and pads.

    The first of the template's after[assistant] ends a turn. A pad that is the end of a turn is not
    taken, because it would then be masked, and no model would learn to end one.
    """
    after = template.after["assistant"]
    at = {after.index(name): name for name in special if name in after}
    end = at[min(at)]
    names = ("<|endoftext|>", "<|end_of_text|>", "</s>", eos)
    endoftext = next((name for name in names if name in special), end)
    candidates = [pad, "<|pad|>", endoftext, *special]
    pad = next((name for name in candidates if name in special and name != end), "")
    if not pad:
        raise ValueError(f"{end}, which ends a turn, is the only control token, and another one "
                         "must pad; add one to the vocabulary")
    return {"end": end, "pad": pad, "endoftext": endoftext}


def assembled(vocabulary: dict[str, int], size: int, control: dict[str, int],
              merges: list[tuple[str, str]], patterns: list[str], template: Template, eos: str,
              pad: str, **others) -> ImportedTokenizer:
    """An ImportedTokenizer from tokens and merges spelled in characters. size: rows of the
    embedding, which may be more than there are tokens."""
    highest = max([*vocabulary.values(), *control.values()])
    if highest >= size:
        raise ValueError(f"the tokenizer has the id {highest}, and the model {size} tokens")
    for token, i in control.items():
        if vocabulary.get(token, i) != i:
            raise ValueError(f"the control token {token} has the id {i} among the added tokens, "
                             f"and {vocabulary[token]} in the vocabulary")
    tokens: list[bytes | None] = [None] * size
    for token, i in vocabulary.items():
        if token in control:
            continue
        if not 0 <= i < size or tokens[i] is not None:
            raise ValueError(f"the id {i} of the token {token!r} stands twice or is negative")
        tokens[i] = to_bytes(token)
    pairs = [(to_bytes(left), to_bytes(right)) for left, right in merges]
    roles = roles_of(control, template, eos, pad)
    return ImportedTokenizer(tokens, control, pairs, patterns, template, **roles, **others)


# ---------------------------------------------------------------------- tokenizer.json

def read_folder(folder: Path, size: int, form: str = "") -> ImportedTokenizer:
    """The tokenizer of a Hugging Face folder, of a model with `size` tokens: tokenizer.json, or
    where there is none vocab.json and merges.txt, or one *.tiktoken.

    Raises ValueError, by the name of the file and the field, for what is not served.
    """
    settings = read_json(folder / "tokenizer_config.json", {})
    check_kinds(f"{folder}/tokenizer_config.json", settings, SETTINGS)
    jinja = jinja_in(folder, settings)
    file = folder / "tokenizer.json"
    saved = read_json(file, None)
    if saved is None:
        file = folder                                  # several files
    try:
        if saved is None:
            saved = from_ranks(folder, settings)
        return from_json(saved, settings, jinja, size, form)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: a field is missing or of another form ({error!r})") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def check_kinds(where: str, fields: dict, kinds: dict[str, tuple[type, ...]]) -> None:
    """Raises ValueError for a field that is there and of none of its types."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: not an object of fields")
    for name, served in kinds.items():
        value = fields.get(name)
        if value is not None and not isinstance(value, served):
            wanted = " or a ".join(kind.__name__ for kind in served)
            raise ValueError(f"{where}: {name} is {str(value)[:60]!r}, a {type(value).__name__}; "
                             f"it must be a {wanted}")


def jinja_in(folder: Path, settings: dict) -> str | None:
    """The chat template of a folder: a file, a field, or of several that which is the default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: no text in UTF-8 ({error})") from None
    jinja = settings.get("chat_template")
    if isinstance(jinja, list):                        # several, for different uses
        named = {}
        for one in jinja:
            check_kinds(f"{folder}/tokenizer_config.json: chat_template", one, OF_SEVERAL)
            named[one.get("name")] = one.get("template")
        jinja = named.get("default")
    return jinja


def read_json(file: Path, otherwise):
    """The object in a JSON file, or `otherwise` where there is no such file."""
    if not file.is_file():
        return otherwise
    try:
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({str(error)[:100]})") from None


def once(pairs: list[tuple]) -> dict:
    """An object of JSON. Raises ValueError for one that has a field twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} stands twice")
    return found


def from_ranks(folder: Path, settings: dict) -> dict:
    """The older files of a tokenizer in the form of tokenizer.json."""
    pattern = GPT2
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        kind = settings.get("tokenizer_class") or "GPT2Tokenizer"
        if not kind.startswith("GPT2"):
            raise ValueError(f"{folder}: vocab.json and merges.txt are of a {kind}, whose pattern "
                             "they do not say; save its tokenizer.json with transformers: "
                             "AutoTokenizer.from_pretrained(...).save_pretrained(...)")
        vocabulary = read_json(folder / "vocab.json", None)
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        files = sorted(folder.glob("*.tiktoken"))
        if len(files) != 1:
            raise ValueError(f"{folder}: there is neither tokenizer.json nor vocab.json and "
                             "merges.txt nor one *.tiktoken; save the tokenizer with transformers: "
                             "AutoTokenizer.from_pretrained(...).save_pretrained(...)")
        ranks = read_ranks(files[0])
        vocabulary = {to_characters(token): rank for token, rank in ranks.items()}
        merges = [[to_characters(part) for part in pair] for pair in merges_of(ranks)]
        pattern = PATTERN
    added = [{"id": int(i), "content": name_of(token)}
             for i, token in settings.get("added_tokens_decoder", {}).items()]
    if "<|endoftext|>" in vocabulary and not added:    # GPT-2 has it among the others
        added = [{"id": vocabulary["<|endoftext|>"], "content": "<|endoftext|>"}]
    steps = [{"type": "Split", "behavior": "Isolated", "pattern": {"Regex": pattern}},
             {"type": "ByteLevel", "use_regex": False}]
    return {"model": {"vocab": vocabulary, "merges": merges}, "added_tokens": added,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def from_json(saved: dict, settings: dict, jinja: str | None, size: int,
              form: str) -> ImportedTokenizer:
    model = saved["model"]
    added = saved.get("added_tokens") or ()
    control = {token["content"]: token["id"] for token in added}
    if len(control) < len(added):
        raise ValueError("added_tokens has a token twice")
    visible = [token["content"] for token in added if token.get("special") is False]
    names = {name: name_of(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    template = template_of(jinja, control, names["bos_token"], names["eos_token"], form)
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        roles = roles_of(control, template, names["eos_token"], names["pad_token"])
        return LibraryTokenizer(saved, size, control, template, visible=visible, **roles)
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise ValueError(f"model.{name} is {model[name]!r}, which is not served")
    patterns = patterns_of(saved.get("pre_tokenizer"))
    merges = [pair_of(merge) for merge in model["merges"]]
    return assembled(model["vocab"], size, control, merges, patterns, template,
                     names["eos_token"], names["pad_token"], nfc=is_nfc(saved.get("normalizer")),
                     whole_words=bool(model.get("ignore_merges")), visible=visible)


def pair_of(merge: str | list[str]) -> tuple[str, str]:
    """"l ow" or ["l", "ow"] -> ("l", "ow"). Raises ValueError for what is no pair."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
        raise ValueError(f"the merge {merge!r} is no pair of tokens")
    return pair[0], pair[1]


def name_of(token: str | dict | None) -> str:
    """A control token of tokenizer_config.json, where it may be an object."""
    return token["content"] if isinstance(token, dict) else token or ""


def is_nfc(normalizer: dict | None) -> bool:
    if normalizer is None or normalizer == {"type": "Sequence", "normalizers": []}:
        return False
    if normalizer == {"type": "NFC"}:
        return True
    raise ValueError(f"normalizer is {normalizer.get('type')}, which is not served")


def patterns_of(pre_tokenizer: dict | None) -> list[str]:
    """The patterns that split a text, one after the other."""
    if pre_tokenizer is None:
        raise ValueError("pre_tokenizer is missing: this is no byte-level BPE")
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = []
    for step in steps:
        kind = step["type"]
        if kind == "Split" and step["behavior"] == "Isolated" and "Regex" in step["pattern"]:
            patterns.append(step["pattern"]["Regex"])
        elif kind == "Digits":
            patterns.append(DIGITS if step["individual_digits"] else DIGITS + "+")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                patterns.append(GPT2)
        else:
            raise ValueError(f"pre_tokenizer has a step {kind} ({json.dumps(step)[:80]}), which is "
                             "not served")
    if steps[-1]["type"] != "ByteLevel":
        raise ValueError(f"pre_tokenizer ends in {steps[-1]['type']} and not in ByteLevel: this is "
                         "no byte-level BPE")
    return patterns


def read_ranks(file: Path) -> dict[bytes, int]:
    """A *.tiktoken file: a token in base64 and its rank in each line."""
    ranks = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            spelled, rank = line.split()
            token = base64.b64decode(spelled, validate=True)
            rank = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{file}, line {number}: {line[:40]!r} is no token in base64 and its "
                             "rank") from None
        if token in ranks or len(token) > LONGEST_TOKEN:
            raise ValueError(f"{file}, line {number}: the token {token[:40]!r} stands twice or has "
                             f"more than {LONGEST_TOKEN} bytes")
        ranks[token] = rank
    return ranks


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges behind a vocabulary of ranks, in their order: of each token the two parts that the
    tokens of lower rank make of it."""
    pairs = []
    for token in sorted(ranks, key=ranks.get):
        below = {}
        for first in range(len(token)):
            for last in range(first + 1, len(token) + 1):
                part = token[first:last]
                if ranks.get(part, ranks[token]) < ranks[token]:
                    below[part] = ranks[part]
        parts = merged([bytes([byte]) for byte in token], below)
        if len(parts) == 2:                            # 1: a byte; more: no text leads to it
            pairs.append((parts[0], parts[1]))
    return pairs


def as_imported(tokenizer: Tokenizer | ImportedTokenizer) -> ImportedTokenizer:
    """A tokenizer of this project in the form of other people's, with the same ids."""
    if isinstance(tokenizer, ImportedTokenizer):
        return tokenizer
    tokens = [*sorted(tokenizer.ranks, key=tokenizer.ranks.get), *[None] * len(tokenizer.special)]
    before, after, *_ = FORMS["lifecycle"]
    template = Template("", {role: before.format(role=role) for role in ROLES},
                        dict.fromkeys(ROLES, after))
    return ImportedTokenizer(tokens, tokenizer.special, merges_of(tokenizer.ranks),
                             [tokenizer.pattern], template, "<|end|>", "<|pad|>", "<|endoftext|>")


def write_json(folder: Path, tokenizer: ImportedTokenizer) -> None:
    """tokenizer.json and tokenizer_config.json as Hugging Face's libraries read them."""
    if isinstance(tokenizer, LibraryTokenizer):
        saved = tokenizer.theirs
    else:
        saved = their_json(tokenizer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "eos_token": tokenizer.roles["end"], "pad_token": tokenizer.roles["pad"],
                "chat_template": jinja_of(tokenizer.template)}
    if tokenizer.template.start:           # a reader knows the beginning of a text by this name
        settings["bos_token"] = tokenizer.template.start
    for name, content in (("tokenizer.json", saved), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n",
                                   encoding="utf-8")


def their_json(tokenizer: ImportedTokenizer) -> dict:
    """The object in a tokenizer.json of Hugging Face."""
    added = [{"id": i, "content": name, "special": name not in tokenizer.visible,
              "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
             for name, i in tokenizer.special.items()]
    splits = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
               "invert": False} for pattern in tokenizer.patterns]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    vocabulary = {to_characters(token): i for token, i in tokenizer.ranks.items()}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": tokenizer.whole_words,
             "vocab": vocabulary | tokenizer.special,
             "merges": [[to_characters(left), to_characters(right)]
                        for left, right in tokenizer.merges]}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
            "post_processor": None, "decoder": byte_level, "model": model}


# ---------------------------------------------------------------------- GGUF

def from_gguf(metadata: dict, size: int, form: str = "") -> ImportedTokenizer:
    """The tokenizer in the metadata of a GGUF file, of a model with `size` tokens. Raises
    ValueError, by the name of the field, for what is not served."""
    check_kinds("the metadata", metadata, GGUF_FIELDS)
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is {kind!r}; of GGUF byte-level BPE, gpt2, is "
                         "served; convert the model's Hugging Face folder instead")
    name = metadata.get("tokenizer.ggml.pre")
    if name not in GGUF_PATTERNS:
        raise ValueError(f"tokenizer.ggml.pre is {name!r}; served are {', '.join(GGUF_PATTERNS)}")
    spelled = metadata["tokenizer.ggml.tokens"]
    if not all(isinstance(token, str) for token in spelled):
        raise ValueError("tokenizer.ggml.tokens has entries that are no texts")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(spelled))
    if len(types) != len(spelled):
        raise ValueError(f"tokenizer.ggml.token_type has {len(types):,} entries, and there are "
                         f"{len(spelled):,} tokens")
    if len(set(spelled)) < len(spelled):
        raise ValueError("tokenizer.ggml.tokens has a token twice")
    control = {token: i for i, token in enumerate(spelled) if types[i] in (CONTROL, USER_DEFINED)}
    vocabulary = {token: i for i, token in enumerate(spelled) if types[i] == NORMAL}
    merges = [pair_of(merge) for merge in metadata.get("tokenizer.ggml.merges", ())]

    def named(role: str) -> str:
        i = metadata.get(f"tokenizer.ggml.{role}_token_id", -1)
        return spelled[i] if 0 <= i < len(spelled) else ""

    visible = [token for token in control if types[control[token]] == USER_DEFINED]
    template = template_of(metadata.get("tokenizer.chat_template"), control, named("bos"),
                           named("eos"), form)
    return assembled(vocabulary, size, control, merges, GGUF_PATTERNS[name], template,
                     named("eos"), named("padding"), nfc=name == "qwen2",
                     whole_words=name == "llama-bpe", visible=visible)


def to_gguf(tokenizer: ImportedTokenizer) -> dict:
    """The metadata of a GGUF file about a tokenizer. Raises ValueError for a pattern that
    llama.cpp has no name for."""
    if isinstance(tokenizer, LibraryTokenizer):
        raise ValueError("--to gguf: its vocabulary is no byte-level BPE; it goes out with --to hf")
    names = [name for name, patterns in GGUF_PATTERNS.items() if patterns == tokenizer.patterns]
    if not names:
        raise ValueError(f"GGUF names patterns instead of spelling them, and has no name for "
                         f"{tokenizer.patterns}")
    name_of_id = {i: name for name, i in tokenizer.special.items()}
    spelled = []
    types = []
    for i, token in enumerate(tokenizer.tokens):
        if i in name_of_id:
            spelled.append(name_of_id[i])
            types.append(USER_DEFINED if name_of_id[i] in tokenizer.visible else CONTROL)
        elif token is None:
            spelled.append(f"[UNUSED_{i}]")
            types.append(UNUSED)
        else:
            spelled.append(to_characters(token))
            types.append(NORMAL)
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": names[0],
            "tokenizer.ggml.tokens": spelled, "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": [f"{to_characters(left)} {to_characters(right)}"
                                      for left, right in tokenizer.merges],
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.bos_token_id": tokenizer.special.get(tokenizer.template.start,
                                                                 tokenizer.endoftext),
            "tokenizer.ggml.eos_token_id": tokenizer.end,
            "tokenizer.ggml.padding_token_id": tokenizer.pad,
            "tokenizer.chat_template": jinja_of(tokenizer.template)}
