r"""
Text <-> token ids: byte-level BPE, trained here, encoded and decoded by tiktoken (001 sections 1.6
and 3.4).

Byte-pair encoding starts from the 256 bytes and repeats one step until the vocabulary is full:
the pair of neighbours that is most frequent in the corpus becomes one new token. A token's id is
its rank, the step that made it; encoding a text replays the steps in that order.

    1. SPLIT the text into words (GPT-4's pattern); no token crosses the border of a word.
    2. COUNT every distinct word once, then every pair in it, times the count of the word.
    3. MERGE the most frequent pair where it stands and correct the counts of its neighbours.
       Repeat until the vocabulary is full or no pair is left.

Special tokens get the ids after the last rank. Only the chat template writes them: text that
spells one is encoded like any other text, so that no word of a user becomes a control token.

    python tokenizer.py --data world --vocab_size 1024 --out out/bpe        # the embedded world
    python tokenizer.py --data book.txt --vocab_size 4096 --out out/bpe     # 10 MB: about 2 s

    tokenizer = Tokenizer.load("out/bpe")
    ids = tokenizer.encode("A bear.")
    ids, loss_mask = tokenizer.chat([{"role": "user", "content": "Hi"},
                                     {"role": "assistant", "content": "Hello!"}])
"""
import argparse
import functools
import heapq
import json
import math
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import regex
import tiktoken
from tqdm import tqdm

import imported_tokenizer
import library_tokenizer
from messages import check_messages, check_open

MAX_BLANKS = 500_000                          # tiktoken's stack holds between 700,000 and 1,000,000
# GPT-4's: contractions, words with one leading space or sign, numbers of up to three digits,
# punctuation, line breaks, spaces. Every character falls into exactly one word.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
N_SPECIAL = 16      # ids set aside for special tokens; later stages name the free ones
Token = bytes
Pair = tuple[Token, Token]           # neighbours: left, right


# ---------------------------------------------------------------------- training

def count_words(texts: Iterable[str]) -> Counter[str]:
    """["a cat, a hat"] -> {"a": 1, " cat": 1, ",": 1, " a": 1, " hat": 1}."""
    if isinstance(texts, str):
        raise ValueError("texts is one string; give a list of strings")
    splitter = regex.compile(PATTERN)
    words = Counter()
    for text in texts:
        matches = splitter.finditer(text)
        # map and itemgetter, because they run this loop over every word of the corpus in C
        words.update(map(itemgetter(0), matches))
    return words


def lay_out(word_counts: dict[str, int],
            ranks: dict[Token, int] | None = None) -> tuple[list[Token | None], list[int]]:
    """All distinct words in one row, byte by byte, None between words; at each place the count of
    its word. {"ab": 3} -> [None, b"a", b"b", None], [0, 3, 3, 3]. ranks: merges made before."""
    row = [None]
    weights = [0]
    for word, count in word_counts.items():
        # "replace": half a surrogate pair has no UTF-8 and becomes a question mark
        letters = [bytes([byte]) for byte in word.encode(errors="replace")]
        if ranks:
            letters = at_both_ends(merged(letters, ranks))
        row += letters
        row.append(None)
        weights += [count] * (len(letters) + 1)
    return row, weights


def at_both_ends(tokens: list[Token]) -> list[Token | None]:
    """Each token at the places of its first and its last byte, None at the bytes between.

    [b"a", b"low"] -> [b"a", b"low", None, b"low"]
    """
    row = []
    for token in tokens:
        row.append(token)
        if len(token) > 1:
            row += [None] * (len(token) - 2)
            row.append(token)
    return row


