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
import heapq
import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import regex
import tiktoken
from tqdm import tqdm

# GPT-4's: contractions, words with one leading space or sign, numbers of up to three digits,
# punctuation, line breaks, spaces. Every character falls into exactly one word.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
N_SPECIAL = 16      # ids set aside for special tokens; later stages name the free ones
ROLES = ("system", "user", "assistant")


# ---------------------------------------------------------------------- training

def count_words(texts: Iterable[str]) -> Counter[str]:
    """["a cat, a hat"] -> {"a": 1, " cat": 1, ",": 1, " a": 1, " hat": 1}."""
    if isinstance(texts, str):
        raise ValueError("texts is one string; give a list of strings")
    splitter, words = regex.compile(PATTERN), Counter()
    for text in texts:
        words.update(map(itemgetter(0), splitter.finditer(text)))
    return words


def lay_out(word_counts: dict[str, int],
            ranks: dict[bytes, int] | None = None) -> tuple[list[bytes | None], list[int]]:
    """All distinct words in one row, byte by byte, None between words; at each place the count of
    its word. {"ab": 3} -> [None, b"a", b"b", None], [0, 3, 3, 3]. ranks: merges made before."""
    tokens, weights = [None], [0]
    for word, n in word_counts.items():
        letters = [bytes([b]) for b in word.encode(errors="replace")]
        weights += [n] * (len(letters) + 1)
        if ranks:                                   # a token stands at its first and last byte
            letters = [token if i in (0, len(token) - 1) else None
                       for token in merged(letters, ranks) for i in range(len(token))]
        tokens += [*letters, None]
    return tokens, weights


