r"""
Tokenizers of models that were trained elsewhere: byte-level BPE by its merges, with the ids, the
control tokens and the chat template that the model knows. convert.py finds them in tokenizer.json,
in GGUF or in ranks of tiktoken, and writes them as tokenizer.json of a model folder.

    1. SPLIT the text by the patterns, one after the other, into words.
    2. MERGE the bytes of each word: of all neighbours the pair that comes first in the list of
       merges, again and again. Ranks alone (tokenizer.py) would join pairs that no merge names.
    3. LOOK UP the id of each part. Ids are the model's own, wherever its control tokens stand.

Only the template writes control tokens: text that spells one is encoded like any other text.

    tokenizer = imported_tokenizer.load(saved)         # tokenizer.Tokenizer.load() calls it
    ids = tokenizer.prompt([{"role": "user", "content": "Hi"}])
"""
import heapq
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import regex

from messages import check_messages, check_open

CACHED = 200_000                      # words whose ids are remembered; a few dozen MB
REPLACEMENT = "\ufffd".encode()       # in the place of a byte that a vocabulary does not have


@dataclass
class Template:
    """The text around the turns of a conversation, control tokens spelled out.

    start stands before the first turn, before[role] and after[role] around the content of each;
    default_system is the system turn of conversations that begin without one, if it is not empty;
    trim: without blanks at both ends of a content.
    """
    start: str = ""
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    default_system: str = ""
    trim: bool = False


def merged_by(merges: dict[tuple[bytes, bytes], int], word: bytes) -> list[bytes]:
    """The parts of a word after all merges: the pair of the lowest number first, the leftmost of
    equals. n log n steps of n bytes, because a word may be a page of one letter.

    {(b"o", b"w"): 0, (b"l", b"ow"): 1}: b"low" -> [b"low"], b"lo" -> [b"l", b"o"].
    """
    parts: list[bytes | None] = [word[i:i + 1] for i in range(len(word))]
    n = len(parts)
    following = list(range(1, n + 1))
    previous = list(range(-1, n - 1))
    heap = []

    def offer(i: int) -> None:
        """Put the pair that begins at place i on the heap, if it is a merge."""
        if i >= 0 and following[i] < n:
            number = merges.get((parts[i], parts[following[i]]))
            if number is not None:
                heapq.heappush(heap, (number, i))

    for i in range(n - 1):
        offer(i)
    while heap:
        number, i = heapq.heappop(heap)
        j = following[i]
        # a pair that lost one of its parts meanwhile has another number, or none
        if parts[i] is None or j >= n or merges.get((parts[i], parts[j])) != number:
            continue
        parts[i] += parts[j]
        parts[j] = None
        following[i] = following[j]
        if following[i] < n:
            previous[following[i]] = i
        offer(previous[i])
        offer(i)
    return [part for part in parts if part is not None]


def split(text: str, patterns: Sequence[regex.Pattern]) -> list[str]:
    """The words of a text: its matches of the first pattern and what lies between them, each split
    by the next. Nothing is lost: the words joined are the text."""
    words = [text]
    for pattern in patterns:
        finer = []
        for word in words:
            end = 0
            for match in pattern.finditer(word):
                if match.start() > end:
                    finer.append(word[end:match.start()])
                if match.end() > match.start():
                    finer.append(match.group())
                end = match.end()
            if end < len(word):
                finer.append(word[end:])
        words = finer
    return words