def merged(parts: list[Token], ranks: dict[Token, int]) -> list[Token]:
    """A word's parts after all known merges: of all neighbours the pair of the lowest rank becomes
    one token, again and again. tiktoken does this to every word that is encoded.

    Ranks of ow 256 and low 257: [b"l", b"o", b"w"] -> [b"l", b"ow"] -> [b"low"].
    """
    parts = list(parts)
    while len(parts) > 1:
        pair_ranks = [ranks.get(left + right, math.inf) for left, right in pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest == math.inf:                    # no neighbours make a known token
            return parts
        i = pair_ranks.index(lowest)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def count_pairs(row: list[Token | None],
                weights: list[int]) -> tuple[dict[Pair, int], dict[Pair, list[int]]]:
    """The row of lay_out -> {pair: how often it occurs}, {pair: places of its left token}."""
    counts = defaultdict(int)
    places = defaultdict(list)
    i = 1                                         # place 0 is the None before the first word
    while i < len(row):
        left = row[i]
        if left is None:                          # the border of two words
            i += 1
            continue
        after = i + len(left)
        right = row[after]
        if right is not None:
            counts[left, right] += weights[i]
            places[left, right].append(i)
        i = after
    return counts, places


def merge(pair: Pair, row: list[Token | None], weights: list[int],
          counts: dict[Pair, int], places: dict[Pair, list[int]]) -> set[Pair]:
    """Make one token of the pair wherever it stands; bring counts and places up to date.

    Returns the pairs with the new token: no other count has grown. A token stands at its first
    and at its last byte, so that neighbours are found without a search: merging o + w and then
    l + ow turns l o w into l ow ow and low None low.
    """
    left, right = pair
    token = left + right
    new_pairs = set()
    for i in places.pop(pair):                    # in order: a a a becomes aa a, not a aa
        middle = i + len(left)                    # where the right token begins
        end = i + len(token)
        if row[i] != left or row[middle] != right:
            continue                              # gone: an earlier merge took left or right
        # the new token at its first and last byte, nothing at its middle
        row[middle] = None
        row[i] = token
        row[end - 1] = token
        # the neighbour on the left: (before, left) is now (before, token)
        before = row[i - 1]
        if before is not None:
            counts[before, left] -= weights[i]
            counts[before, token] += weights[i]
            places[before, token].append(i - len(before))
            new_pairs.add((before, token))
        # the neighbour on the right: (right, after) is now (token, after)
        after = row[end]
        if after is not None:
            counts[right, after] -= weights[i]
            counts[token, after] += weights[i]
            places[token, after].append(i)
            new_pairs.add((token, after))
    return new_pairs


def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool = False,
              ranks: dict[Token, int] | None = None) -> dict[Token, int]:
    """Learn the ranks: 256 bytes, then merges in the order in which they were made; or go on from
    the ranks of another corpus.

    vocab_size counts the N_SPECIAL special tokens too; fewer ranks come back if every word of the
    texts has become one token before. Of equally frequent pairs the smallest (left, right), as
    bytes, goes first: the ranks depend on the texts alone. Raises ValueError for a vocab_size
    without room for the bytes. Source: Sennrich et al. 2016, on bytes as in GPT-2.
    """
    if vocab_size < 256 + N_SPECIAL:
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {256 + N_SPECIAL}: "
                         f"256 bytes and {N_SPECIAL} special tokens")
    # 1. SPLIT the texts into words
    word_counts = count_words(texts)
    # 2. COUNT the pairs of neighbours in the distinct words
    row, weights = lay_out(word_counts, ranks)
    counts, places = count_pairs(row, weights)
    # a heap, so that the next pair is found without a look at all: most frequent, then smallest
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)

    # 3. MERGE the most frequent pair, again and again
    ranks = dict(ranks) if ranks else {bytes([byte]): byte for byte in range(256)}
    n_ranks = vocab_size - N_SPECIAL
    bar = tqdm(total=n_ranks - len(ranks), desc="merging", unit=" pairs", disable=not progress)
    while heap and len(ranks) < n_ranks:
        # the pair that was the most frequent when it was put on the heap
        negative, pair = heapq.heappop(heap)
        # if merges since then took some of its places, it goes back with the rest
        if -negative > counts[pair]:
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        # a count of zero: no pair is left, because every word is one token
        if negative == 0:
            break
        # mint a new token: its rank is the next free one (given ranks may know it already)
        left, right = pair
        ranks.setdefault(left + right, len(ranks))
        # replace the pair by the token in all words; pairs with the new token join the heap
        for new_pair in merge(pair, row, weights, counts, places):
            heapq.heappush(heap, (-counts[new_pair], new_pair))
        bar.update()
    bar.close()
    return ranks


# ---------------------------------------------------------------------- encoding, decoding, chat

