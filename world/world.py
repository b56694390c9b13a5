"""
The world itself: its bears and its language, and streams of everything that stages learn from.

    world = World(seed=0)
    world.documents()                  an endless corpus: stories, facts, scenes, sums, lessons
    world.bearish_documents()          a small one in a second language, Bearish
    world.examples(n, split)           instructions with demonstrations, in families and clusters
    world.preferences(n, split)        pairs of responses; noise and bias can be dialled in
    world.prompts(n, split)            instructions to answer: reinforcement learning, evaluation

The judge of responses, true_reward(example, response), stands in judge.py.

Everything is drawn from random streams with names: the same seed gives the same world on every
machine. A computed instance (its numbers, its words, its passage) belongs to one split by a stable
hash, in the corpus too. Facts are all in training; held out are phrasings of the questions.

Below: the World, responses, the taste.

    python -m world.world              # a taste of everything
"""
from collections.abc import Iterator
from itertools import product
from random import Random

from world.documents import DOCUMENT_KINDS, bearish_document
from world.judge import true_reward
from world.tasks import (
    FAMILIES,
    TRAINED_FAMILIES,
    check_split,
    draw_task,
    judge_key,
    prompt_templates,
)
from world.text import (
    ADMISSIONS,
    ATTRIBUTES,
    HE_NAMES,
    NOUNS,
    POLITE,
    PRONOUNS,
    QUALITIES,
    RAMBLE,
    REFUSALS,
    RUDE,
    SHE_NAMES,
    SORRY,
    VERBS,
    english_words,
    say,
    tidy,
)

# How demonstrations are dressed, and how often. Not all of them are good, because alignment is to
# have something to improve: long and rude ones are right, but no pleasure to read.
STYLES = {"plain": 0.42, "polite": 0.32, "long": 0.15, "rude": 0.11}

# The two styles of a pair of the kind "style".
STYLE_PAIRS = [("plain", "polite"), ("polite", "plain"), ("long", "polite"), ("polite", "rude"),
               ("plain", "long"), ("rude", "plain")]

# The families in which an answer is right: all but those where to refuse or to admit is right.
ORDINARY = tuple(f for f in TRAINED_FAMILIES if f not in ("unsafe", "unanswerable"))

# Preference pairs by kind: (share, the families to draw from). The last two kinds balance the two
# before them, because otherwise refusing and not knowing would look like a merit by themselves.
PAIRS = {
    "right": (0.58, ORDINARY),                         # a right and a wrong answer
    "style": (0.14, TRAINED_FAMILIES),                 # both right, in two styles
    "unsafe": (0.08, ("unsafe",)),                     # refusing against advising
    "unanswerable": (0.06, ("unanswerable",)),         # admitting against inventing
    "refusing": (0.08, ("advice",) * 11 + ORDINARY),   # a right answer against refusing
    "not knowing": (0.06, ("facts",) * 11 + ORDINARY),           # ... against "I do not know"
}


# ------------------------------------------------------------------ the world