class ImportedTokenizer:
    """The interface of tokenizer.Tokenizer, for the vocabulary and the template of another model.

    tokens: the bytes of each id; None for control tokens, and for rows of the embedding that no
    text reaches. special: {spelling: id} of the control tokens. Which of them ends a turn, pads and
    ends a document is said (end, pad, endoftext), because names and ids differ from model to model;
    pad is never the end of a turn, or a model would not learn to end one.
    """

    def __init__(self, tokens: list[bytes | None], special: dict[str, int],
                 merges: list[tuple[bytes, bytes]], patterns: list[str], template: Template,
                 end: str, pad: str, endoftext: str, nfc: bool = False,
                 whole_words: bool = False, visible: Iterable[str] = ()):
        """nfc: texts are normalised first (Qwen). whole_words: a word that is a token is that
        token, whatever the merges say (Llama 3). visible: the control tokens that are read as
        text, as <think> is. Raises ValueError for parts that contradict one another."""
        self.tokens = tokens
        self.merges = merges
        self.patterns = patterns
        self.nfc = nfc
        self.whole_words = whole_words
        self.ranks = {}                                # ids of ordinary tokens
        for i, token in enumerate(tokens):
            if token is not None and self.ranks.setdefault(token, i) != i:
                raise ValueError(f"token {token!r} stands twice, at {self.ranks[token]} and {i}")
        self.number_of = {pair: number for number, pair in enumerate(merges)}
        for left, right in merges:
            if left + right not in self.ranks:
                raise ValueError(f"the merge of {left!r} and {right!r} makes no token of the "
                                 "vocabulary")
        if REPLACEMENT not in self.ranks and len(REPLACEMENT) != sum(
                bytes([byte]) in self.ranks for byte in REPLACEMENT):
            raise ValueError("the vocabulary does not have the bytes of U+FFFD, which stand for "
                             "those that it lacks")
        self.compiled = []
        for pattern in patterns:
            if not isinstance(pattern, str) or len(pattern) > 10_000 or "(?R" in pattern:
                raise ValueError(f"the pattern {str(pattern)[:60]!r} is none that is served")
            try:
                self.compiled.append(regex.compile(pattern))
            except (regex.error, RecursionError) as error:
                raise ValueError(f"the pattern {pattern[:60]!r} is none ({error})") from None
        self.known: dict[str, list[int]] = {}          # ids of the words met so far
        self.take_roles(special, template, end, pad, endoftext, visible)

    def take_roles(self, special: dict[str, int], template: Template, end: str, pad: str,
                   endoftext: str, visible: Iterable[str]) -> None:
        """The control tokens, what they are for, and the template; self.tokens is there. Raises
        ValueError for parts that contradict one another."""
        self.special = special
        self.template = template
        self.visible = sorted(visible)
        self.vocab_size = len(self.tokens)
        self.n_virtual = 0                             # tokens before a conversation (lora.py)
        for name, i in special.items():
            if not name or name.encode("utf-8", errors="replace").decode() != name:
                raise ValueError(f"the control token {name!r} is empty or no text")
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"control token {name} has the id {i}, which is not in 0 .. "
                                 f"{self.vocab_size - 1}")
            if self.tokens[i] is not None:
                raise ValueError(f"control token {name} has the id {i} of {self.tokens[i]!r}")
        if len(set(special.values())) < len(special):
            raise ValueError("two control tokens have the same id")
        if unknown := {*self.visible} - special.keys():
            raise ValueError(f"visible tokens {sorted(unknown)} are none of the control tokens")
        self.roles = {"end": end, "pad": pad, "endoftext": endoftext}
        for role, name in self.roles.items():
            if name not in special:
                raise ValueError(f"{role} is {name!r}, which is none of the control tokens "
                                 f"{' '.join(special)}")
        self.end = special[end]
        self.pad = special[pad]
        self.endoftext = special[endoftext]
        if self.pad == self.end:
            raise ValueError(f"{pad} ends a turn and cannot pad")
        # longest first, because one name may begin with another
        names = sorted(special, key=len, reverse=True)
        self.control = regex.compile("|".join(map(regex.escape, names)))
        self.opening = self.opening_ids()
        if not set(self.opening) & set(special.values()):
            raise ValueError("the template opens the assistant's turn without a control token, so "
                             "that a user could open one by typing it; such templates are not "
                             "served")

    def __eq__(self, other) -> bool:
        return isinstance(other, ImportedTokenizer) and self.saved() == other.saved()

    @property
    def named(self) -> list[str]:
        return list(self.special)

    def extended(self, texts: Iterable[str], n: int):
        """Raises ValueError: there is no place behind the ids of another model's vocabulary."""
        raise ValueError("--new_words: the vocabulary of a model from elsewhere stays as it is; "
                         "leave the option out")

    # ------------------------------------------------------------------ text

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Never a control token, whatever the text spells. A byte that the
        vocabulary lacks becomes U+FFFD."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        ids = []
        for word in split(text, self.compiled):
            found = self.known.get(word)
            if found is None:
                found = self.ids_of(word.encode("utf-8", errors="replace"))
                if len(self.known) >= CACHED:
                    self.known.clear()
                self.known[word] = found
            ids += found
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def ids_of(self, word: bytes) -> list[int]:
        if self.whole_words and word in self.ranks:
            return [self.ranks[word]]
        ids = []
        for part in merged_by(self.number_of, word):
            if part not in self.ranks:                 # a single byte, because merges make tokens
                ids += self.ids_of(REPLACEMENT)
            else:
                ids.append(self.ranks[part])
        return ids

    def pieces(self, token: bytes) -> list[int]:
        """Ids of the bytes of one word, which need not be whole characters."""
        return self.ids_of(token)

    def token_bytes(self, i: int) -> bytes:
        """What an id stands for; nothing for a control token."""
        return self.tokens[i] or b""

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """Text of the ids; invalid UTF-8 becomes U+FFFD, control tokens are dropped or spelled,
        visible ones spelled. Raises ValueError for an id outside the vocabulary."""
        names = {self.special[name]: name for name in (self.special if specials else self.visible)}
        found = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is not in 0 .. {self.vocab_size - 1}")
            found.append(names[i].encode() if i in names else self.token_bytes(i))
        return b"".join(found).decode("utf-8", errors="replace")

    # ------------------------------------------------------------------ conversations

    def piece(self, text: str) -> list[int]:
        """Ids of a piece of the template, in which the names of control tokens are meant."""
        ids = []
        end = 0
        for match in self.control.finditer(text):
            ids += [*self.encode(text[end:match.start()]), self.special[match.group()]]
            end = match.end()
        return ids + self.encode(text[end:])

    def opening_ids(self) -> list[int]:
        """What opens the assistant's turn."""
        return self.piece(self.template.before.get("assistant", ""))

    def ids_of_spelled(self, spelled: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of texts, each of the template or not; in the template's control tokens are meant."""
        ids = []
        for text, is_template in spelled:
            ids += self.piece(text) if is_template else self.encode(text)
        return ids

    def texts_of(self, messages: Sequence[dict]) -> list[tuple[str, bool]]:
        """Messages -> the texts of the model's own template, for ids_of_spelled(). Raises
        ValueError, naming the message, for what is no conversation, and for a role that the
        template does not have."""
        check_messages(messages)
        template = self.template
        if template.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": template.default_system}, *messages]
        texts = [(template.start, True)]
        for i, message in enumerate(messages):
            role = message["role"]
            if role not in template.before:
                raise ValueError(f"message {i} has role {role!r}, for which this model's template "
                                 f"has no turn; it has {', '.join(template.before)}")
            content = message["content"]
            texts += [(template.before[role], True),
                      (content.strip() if template.trim else content, False),
                      (template.after[role], True)]
        return texts

    def virtual(self) -> list[int]:
        """The ids of lora.py's tokens before a conversation."""
        return [self.vocab_size + i for i in range(self.n_virtual)]

    def conversation(self, messages: Sequence[dict]) -> list[int]:
        """Messages -> ids. Raises ValueError as texts_of() does."""
        return self.virtual() + self.ids_of_spelled(self.texts_of(messages))

    def response_mask(self, ids: Sequence[int]) -> list[int]:
        """The loss mask of a conversation's ids: 1 where the assistant writes, the end of its turn
        included. The ids alone tell, because no text opens a turn (Tokenizer.response_mask)."""
        ids = list(ids)
        n = len(self.opening)
        mask = []
        assistant_writes = False
        for i, token in enumerate(ids):
            mask.append(int(assistant_writes))
            if token == self.end:
                assistant_writes = False
            elif token == self.opening[-1] and ids[max(0, i + 1 - n):i + 1] == self.opening:
                assistant_writes = True
        return mask

    def chat(self, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
        """A conversation -> (ids, loss mask), equally long."""
        ids = self.conversation(messages)
        return ids, self.response_mask(ids)

    def prompt(self, messages: Sequence[dict]) -> list[int]:
        """The conversation so far and the opening of the assistant's turn."""
        texts = self.texts_of(messages)
        check_open(messages)
        texts.append((self.template.before["assistant"], True))
        return self.virtual() + self.ids_of_spelled(texts)

    # ------------------------------------------------------------------ files

    def saved(self) -> dict:
        """What load() takes."""
        def spelled(token: bytes) -> str:
            return token.decode("latin-1")             # a character a byte, since JSON has no bytes

        return self.saved_roles() | {
            "nfc": self.nfc, "whole_words": self.whole_words, "patterns": self.patterns,
            "tokens": [None if token is None else spelled(token) for token in self.tokens],
            "merges": [[spelled(left), spelled(right)] for left, right in self.merges]}

    def saved_roles(self) -> dict:
        return {"imported": True, **self.roles, "visible": self.visible,
                "template": asdict(self.template), "special": self.special}

    def save(self, folder: str | Path) -> None:
        """Write folder/tokenizer.json, whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "tokenizer.json.tmp"
        temporary.write_text(json.dumps(self.saved(), indent=0), encoding="utf-8")
        temporary.replace(folder / "tokenizer.json")


# What saved_roles() has.
ROLE_FIELDS = {"special": dict, "template": dict, "end": str, "pad": str, "endoftext": str,
               "visible": list}


def check_fields(saved: dict, kinds: dict[str, type]) -> None:
    """Raises ValueError for a field that is missing or of another type."""
    for name, kind in kinds.items():
        if not isinstance(saved.get(name), kind):
            found = type(saved[name]).__name__ if name in saved else "missing"
            raise ValueError(f'"{name}" must be a {kind.__name__}; found: {found}')


def load(saved: dict) -> ImportedTokenizer:
    """The tokenizer of saved(). Raises ValueError for an object that is not whole."""
    check_fields(saved, ROLE_FIELDS | {"tokens": list, "merges": list, "patterns": list,
                                       "nfc": bool, "whole_words": bool})
    try:
        tokens = [None if token is None else token.encode("latin-1") for token in saved["tokens"]]
        # Parts of merges are tokens, nearly all: one object for both saves megabytes.
        same = {token: token for token in tokens}
        merges = []
        for pair in saved["merges"]:
            left, right = (part.encode("latin-1") for part in pair)
            merges.append((same.get(left, left), same.get(right, right)))
        template = Template(**saved["template"])
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"its tokens, merges or template are damaged ({error})") from None
    return ImportedTokenizer(tokens, saved["special"], merges, saved["patterns"], template,
                             saved["end"], saved["pad"], saved["endoftext"], saved["nfc"],
                             saved["whole_words"], saved["visible"])