class Tokenizer:
    """Ids: 0 .. len(ranks) - 1 from the ranks, the special tokens right after.

    vocab_size counts both. special: {spelling: id}; the six that every stage needs are attributes
    too (endoftext, pad, system, user, assistant, end). Free places up to N_SPECIAL are filled with
    <|reserved_6|>, <|reserved_7|>, ..., so that a stage that names one keeps all ids.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN,
                 special_tokens: Sequence[str] = SPECIAL_TOKENS):
        """Raises ValueError for ranks or special tokens that cannot name every text uniquely."""
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"the ranks lack the single byte {missing[0]} (and {len(missing) - 1} "
                             "more); all 256 are needed to encode every text")
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"the ranks of {len(ranks)} tokens are not 0 .. {len(ranks) - 1}, "
                             "each once")
        lacking = [name for name in SPECIAL_TOKENS if name not in special_tokens]
        if lacking or len(set(special_tokens)) < len(special_tokens):
            raise ValueError(f"special tokens {list(special_tokens)}: each must stand once, and "
                             f"{' '.join(lacking or SPECIAL_TOKENS)} must be among them")
        names = list(special_tokens)
        while len(names) < N_SPECIAL:
            names.append(f"<|reserved_{len(names)}|>")

        self.ranks = ranks
        self.pattern = pattern
        # special ids follow the last rank, in the order of their names
        self.special = {name: i for i, name in enumerate(names, start=len(ranks))}
        self.vocab_size = len(ranks) + len(names)
        self.n_virtual = 0                            # tokens before a conversation (lora.py)
        self.endoftext = self.special["<|endoftext|>"]
        self.pad = self.special["<|pad|>"]
        self.system = self.special["<|system|>"]
        self.user = self.special["<|user|>"]
        self.assistant = self.special["<|assistant|>"]
        self.end = self.special["<|end|>"]
        self.encoding = tiktoken.Encoding("lifecycle", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=self.special)
        lost = [c for c in one_of_each_kind() if self.encoding.decode(
            self.encoding.encode_ordinary(c)) != c]
        if lost:
            raise ValueError(f"the pattern does not match {lost[0]!r}, which would be lost from "
                             f"every text (and {len(lost) - 1} more)")

    def __eq__(self, other) -> bool:
        if not isinstance(other, Tokenizer):
            return False
        return (self.ranks == other.ranks and self.pattern == other.pattern
                and self.special == other.special)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, progress: bool = False) -> "Tokenizer":
        return cls(train_bpe(texts, vocab_size, progress))

    def extended(self, texts: Iterable[str], n: int) -> "Tokenizer":
        """The same tokens and up to n more, merged in other texts; special ones move up."""
        vocab_size = len(self.ranks) + n + N_SPECIAL
        ranks = train_bpe(texts, vocab_size, ranks=self.ranks)
        return Tokenizer(ranks, self.pattern, self.named)

    @property
    def named(self) -> list[str]:
        """The special tokens that mean something: all but the reserved places."""
        return [name for name in self.special if not name.startswith("<|reserved_")]

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """No merges: the ids of a text are its UTF-8 bytes."""
        return cls({bytes([byte]): byte for byte in range(256)})

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Never a special one, whatever the text spells. Raises ValueError for more
        than MAX_BLANKS blanks in a row."""
        check_blanks(text)
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """encode() of each. One thread: tiktoken's threads are slower on two cores."""
        return [self.encode(text) for text in texts]

    def pieces(self, token: bytes) -> list[int]:
        """Ids of the bytes of one word, which need not be whole characters."""
        letters = [bytes([byte]) for byte in token]
        return [self.ranks[part] for part in merged(letters, self.ranks)]

    def token_bytes(self, i: int) -> bytes:
        """What an id stands for; of a special token its name."""
        return self.encoding.decode_single_token_bytes(i)

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """Text of the ids; invalid UTF-8 becomes U+FFFD, special tokens are dropped or spelled.

        Raises ValueError for an id outside the vocabulary."""
        ids = list(ids)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is not in 0 .. {self.vocab_size - 1}")
        # special ids are all above the ranks
        if not specials:
            ids = [i for i in ids if i < len(self.ranks)]
        return self.encoding.decode(ids)

    def conversation(self, messages: Sequence[dict]) -> list[int]:
        """Messages -> ids in the chat template (001 section 3.4, no added whitespace):

            <|user|>Hi<|end|><|assistant|>Hello!<|end|>

        messages: [{"role": "system" | "user" | "assistant", "content": str}, ...]. Raises
        ValueError, naming the message, for anything else.
        """
        check_messages(messages)
        ids = [self.vocab_size + i for i in range(self.n_virtual)]
        for message in messages:
            ids.append(self.special[f"<|{message['role']}|>"])
            ids += self.encode(message["content"])
            ids.append(self.end)
        return ids

    def response_mask(self, ids: Sequence[int]) -> list[int]:
        """The loss mask of a conversation's ids: 1 where the assistant writes.

            <|user|>Hi<|end|><|assistant|>Hello!<|end|>
               0     0   0         0        1      1

        The ids alone tell, because no text becomes a role's token: only the template writes them.
        """
        mask = []
        assistant_writes = False
        for i in ids:
            # <|end|> is a target, because the assistant has to learn when to stop; <|assistant|> is
            # none, because generation begins after it
            mask.append(int(assistant_writes))
            if i == self.assistant:
                assistant_writes = True
            elif i == self.end:
                assistant_writes = False
        return mask

    def chat(self, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
        """A conversation -> (ids, loss mask), equally long."""
        ids = self.conversation(messages)
        return ids, self.response_mask(ids)

    def prompt(self, messages: Sequence[dict]) -> list[int]:
        """The conversation so far and <|assistant|>, after which the model writes its answer."""
        ids = self.conversation(messages)
        check_open(messages)
        return [*ids, self.assistant]

    def save(self, folder: str | Path) -> None:
        """Write folder/tokenizer.json, whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # latin-1 writes each byte as the character of that number, since JSON has no bytes
        in_order = sorted(self.ranks, key=self.ranks.get)
        tokens = [token.decode("latin-1") for token in in_order]
        saved = {"pattern": self.pattern, "special_tokens": list(self.special), "ranks": tokens}
        text = json.dumps(saved, indent=0)
        # renamed when it is complete, so that a full disk leaves the former file whole
        temporary = folder / "tokenizer.json.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / "tokenizer.json")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read folder/tokenizer.json, or the file itself: of a model from elsewhere an
        ImportedTokenizer. Raises ValueError if it is not whole."""
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: no tokenizer there ({error.strerror}); train one with "
                             "python tokenizer.py") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON ({str(error)[:100]})") from None
        try:
            if isinstance(saved, dict) and "library" in saved:
                return library_tokenizer.load(saved)
            if isinstance(saved, dict) and saved.get("imported"):
                return imported_tokenizer.load(saved)
            return cls(*parse_saved(saved))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