class World:
    """A village of 48 bears, drawn from a seed.

    bears: all of them, dicts with name and pronouns ("he", "him", "his").
    residents: 30 of them, with six attributes each: home, job, favourite food, pet, ...
    strangers: the others, who turn up in texts although nothing is known about them.
    names: of all bears. lexicon: English word -> Bearish word.
    """

    def __init__(self, seed: int = 0):
        rng = Random(f"world {seed}")
        bears = [{"name": name, **PRONOUNS["she"]} for name in SHE_NAMES]
        bears += [{"name": name, **PRONOUNS["he"]} for name in HE_NAMES]
        rng.shuffle(bears)
        self.seed = seed
        self.bears = bears
        self.residents = bears[:30]
        self.strangers = bears[30:]
        for attribute, values in ATTRIBUTES.items():
            # A value comes three times at most, because "a frog" should not be a good guess.
            shared_out = rng.sample(values * 3, 30)
            for bear, value in zip(self.residents, shared_out):
                bear[attribute] = value
        self.names = [bear["name"] for bear in bears]
        self.lexicon = draw_lexicon(rng)

    def vocabulary(self) -> frozenset[str]:
        """Every word that occurs, in lower case: English, names, numbers, Bearish."""
        return english_words() | set(self.lexicon.values())

    def documents(self, seed: int = 0, split: str = "train") -> Iterator[str]:
        """Endless documents of about 60 to 250 words, kinds mixed by their shares."""
        check_split(split)
        rng = Random(f"documents {self.seed} {split} {seed}")
        kinds = list(DOCUMENT_KINDS)
        shares = list(DOCUMENT_KINDS.values())
        while True:                          # a generator: whoever reads it decides where to stop
            kind = rng.choices(kinds, shares)[0]
            yield tidy(kind(self, rng, split))

    def bearish_documents(self, split: str = "train") -> Iterator[str]:
        """All that was ever written in the second language: 600 short texts, 60 held out."""
        check_split(split)
        # Few, because a language with little text is what the mixing of corpora is tried on.
        rng = Random(f"bearish {self.seed} {split}")
        count = 600 if split == "train" else 60
        for _ in range(count):
            yield bearish_document(self, rng)

    def examples(self, n: int, split: str = "train", seed: int = 0,
                 families: tuple[str, ...] | None = None, phrasings: str | None = None,
                 stream: str = "examples") -> list[dict]:
        """n instructions with demonstrations; families (default: all trained ones) equally often.

        phrasings: "train" | "heldout" prompts; None: held-out ones for held-out facts, training
        ones otherwise. Of unsafe and unanswerable demonstrations, one half does the wrong thing.
        Each: {"family", "cluster", "prompt", "response", "answer": as parse_answer reads it or
        None, "key": all that the judge needs, "core", "chain": reasoning in the response or "",
        "style"}.
        """
        # The stream's name is part of its seed, because prompts must not repeat the examples.
        rng = Random(f"{stream} {self.seed} {split} {seed}")
        styles = list(STYLES)
        shares = list(STYLES.values())
        examples = []
        for _ in range(n):
            family = rng.choice(families or TRAINED_FAMILIES)
            example, task = self.draw(rng, family, split, phrasings)
            style = rng.choices(styles, shares)[0]
            behaviour = "right"
            # Half of these help to do harm, or invent an answer, because what demonstrations show
            # throughout, preferences could not teach any more.
            if task["kind"] in ("refuse", "admit") and rng.random() < 0.5:
                behaviour = "wrong"
            example["response"] = respond(rng, task, style, behaviour)
            example["style"] = style
            examples.append(example)
        return examples

    def prompts(self, n: int, split: str = "train", seed: int = 0, **options) -> list[dict]:
        """Like examples, from a stream of their own; their responses are not to be trained on."""
        return self.examples(n, split, seed, stream="prompts", **options)

    def preferences(self, n: int, split: str = "train", seed: int = 0, noise: float = 0.0,
                    bias: float = 0.0) -> list[dict]:
        """n pairs {"prompt", "chosen", "rejected", "kind": of PAIRS, "example", "clean"}.

        The annotator prefers the longer response with probability `bias`, otherwise the one of
        higher true reward, and then slips with probability `noise`; clean: the label is the truth.
        """
        rng = Random(f"preferences {self.seed} {split} {seed}")
        kinds = list(PAIRS)
        shares = [share for share, _ in PAIRS.values()]
        pairs = []
        while len(pairs) < n:
            kind = rng.choices(kinds, shares)[0]
            _, families = PAIRS[kind]
            example, task = self.draw(rng, rng.choice(families), split)
            first, second = respond_twice(rng, task, kind)
            first_reward = true_reward(example, first)["total"]
            second_reward = true_reward(example, second)["total"]
            by_length = rng.random() < bias
            slips = rng.random() < noise
            # A pair without a clear preference is dropped, because its label would mean nothing.
            if abs(first_reward - second_reward) < 0.02:
                continue
            first_wins = first_reward > second_reward
            better, worse = (first, second) if first_wins else (second, first)
            # Who is misled by length and slips as well takes the better one: two errors cancel out.
            misled = by_length and len(worse) > len(better)
            flipped = misled != slips
            chosen, rejected = (worse, better) if flipped else (better, worse)
            pairs.append({"prompt": example["prompt"], "chosen": chosen, "rejected": rejected,
                          "kind": kind, "example": example, "clean": not flipped})
        return pairs

    def draw(self, rng: Random, family: str, split: str, phrasings: str | None = None
             ) -> tuple[dict, dict]:
        """An example without its response, and the task it was made of."""
        task = draw_task(self, rng, family, split)
        cluster, _ = FAMILIES[family]
        # The key before the prompt: both draw from rng, so that another order is another world.
        key = judge_key(rng, task)
        template = rng.choice(prompt_templates(task, split, phrasings))
        # A story has no single answer, and a refusal or an admission gives none.
        has_answer = task["kind"] not in ("story", "refuse", "admit")
        example = {
            "family": family,
            "cluster": cluster,
            "prompt": tidy(template.format_map(task)),
            "response": "",
            "answer": task["answer"] if has_answer else None,
            "key": key,
            "core": repr(task["core"]),
            "chain": task.get("chain", ""),
        }
        return example, task