def merged(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """A word's parts after all known merges: of all neighbours the pair of the lowest rank becomes
    one, again and again. tiktoken does this to every word that is encoded."""
    parts = list(parts)
    while True:
        found = [ranks.get(left + right, math.inf) for left, right in pairwise(parts)]
        if min(found, default=math.inf) == math.inf:
            return parts
        i = found.index(min(found))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def count_pairs(tokens: list[bytes | None], weights: list[int]) -> tuple[dict, dict]:
    """The row of lay_out -> {pair: how often it occurs}, {pair: places of its left token}."""
    counts, places, i = defaultdict(int), defaultdict(list), 1
    while i < len(tokens):
        left = tokens[i]
        after = i + (len(left) if left else 1)
        if left and (right := tokens[after]):
            counts[left, right] += weights[i]
            places[left, right].append(i)
        i = after
    return counts, places


def merge(pair: tuple[bytes, bytes], tokens: list[bytes | None], weights: list[int],
          counts: dict, places: dict) -> set[tuple[bytes, bytes]]:
    """Make one token of the pair wherever it stands; bring counts and places up to date.

    Returns the pairs with the new token: no other count has grown. A token stands at its first
    and at its last byte, so that neighbours are found without a search: merging o + w and then
    l + ow turns l o w into l ow ow and low None low.
    """
    left, right = pair
    token, born = left + right, set()
    for i in places.pop(pair):                      # in order: a a a becomes aa a, not a aa
        middle, end = i + len(left), i + len(token)
        if tokens[i] != left or tokens[middle] != right:
            continue                                # gone: one of the two was merged before
        tokens[middle] = None
        tokens[i] = tokens[end - 1] = token
        if before := tokens[i - 1]:
            counts[before, left] -= weights[i]
            counts[before, token] += weights[i]
            places[before, token].append(i - len(before))
            born.add((before, token))
        if after := tokens[end]:
            counts[right, after] -= weights[i]
            counts[token, after] += weights[i]
            places[token, after].append(i)
            born.add((token, after))
    return born


def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool = False,
              ranks: dict[bytes, int] | None = None) -> dict[bytes, int]:
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
    # 1. SPLIT the texts into words; 2. COUNT the distinct words, then their pairs
    tokens, weights = lay_out(count_words(texts), ranks)
    counts, places = count_pairs(tokens, weights)
    heap = [(-n, pair) for pair, n in counts.items()]       # the top: most frequent, then smallest
    heapq.heapify(heap)

    # 3. MERGE the most frequent pair, again and again
    ranks = dict(ranks) if ranks else {bytes([b]): b for b in range(256)}
    bar = tqdm(total=vocab_size - N_SPECIAL - len(ranks), desc="merging", unit=" pairs",
               disable=not progress)
    while heap and len(ranks) < vocab_size - N_SPECIAL:
        n, pair = heapq.heappop(heap)
        if -n > counts[pair]:               # other merges took some of them: back with the rest
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if n == 0:                          # no pair is left: every word is one token
            break
        ranks.setdefault(pair[0] + pair[1], len(ranks))    # there before only in given ranks
        for grown in merge(pair, tokens, weights, counts, places):
            heapq.heappush(heap, (-counts[grown], grown))
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
        missing = [b for b in range(256) if bytes([b]) not in ranks]
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
        reserved = [f"<|reserved_{i}|>" for i in range(len(special_tokens), N_SPECIAL)]
        names = [*special_tokens, *reserved]
        self.ranks, self.pattern = ranks, pattern
        self.special = {name: len(ranks) + i for i, name in enumerate(names)}
        self.vocab_size = len(ranks) + len(names)
        (self.endoftext, self.pad, self.system, self.user, self.assistant,
         self.end) = (self.special[name] for name in SPECIAL_TOKENS)
        self.encoding = tiktoken.Encoding("lifecycle", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=self.special)

    def __eq__(self, other) -> bool:
        return (isinstance(other, Tokenizer) and self.ranks == other.ranks
                and self.pattern == other.pattern and self.special == other.special)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, progress: bool = False) -> "Tokenizer":
        return cls(train_bpe(texts, vocab_size, progress))

    def extended(self, texts: Iterable[str], n: int) -> "Tokenizer":
        """The same tokens and up to n more, merged in other texts; special ones move up."""
        ranks = train_bpe(texts, len(self.ranks) + n + N_SPECIAL, ranks=self.ranks)
        return Tokenizer(ranks, self.pattern, self.named)

    @property
    def named(self) -> list[str]:
        """The special tokens that mean something: all but the reserved places."""
        return [name for name in self.special if not name.startswith("<|reserved_")]

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """No merges: the ids of a text are its UTF-8 bytes."""
        return cls({bytes([b]): b for b in range(256)})

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Never a special one, whatever the text spells."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """encode() of each. One thread: tiktoken's threads are slower on two cores."""
        return [self.encode(text) for text in texts]

    def pieces(self, token: bytes) -> list[int]:
        """Ids of the bytes of one word, which need not be whole characters."""
        return [self.ranks[part] for part in merged([bytes([b]) for b in token], self.ranks)]

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """Text of the ids; invalid UTF-8 becomes U+FFFD, special tokens are dropped or spelled.

        Raises ValueError for an id outside the vocabulary."""
        ids = list(ids)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is not in 0 .. {self.vocab_size - 1}")
        if not specials:
            ids = [i for i in ids if i < len(self.ranks)]
        return self.encoding.decode(ids)

    def chat(self, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
        """A conversation -> (ids, loss_mask), equally long (001 section 3.4, no added whitespace).

            <|user|>Hi<|end|><|assistant|>Hello!<|end|>
               0     0   0         0        1      1        mask: what the assistant must write

        messages: [{"role": "system" | "user" | "assistant", "content": str}, ...]. Raises
        ValueError, naming the message, for anything else.
        """
        ids, loss_mask = [], []
        for role, content in checked(messages):
            text = [*self.encode(content), self.end]
            ids += [self.special[f"<|{role}|>"], *text]
            loss_mask += [0] + [int(role == "assistant")] * len(text)
        return ids, loss_mask

    def prompt(self, messages: Sequence[dict]) -> list[int]:
        """The conversation so far and <|assistant|>: what comes next is the answer."""
        ids, _ = self.chat(messages)
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last message is the assistant's; a prompt ends before its turn")
        return [*ids, self.assistant]

    def save(self, folder: str | Path) -> None:
        """Write folder/tokenizer.json, whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokens = sorted(self.ranks, key=self.ranks.get)
        text = json.dumps({"pattern": self.pattern, "special_tokens": list(self.special),
                           "ranks": [token.decode("latin-1") for token in tokens]}, indent=0)
        temporary = folder / "tokenizer.json.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / "tokenizer.json")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read folder/tokenizer.json, or the file itself. Raises ValueError if it is not whole."""
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: no tokenizer there ({error.strerror}); train one with "
                             "python tokenizer.py") from None
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        try:
            return cls(*parse_saved(saved))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def checked(messages: Sequence[dict]) -> list[tuple[str, str]]:
    """Messages -> [(role, content), ...]; ValueError for what is not a message."""
    if not messages:
        raise ValueError("a conversation needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or {"role", "content"} - message.keys():
            raise ValueError(f"message {i} is {message!r}; it must be a dict with role and content")
        if message["role"] not in ROLES:
            raise ValueError(f"message {i} has role {message['role']!r}; it must be one of "
                             f"{', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise ValueError(f"message {i} has content {message['content']!r}; it must be a string")
    return [(message["role"], message["content"]) for message in messages]


def parse_saved(saved: object) -> tuple[dict[bytes, int], str, list[str]]:
    """What tokenizer.json holds -> (ranks, pattern, special tokens).

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
        return [text for i, text in enumerate(texts) if i % 20 != 19], texts[19::20]
    cuts = [len(text) - len(text) // 20 for text in texts]
    return ([text[:cut] for text, cut in zip(texts, cuts)],
            [text[cut:] for text, cut in zip(texts, cuts) if text[cut:]])


def main(args: argparse.Namespace) -> Tokenizer:
    """Train, save and measure one tokenizer. Raises ValueError for bad input, before training."""
    from data import read_documents, world_named

    if args.out.exists() and not args.overwrite and (args.out.is_file() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} is not empty; name another folder or give --overwrite")
    megabytes = args.max_mb or (10 if world_named(args.data) else None)
    documents = read_documents(args.data, max_bytes=megabytes and int(megabytes * 1e6))
    texts, heldout = hold_out(list(tqdm(documents, "reading", unit=" documents")))

    start = time.perf_counter()
    tokenizer = Tokenizer.train(tqdm(texts, "counting words", unit=" documents"), args.vocab_size,
                                progress=True)
    seconds = time.perf_counter() - start
    tokenizer.save(args.out)

    measured = heldout or texts
    n_bytes = sum(len(text.encode(errors="replace")) for text in measured)
    n_tokens = sum(map(len, tokenizer.encode_batch(measured)))
    print(f"{args.out / 'tokenizer.json'}: vocabulary {tokenizer.vocab_size} (256 bytes, "
          f"{len(tokenizer.ranks) - 256} merges, {len(tokenizer.special)} special tokens), "
          f"{seconds:.1f} s, {n_bytes / max(1, n_tokens):.3f} bytes per token on "
          f"{n_bytes:,} bytes of {'held-out' if heldout else 'training'} text")
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
    parser.add_argument("--overwrite", action="store_true", help="write into a folder in use")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(parse())
    except ValueError as error:
        sys.exit(f"tokenizer.py: {error}")