@functools.lru_cache
def one_of_each_kind() -> list[str]:
    """A character of each Unicode category, and the blanks that patterns treat differently."""
    found = {}
    for number in range(0x3000):
        found.setdefault(unicodedata.category(chr(number)), chr(number))
    found.pop("Cs", None)                         # halves of surrogate pairs are no text
    return [*found.values(), "\n", "\r\n", "\t", "  ", "'", "7"]


def check_blanks(text: str) -> None:
    """Raises ValueError for more than MAX_BLANKS blanks in a row, on which tiktoken dies."""
    if len(text) > MAX_BLANKS:
        # of 1,000 and more, because to look at every word would take long
        longest = max((len(run[0]) for run in regex.finditer(r"\s{1000,}", text)), default=0)
        if longest > MAX_BLANKS:
            raise ValueError(f"{longest:,} blanks in a row; at most {MAX_BLANKS:,} can be "
                             "tokenized")


def parse_saved(saved: object) -> tuple[dict[bytes, int], str, list[str]]:
    """The object in tokenizer.json -> (ranks, pattern, special tokens).

    "ranks" lists the tokens in order, each byte as the character of that number (latin-1)."""
    if not isinstance(saved, dict):
        raise ValueError("not an object with pattern, special_tokens and ranks")
    for key, kind in (("pattern", str), ("special_tokens", list), ("ranks", list)):
        if not isinstance(saved.get(key), kind):
            found = type(saved[key]).__name__ if key in saved else "missing"
            raise ValueError(f'"{key}" must be a {kind.__name__}; found: {found}')
    for key in ("special_tokens", "ranks"):
        for i, token in enumerate(saved[key]):
            if not isinstance(token, str) or not token:
                raise ValueError(f'"{key}" entry {i} is {token!r}; it must be a string, not empty')
    ranks: dict[bytes, int] = {}
    for i, token in enumerate(saved["ranks"]):
        # U+0000 to U+00FF stand for one byte each (latin-1)
        if max(token) > "\xff":
            raise ValueError(f'"ranks" entry {i} is {token!r}; characters must be bytes, U+0000 to '
                             "U+00FF")
        if ranks.setdefault(token.encode("latin-1"), i) != i:
            raise ValueError(f'"ranks" entry {i}, {token!r}, stands twice')
    return ranks, saved["pattern"], saved["special_tokens"]


