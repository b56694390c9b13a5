"""
Tokenizers that are no byte-level BPE, run by Hugging Face's `tokenizers` (optional: pip install
tokenizers): SentencePiece's BPE with byte fallback, as of TinyLlama and Zephyr, and Unigram. Roles,
template and mask are those of imported_tokenizer.py.

One thing differs in a conversation. SentencePiece puts a blank before each text, and a text is
what lies between two control tokens: the template's words and what the user wrote are one.
"""
import json
import re
from collections.abc import Iterable

from imported_tokenizer import ROLE_FIELDS, ImportedTokenizer, Template, check_fields

BLANK = "\u2581"                       # how SentencePiece spells " " within a token
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def opened(theirs: dict):
    """A tokenizer of the package, which encodes text that spells a control token as text. Raises
    ValueError for what it does not read and, with the line that installs it, without it."""
    kind = theirs["model"].get("type", "BPE")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(f"model.type is {kind}, and this is no byte-level BPE; it is run by a "
                         "package that is not installed: pip install tokenizers") from None
    if theirs["model"].get("dropout"):
        raise ValueError(f"model.dropout is {theirs['model']['dropout']!r}, which is not served")
    try:
        tokenizer = Tokenizer.from_str(json.dumps(theirs))
        tokenizer.encode("a")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:                     # its panics are no Exception
        raise ValueError(f"model.type is {kind}, and the package tokenizers does not read it "
                         f"({str(error)[:100]})") from None
    tokenizer.no_truncation()                          # what some have left in their file
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def continuing(theirs: dict) -> dict:
    """The same for a text that does not come first: some put a blank before the first alone."""
    text = json.dumps(theirs.get("pre_tokenizer"))
    text = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    return theirs | {"pre_tokenizer": json.loads(text)}


def token_bytes_of(spelling: str) -> bytes:
    """What a token stands for: "▁the" -> b" the", "<0x0A>" -> b"\\n"."""
    byte = BYTE.fullmatch(spelling)
    if byte:
        return bytes([int(byte[1], 16)])
    return spelling.replace(BLANK, " ").encode()


class LibraryTokenizer(ImportedTokenizer):
    """The interface of ImportedTokenizer, for what `tokenizers` has in its own file.

    theirs: the object in their tokenizer.json. size: rows of the model's embedding.
    """

    def __init__(self, theirs: dict, size: int, special: dict[str, int], template: Template,
                 end: str, pad: str, endoftext: str, visible: Iterable[str] = ()):
        """Raises ValueError for parts that contradict one another, for a kind of vocabulary whose
        tokens are no texts, and without the package."""
        self.theirs = theirs
        self.first = opened(theirs)
        rest = continuing(theirs)
        self.later = self.first if rest == theirs else opened(rest)
        vocabulary = self.first.get_vocab(with_added_tokens=True)
        highest = max(vocabulary.values())
        if highest >= size:
            raise ValueError(f"the tokenizer has the id {highest}, and the model {size} tokens")
        for name, i in special.items():
            if vocabulary.get(name) != i:
                raise ValueError(f"the control token {name} has the id {i} among the added tokens, "
                                 f"and {vocabulary.get(name)} in the vocabulary")
        if not any(BLANK in token for token in vocabulary):
            kind = theirs["model"].get("type", "BPE")
            raise ValueError(f"model.type is {kind} without {BLANK} for blanks, which is not "
                             "served; byte-level BPE and SentencePiece's vocabularies are")
        tokens: list[bytes | None] = [None] * size
        for token, i in vocabulary.items():
            if token not in special:
                if tokens[i] is not None:
                    raise ValueError(f"the id {i} of the token {token!r} stands twice")
                tokens[i] = token_bytes_of(token)
        self.tokens = tokens
        self.take_roles(special, template, end, pad, endoftext, visible)
        # Two tokens may be the same bytes, "a" and <0x61>: the first is meant.
        self.ranks = {}
        for i, token in enumerate(tokens):
            if token is not None:
                self.ranks.setdefault(token, i)

    def __setstate__(self, state: dict) -> None:
        """A copy, or what another process receives: the package forgets this setting."""
        self.__dict__ = state
        self.first.encode_special_tokens = True
        self.later.encode_special_tokens = True

    # ------------------------------------------------------------------ text

    def encode(self, text: str, comes_first: bool = True) -> list[int]:
        """Ids of a text, with the blank before it. Never a control token."""
        tokenizer = self.first if comes_first else self.later
        text = text.encode("utf-8", errors="replace").decode()     # without half surrogates
        return tokenizer.encode(text, add_special_tokens=False).ids

    def pieces(self, token: bytes) -> list[int]:
        return self.encode(token.decode("utf-8", errors="replace").removeprefix(" "))

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """Like ImportedTokenizer.decode(), without the blank before it."""
        return super().decode(ids, specials).removeprefix(" ")

    # ------------------------------------------------------------------ conversations

    def opening_ids(self) -> list[int]:
        """What opens the assistant's turn, from the control token before it on: <|assistant|> is
        an ordinary text in Zephyr's vocabulary, and only </s> before it makes it an opening."""
        around = self.template.after.get("user", "") + self.template.before.get("assistant", "")
        ids = self.ids_of_spelled([(around, True)])
        controls = [place for place, i in enumerate(ids) if i in self.special.values()]
        return ids[controls[-1]:] if controls else ids

    def ids_of_spelled(self, spelled: Iterable[tuple[str, bool]]) -> list[int]:
        ids = []
        text = ""
        for part, is_template in spelled:
            end = 0
            for match in self.control.finditer(part) if is_template else ():
                text += part[end:match.start()]
                if text:
                    ids += self.encode(text, not ids)
                ids.append(self.special[match.group()])
                text = ""
                end = match.end()
            text += part[end:]
        return ids + self.encode(text, not ids) if text else ids

    # ------------------------------------------------------------------ files

    def saved(self) -> dict:
        return self.saved_roles() | {"library": self.theirs, "size": self.vocab_size}


def load(saved: dict) -> LibraryTokenizer:
    """The tokenizer of saved(). Raises ValueError for an object that is not whole."""
    check_fields(saved, ROLE_FIELDS | {"library": dict, "size": int})
    try:
        template = Template(**saved["template"])
    except TypeError as error:
        raise ValueError(f"its template is damaged ({error})") from None
    return LibraryTokenizer(saved["library"], saved["size"], saved["special"], template,
                            saved["end"], saved["pad"], saved["endoftext"], saved["visible"])