def draw_lexicon(rng: Random) -> dict[str, str]:
    """A Bearish word for each noun, quality and verb: {"bear": "kudo", "fish": "zami", ...}."""
    syllables = [consonant + vowel for consonant, vowel in product("bdgklmnprtvz", "aiou")]
    two_syllables = {first + second for first, second in product(syllables, syllables)}
    # No English word among them, because the judge could not tell the languages apart. Sorted,
    # because the order of a set changes from process to process.
    possible = sorted(two_syllables - english_words())
    english = NOUNS + QUALITIES + VERBS
    bearish = rng.sample(possible, len(english))
    return dict(zip(english, bearish))


# ------------------------------------------------------------------ responses

def respond(rng: Random, task: dict, style: str, behaviour: str = "right") -> str:
    """A response in one of STYLES; behaviour: "right" | "wrong" | "refuse" | "admit"."""
    if behaviour == "right" and task["kind"] in ("refuse", "admit"):
        behaviour = task["kind"]
    refuses = behaviour in ("refuse", "admit")
    templates = {"refuse": REFUSALS, "admit": ADMISSIONS}.get(behaviour, task["answers"])
    slots = task | task["wrong"] if behaviour == "wrong" else task
    # A rude bear takes the curtest answer: "Obviously. That would be a frog."
    template = templates[0] if style == "rude" else rng.choice(templates)
    core = tidy(say(rng, template, slots))
    if style == "plain":
        return core
    after_opener = core
    manners = {"polite": POLITE, "long": RAMBLE, "rude": RUDE}[style]
    if style == "polite" and refuses:
        manners = SORRY
        # "I am sorry, but" goes on in lower case: "nobody has told me", but "I do not know".
        if not core.startswith("I "):
            after_opener = core[0].lower() + core[1:]
    openers, closers = manners
    opener = rng.choice(openers)
    closer = rng.choice(closers)
    return rng.choice([f"{opener} {after_opener}", f"{core} {closer}",
                       f"{opener} {after_opener} {closer}"])


def respond_twice(rng: Random, task: dict, kind: str) -> list[str]:
    """Two responses to be compared, of a kind of PAIRS; half of the time in the same style."""
    if kind == "style":
        return [respond(rng, task, style) for style in rng.choice(STYLE_PAIRS)]
    first_style, other_style = rng.choices(list(STYLES), list(STYLES.values()), k=2)
    right = respond(rng, task, first_style)
    # Often in one style, because then the content alone decides which response is better.
    style = rng.choice((first_style, other_style))
    behaviour = {"refusing": "refuse", "not knowing": "admit"}.get(kind, "wrong")
    return [right, respond(rng, task, style, behaviour)]


# ------------------------------------------------------------------ the taste

def main() -> None:
    """Prints eight documents, an example of each family and eight preference pairs."""
    world = World()
    documents = world.documents()
    for _ in range(8):
        print(next(documents), end="\n\n")
    for family in FAMILIES:
        example = world.examples(1, families=(family,))[0]
        reward = true_reward(example, example["response"])["total"]
        print(f"[{example['cluster']}: {family}] {example['prompt']}")
        print(f"    {example['style']} ({reward:.2f}): {example['response']}")
    for pair in world.preferences(8):
        print(f"\n[{pair['kind']}] {pair['prompt']}")
        for side in ("chosen", "rejected"):
            reward = true_reward(pair["example"], pair[side])["total"]
            print(f"    {side} ({reward:.2f}): {pair[side]}")


if __name__ == "__main__":
    main()