# ---------------------------------------------------------------------- command line

def hold_out(texts: list[str]) -> tuple[list[str], list[str]]:
    """(for training, to measure on): each 20th text, or of few texts the last 5 % of each."""
    if len(texts) >= 20:
        heldout = texts[19::20]
        train = [text for i, text in enumerate(texts) if i % 20 != 19]
        return train, heldout
    train = []
    heldout = []
    for text in texts:
        cut = len(text) - len(text) // 20
        train.append(text[:cut])
        if text[cut:]:                            # a text below 20 characters has no 5 %
            heldout.append(text[cut:])
    return train, heldout


def main(args: argparse.Namespace) -> Tokenizer:
    """Train, save and measure one tokenizer. Raises ValueError for bad input, before training."""
    # not above: whoever imports a tokenizer needs neither the readers nor the world
    from plumbing import claim
    from readers import read_documents, world_named

    if args.out.is_file() or not (claim.is_free(args.out) or args.overwrite):
        raise ValueError(f"{args.out} is not empty; name another folder or give --overwrite")
    claim.lock(args.out)
    claim.refuse_foreign(args.out, ["tokenizer.json"])
    for name in claim.written(args.out):
        if name != "tokenizer.json":              # of a model or of shards, which need their own
            raise ValueError(f"{args.out}: the tokenizer there belongs to {name}; name another "
                             "folder")
    megabytes = args.max_mb
    if not megabytes and world_named(args.data):
        megabytes = 10                            # because a world has no end
    max_bytes = int(megabytes * 1e6) if megabytes else None
    documents = list(tqdm(read_documents(args.data, max_bytes), "reading", unit=" documents"))
    texts, heldout = hold_out(documents)

    start = time.perf_counter()
    training_texts = tqdm(texts, "counting words", unit=" documents")
    tokenizer = Tokenizer.train(training_texts, args.vocab_size, progress=True)
    seconds = time.perf_counter() - start
    claim.add(args.out, "tokenizer.json")
    tokenizer.save(args.out)
    claim.unlock(args.out)

    # few short texts leave nothing to hold out: measured on the training texts, and said so
    measured = heldout or texts
    kind = "held-out" if heldout else "training"
    n_bytes = sum(len(text.encode(errors="replace")) for text in measured)
    n_tokens = sum(len(ids) for ids in tokenizer.encode_batch(measured))
    bytes_per_token = n_bytes / max(1, n_tokens)
    print(f"{args.out / 'tokenizer.json'}: vocabulary {tokenizer.vocab_size} (256 bytes, "
          f"{len(tokenizer.ranks) - 256} merges, {len(tokenizer.special)} special tokens), "
          f"{seconds:.1f} s, {bytes_per_token:.3f} bytes per token on "
          f"{n_bytes:,} bytes of {kind} text")
    if tokenizer.vocab_size < args.vocab_size:
        print(f"fewer than --vocab_size {args.vocab_size}: every word has become one token")
    return tokenizer


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="world", help="a text file, a folder, JSONL with "
                        "`text`, or the embedded world: world, world:SEED (default: world)")
    parser.add_argument("--vocab_size", type=int, default=1024, help="tokens in all: 256 bytes, "
                        f"{N_SPECIAL} special tokens, merges for the rest. More: shorter sequences "
                        "but a wider embedding and rarer tokens (default: 1024)")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json")
    parser.add_argument("--max_mb", type=float, default=0, help="stop reading after so many "
                        "megabytes (default: 0, everything; 10 of a world, which has no end)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier tokenizer "
                        "there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"tokenizer.py: {error}")
