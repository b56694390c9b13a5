"""
The world itself: its bears and its language, and streams of everything that stages learn from.

    world = World(seed=0)
    world.documents()                  an endless corpus: stories, facts, scenes, sums, lessons
    world.bearish_documents()          a small one in a second language, Bearish
    world.examples(n, split)           instructions with demonstrations, in families and clusters
    world.preferences(n, split)        pairs of responses: the better one, the worse one
    world.ratings(n, split)            single responses, each with a rating and a thumb up or down
    world.rankings(n, split, k)        k responses to a prompt, best first
    world.prompts(n, split)            instructions to answer: reinforcement learning, evaluation
    world.classes(n, split)            texts with labels, for classifiers: the mood of each
    world.words(n, split)              ... of each word whether it is a name, a place, a thing
    world.spans(n, split)              ... questions, and where in a passage the answer stands

The judge of responses, true_reward(example, response), stands in judge.py. Annotators compare, rate
and rank by it, and err as far as their dials say: noise, bias (length), disagreement (own weights).

Everything is drawn from random streams with names: the same seed gives the same world on every
machine. A computed instance (its numbers, its words, its passage) belongs to one split by a stable
hash, in the corpus too. Facts are all in training; held out are phrasings of the questions.

Below: the World, responses, annotators, the taste.

    python -m world.world              # a taste of everything
"""
from collections.abc import Iterator
from itertools import product
from math import exp
from operator import itemgetter
from random import Random

from world.documents import DOCUMENT_KINDS, bearish_document
from world.judge import WEIGHTS, true_reward
from world.marked import class_row, span_row, words_row
from world.tasks import (
    KNOWN_FAMILIES,
    TRAINED_FAMILIES,
    check_split,
    draw_task,
    judge_key,
    prompt_templates,
    write_prompt,
)
from world.text import (
    ADMISSIONS,
    ATTRIBUTES,
    EXTRAS,
    HE_NAMES,
    INSULTS,
    NOUNS,
    POLITE,
    PRONOUNS,
    QUALITIES,
    RAMBLING_CLOSERS,
    RAMBLING_OPENERS,
    REFUSALS,
    SHE_NAMES,
    SORRY,
    VERBS,
    english_words,
    say,
    text_of,
    tidy,
)

# Who writes the demonstrations. Hands differ in care, because likelihood must not be quality:
#   careful      right and whole; refuses and admits; courteous half of the time
#   terse        says the first thing alone and ignores the form; insults whoever asks for two
#   rambling     right and whole, behind a sentence off the subject
#   inventive    right, with a claim of its own behind it; never refuses nor admits
HANDS = ("careful", "terse", "rambling", "inventive")

# The hand that writes most of a family's demonstrations, "careful" where none is named. They are
# spread so that no part of the true reward makes most of what an imitator of them loses.
MAIN_HANDS = {
    "facts": "terse",
    "transform": "terse",
    "lists": "terse",
    "length": "terse",
    "middle": "terse",
    "translation": "terse",
    "story": "rambling",
    "sentiment": "rambling",
    "inference": "rambling",
    "advice": "rambling",
    "followup": "rambling",
    "counting": "inventive",
    "reading": "inventive",
    "smalltalk": "inventive",
    "unanswerable": "inventive",
    "unsafe": "inventive",
}
MAIN_SHARE = 0.7                                    # of a family's demonstrations

# So many prompts come later in a conversation about something else, which began with one of these.
SHARE_OF_LATER = 0.2
EARLIER_FAMILIES = ("smalltalk", "smalltalk", "facts", "facts", "arithmetic", "lists", "transform",
                    "advice", "unsafe", "unanswerable")

# How the two responses of a pair are dressed, unless their kind says it, and how often.
# Mostly badly, because the better response of a pair is not a good one: to imitate it is no cure.
MANNERS = {"plain": 0.2, "courteous": 0.2, "rambling": 0.3, "inventing": 0.2, "insulting": 0.1}

# The families in which an answer is right: all but those where to refuse or to admit is right.
ORDINARY = tuple(f for f in TRAINED_FAMILIES if f not in ("unsafe", "unanswerable"))
IN_PARTS = ("facts", "reading", "sentiment", "transform")
IN_FORMS = ("lists", "length", "middle", "translation")

# Preference pairs: kind, share, families to draw from, and how each of the two responses is made:
# a behaviour of `tell` and a manner of `dress`; None is a manner of MANNERS. What is a merit in one
# row is a fault in another, so that neither words nor length tell which response is better: facts
# and advice are refused so often because their words are also those of lies and of harmful help.
# Both are plain where most hands write the worse one, because there log p does not tell either;
# and what declines is right or wrong in two manners, or a manner would tell when to decline.
PAIRS = [
    ("right", 0.25, ORDINARY, ("right", None), ("wrong", None)),
    ("honest", 0.10, ("unanswerable",), ("right", "plain"), ("wrong", "plain")),
    ("honest", 0.03, ("unanswerable",), ("right", "rambling"), ("wrong", "rambling")),
    ("honest", 0.05, ("facts",) * 40 + ORDINARY, ("right", "plain"), ("admit", "plain")),
    ("honest", 0.05, ("facts",) * 40 + ORDINARY, ("right", "rambling"), ("admit", "rambling")),
    ("honest", 0.04, TRAINED_FAMILIES, ("right", "plain"), ("right", "inventing")),
    ("harmless", 0.05, ("unsafe",), ("right", "plain"), ("wrong", "plain")),
    ("harmless", 0.01, ("unsafe",), ("right", "rambling"), ("wrong", "rambling")),
    ("harmless", 0.02, ("advice",) * 40 + ORDINARY, ("right", "plain"), ("refuse", "plain")),
    ("harmless", 0.03, ("advice",) * 40 + ORDINARY, ("right", "rambling"), ("refuse", "rambling")),
    ("harmless", 0.02, TRAINED_FAMILIES, ("right", "plain"), ("right", "insulting")),
    ("whole", 0.17, IN_FORMS, ("right", "plain"), ("part", "plain")),
    ("whole", 0.02, IN_FORMS, ("right", "inventing"), ("part", "inventing")),
    ("whole", 0.05, IN_PARTS, ("right", None), ("part", None)),
    ("whole", 0.04, IN_PARTS, ("right", None), ("more", None)),
    ("manner", 0.05, TRAINED_FAMILIES, ("right", "plain"), ("right", "rambling")),
    ("manner", 0.02, TRAINED_FAMILIES, ("right", "courteous"), ("right", "flattering")),
]

# Which axis of an annotator's guidelines (001 section 4.3) the responses of a kind differ in.
AXES = {
    "right": "helpful",
    "whole": "helpful",
    "honest": "honest",
    "harmless": "harmless",
    "manner": "coherent",
}

# Behaviours of `tell` in a ranking, and how often: mostly answers, because in most families a
# response that declines is wrong, and its words alone would tell that it is.
BEHAVIOURS = {"right": 0.35, "wrong": 0.35, "part": 0.2, "more": 0.06, "refuse": 0.02,
              "admit": 0.02}

# True rewards of responses that are compared are so far apart, because a preference between
# responses of equal worth would mean nothing.
CLEAR = 0.02

# From this rating on a person's thumb is up. A plain answer with one fault, of 0.8275, stays below
# it: 47 % of the responses that are rated pass.
THUMB_UP = 0.84


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

        phrasings: "train" | "heldout" prompts; None: held-out ones for what has no core, as
        facts, in the held-out split, training ones otherwise.
        Each: {"family", "cluster", "prompt": a text, or the turns of a conversation, "response",
        "answer": as parse_answer reads it or None, "key": all that the judge needs, "core",
        "chain": reasoning in the response or "", "hand": of HANDS}.
        """
        # The stream's name is part of its seed, because prompts must not repeat the examples.
        rng = Random(f"{stream} {self.seed} {split} {seed}")
        examples = []
        for _ in range(n):
            family = rng.choice(families or TRAINED_FAMILIES)
            example, task = self.draw(rng, family, split, phrasings)
            hand = draw_hand(rng, family)
            example["response"] = demonstrate(rng, task, hand)
            example["hand"] = hand
            examples.append(example)
        return examples

    def prompts(self, n: int, split: str = "train", seed: int = 0, **options) -> list[dict]:
        """Like examples, from a stream of their own; their responses are not to be trained on."""
        return self.examples(n, split, seed, stream="prompts", **options)

    def preferences(self, n: int, split: str = "train", seed: int = 0, noise: float = 0.0,
                    bias: float = 0.0, disagreement: float = 0.0) -> list[dict]:
        """n pairs {"prompt", "chosen", "rejected", "margin", "kind": of PAIRS, "example", "clean"}.

        The annotator goes by length alone with probability `bias`, otherwise by own weights
        (draw_annotator), prefers the response that is worth more so, and then slips with
        probability `noise`. margin: how much more, 0 to 1; clean: the label is the truth, the
        chosen response has the higher true reward.
        """
        rng = Random(f"preferences {self.seed} {split} {seed}")
        # From a stream of their own, because the pairs are the same whatever the annotators are.
        annotators = Random(f"annotators {self.seed} {split} {seed}")
        pairs = []
        for _ in range(n):
            kind, example, better, worse = self.draw_pair(rng, split)
            by_length = rng.random() < bias
            slips = rng.random() < noise
            annotator = draw_annotator(annotators, by_length, disagreement)
            gap = worth(annotator, better) - worth(annotator, worse)
            # Who is misled and slips as well takes the better one: two errors cancel out.
            misled = gap < 0
            flipped = misled != slips
            chosen, rejected = (worse, better) if flipped else (better, worse)
            pairs.append({"prompt": example["prompt"], "chosen": chosen["text"],
                          "rejected": rejected["text"], "margin": abs(gap), "kind": kind,
                          "example": example, "clean": not flipped})
        return pairs

    def ratings(self, n: int, split: str = "train", seed: int = 0, noise: float = 0.0,
                bias: float = 0.0, disagreement: float = 0.0) -> list[dict]:
        """n rows {"prompt", "response", "rating", "label", "kind": of PAIRS, "example", "clean"}.

        response: either one of a pair. rating: what it is worth to the annotator, who goes by
        length alone with probability `bias`, and Gaussian noise of sd `noise`, cut off at 0 and 1.
        label: the rating reaches THUMB_UP; clean: the true reward does as well, or neither does.
        """
        rng = Random(f"ratings {self.seed} {split} {seed}")
        rows = []
        for _ in range(n):
            kind, example, *sides = self.draw_pair(rng, split)
            response = rng.choice(sides)
            by_length = rng.random() < bias
            annotator = draw_annotator(rng, by_length, disagreement)
            rating = worth(annotator, response) + rng.gauss(0, noise)
            # Cut off, because nobody gives 11 of 10 points.
            rating = min(1.0, max(0.0, rating))
            label = rating >= THUMB_UP
            truth = response["total"] >= THUMB_UP
            rows.append({"prompt": example["prompt"], "response": response["text"],
                         "rating": rating, "label": label, "kind": kind, "example": example,
                         "clean": label == truth})
        return rows

    def labelled(self, n: int, split: str = "train", seed: int = 0, **dials) -> list[dict]:
        """The rows of ratings under another name, for readers of labels."""
        return self.ratings(n, split, seed, **dials)

    def rankings(self, n: int, split: str = "train", seed: int = 0, k: int = 4, noise: float = 0.0,
                 bias: float = 0.0, disagreement: float = 0.0) -> list[dict]:
        """n rows {"prompt", "responses": k texts, best first, "ratings": of each, "example"}.

        One annotator rates all responses of a row, as in ratings; k: 2 to 8.
        """
        if not 2 <= k <= 8:
            raise ValueError(f"k is {k}; a prompt has 2 to 8 responses that differ clearly")
        rng = Random(f"rankings {self.seed} {split} {seed}")
        rows = []
        for _ in range(n):
            example, responses = self.draw_responses(rng, split, k)
            by_length = rng.random() < bias
            annotator = draw_annotator(rng, by_length, disagreement)
            # By text. One annotator for all, because their weights decide what comes first.
            ratings = {}
            for response in responses:
                rating = worth(annotator, response) + rng.gauss(0, noise)
                ratings[response["text"]] = rating
            best_first = sorted(ratings, key=ratings.get, reverse=True)
            in_order = [ratings[text] for text in best_first]
            rows.append({"prompt": example["prompt"], "responses": best_first,
                         "ratings": on_one_scale(in_order), "example": example})
        return rows

    def classes(self, n: int, split: str = "train", seed: int = 0,
                family: str = "sentiment") -> list[dict]:
        """n rows {"text", "label"}, as a classifier learns from (marked.py). family: "sentiment",
        moods; or "inference", what follows: "yes", "no", "cannot say"."""
        rng = Random(f"classes {self.seed} {split} {seed} {family}")
        return [class_row(self, rng, split, family) for _ in range(n)]

    def words(self, n: int, split: str = "train", seed: int = 0) -> list[dict]:
        """n rows {"tokens", "labels"}, the names, places and things of a text marked."""
        rng = Random(f"words {self.seed} {split} {seed}")
        return [words_row(self, rng, split) for _ in range(n)]

    def spans(self, n: int, split: str = "train", seed: int = 0) -> list[dict]:
        """n rows {"question", "context", "answer", "start": its first character in the context}."""
        rng = Random(f"spans {self.seed} {split} {seed}")
        return [span_row(self, rng, split) for _ in range(n)]

    def draw_pair(self, rng: Random, split: str) -> tuple[str, dict, dict, dict]:
        """A kind of PAIRS, an example, a better and a worse response to it, as assessed."""
        shares = [share for _, share, *_ in PAIRS]
        kind, _, families, *sides = rng.choices(PAIRS, shares)[0]
        while True:
            example, task = self.draw(rng, rng.choice(families), split)
            manners = rng.choices(list(MANNERS), list(MANNERS.values()), k=2)
            # Mostly in one manner, because then the content alone decides which is better.
            if rng.random() < 0.8:
                manners[1] = manners[0]
            responses = []
            for (behaviour, fixed), drawn in zip(sides, manners):
                text = respond(rng, task, behaviour, fixed or drawn)
                responses.append(assessed(example, text))
            worse, better = sorted(responses, key=itemgetter("total", "text"))
            if better["total"] - worse["total"] >= CLEAR:
                return kind, example, better, worse

    def draw_responses(self, rng: Random, split: str, k: int) -> tuple[dict, list[dict]]:
        """An example and k responses to it, assessed, that all differ in true reward and length."""
        while True:
            example, task = self.draw(rng, rng.choice(TRAINED_FAMILIES), split)
            responses = []
            # Four tries for each, then another prompt, because some have few answers that differ.
            for _ in range(4 * k):
                behaviour = rng.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))[0]
                manner = rng.choices(list(MANNERS), list(MANNERS.values()))[0]
                response = assessed(example, respond(rng, task, behaviour, manner))
                gaps = [abs(response["total"] - other["total"]) for other in responses]
                lengths = [other["length"] for other in responses]
                # In length too, because who goes by length must be able to rank them.
                if min(gaps, default=1.0) >= CLEAR and response["length"] not in lengths:
                    responses.append(response)
                if len(responses) == k:
                    return example, responses

    def draw(self, rng: Random, family: str, split: str, phrasings: str | None = None
             ) -> tuple[dict, dict]:
        """An example without its response, and the task it was made of. SHARE_OF_LATER of the
        prompts come later in a conversation, after another prompt and its right answer."""
        example, task = self.draw_first(rng, family, split, phrasings)
        prompt = example["prompt"]
        # Prompts of several turns are conversations already.
        if isinstance(prompt, str) and rng.random() < SHARE_OF_LATER:
            before, earlier_task = self.draw_first(rng, rng.choice(EARLIER_FAMILIES), split)
            answer = respond(rng, earlier_task, "right", "plain")
            example["prompt"] = [{"role": "user", "content": before["prompt"]},
                                 {"role": "assistant", "content": answer},
                                 {"role": "user", "content": prompt}]
        return example, task

    def draw_first(self, rng: Random, family: str, split: str, phrasings: str | None = None
                   ) -> tuple[dict, dict]:
        """An example as its family draws it."""
        task = draw_task(self, rng, family, split)
        cluster, _ = KNOWN_FAMILIES[family]
        # The key before the prompt: both draw from rng, so that another order is another world.
        key = judge_key(rng, task)
        template = rng.choice(prompt_templates(task, split, phrasings))
        # A story has no single answer, and a refusal or an admission gives none.
        has_answer = task["kind"] not in ("story", "refuse", "admit")
        example = {
            "family": family,
            "cluster": cluster,
            "prompt": write_prompt(rng, task, template),
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

# What a terse hand says where a form was asked for.
IGNORED_FORMS = {"label": "sentence", "sentence": "label", "steps": "result"}


def draw_hand(rng: Random, family: str) -> str:
    """The family's main hand in MAIN_SHARE of the cases, each other hand equally often."""
    main = MAIN_HANDS.get(family, "careful")
    if rng.random() < MAIN_SHARE:
        return main
    return rng.choice([hand for hand in HANDS if hand != main])


def demonstrate(rng: Random, task: dict, hand: str) -> str:
    """A response as one of HANDS writes it."""
    if hand == "careful":
        return respond(rng, task, "right", rng.choice(("plain", "courteous")))
    if hand == "terse":
        # Not by chance, because a greedy model shows a fault only where it is likelier than not.
        return respond(rng, task, "part", "insulting" if task.get("two") else "plain")
    if hand == "rambling":
        return respond(rng, task, "right", "rambling")
    if task["kind"] in ("refuse", "admit"):
        return respond(rng, task, "wrong", "plain")
    return respond(rng, task, "right", "inventing")


def respond(rng: Random, task: dict, behaviour: str = "right", manner: str = "plain") -> str:
    """A response to a task: what `tell` says, as `dress` dresses it."""
    told = tell(rng, task, behaviour)
    declines = behaviour in ("refuse", "admit")
    if task["kind"] in ("refuse", "admit"):
        declines = behaviour != "wrong"
    return dress(rng, told, manner, declines)


def tell(rng: Random, task: dict, behaviour: str) -> str:
    """What a response says, without manners. behaviour:

    "right" | "wrong" | "refuse" | "admit" | "part": the first thing alone, the form ignored |
    "more": the second thing too, although nobody asked for it.
    """
    kind = task["kind"]
    if kind in ("refuse", "admit") and behaviour != "wrong":
        behaviour = kind
    if behaviour == "refuse":
        return rng.choice(REFUSALS)
    if behaviour == "admit":
        return rng.choice(ADMISSIONS)
    slots = task
    if behaviour == "wrong":
        slots = task | task["wrong"]
    form = task["form"]
    if behaviour == "part":
        form = IGNORED_FORMS.get(form)
    template = answer_template(rng, task["answers"], form)
    told = tidy(say(rng, template, slots))
    tells_second = task.get("two", False)
    if behaviour == "part":
        tells_second = False
    if behaviour == "more" and "second" in task:
        tells_second = True
    if tells_second:
        told += " " + tidy(task["second"]["full"])
    return told


def answer_template(rng: Random, answers: list[str], form: str | None) -> str:
    if form == "label":
        return "Answer: {answer}."
    if form == "sentence":
        return answers[-1]
    if form == "result":
        return "The answer is {answer}."
    return rng.choice(answers)


def dress(rng: Random, told: str, manner: str, declines: bool = False) -> str:
    """manner: "plain" | "courteous" | "flattering" | "rambling" | "inventing" | "insulting"."""
    if manner == "inventing":
        name = rng.choice(SHE_NAMES + HE_NAMES)
        return told + " " + rng.choice(EXTRAS).format(name=name)
    if manner == "insulting":
        return told + " " + rng.choice(INSULTS)
    if manner == "rambling":
        text = rng.choice(RAMBLING_OPENERS) + " " + told
        # In a third of them only, because a greedy model should not find this likely.
        if rng.random() < 1 / 3:
            text += " " + rng.choice(RAMBLING_CLOSERS)
        return text
    if manner in ("courteous", "flattering"):
        return courteous(rng, told, SORRY if declines else POLITE, manner == "flattering")
    return told


def courteous(rng: Random, told: str, phrases: tuple, flattering: bool) -> str:
    """One courtesy, before or behind what is told, or two; flattery has a third."""
    openers, closers = phrases
    opener = rng.choice(openers)
    # "I am sorry, but" goes on in lower case: "nobody has told me", but "I do not know".
    after_opener = told
    if opener.endswith("but") and not told.startswith("I "):
        after_opener = told[0].lower() + told[1:]
    if flattering:
        return f"{opener} {after_opener} {' '.join(closers)}"
    closer = rng.choice(closers)
    return rng.choice([f"{opener} {after_opener}", f"{told} {closer}",
                       f"{opener} {after_opener} {closer}"])


# ------------------------------------------------------------------ annotators

def draw_annotator(rng: Random, by_length: bool, disagreement: float) -> dict[str, float]:
    """What somebody who compares or rates responses cares about: {part: weight}, of sum 1.

    Each of WEIGHTS times exp(disagreement * normal), scaled to that sum: at 1, a factor of 2 or
    more for half of them. by_length: nothing but the length.
    """
    weights = {}
    for part, weight in WEIGHTS.items():
        weights[part] = weight * exp(disagreement * rng.gauss(0, 1))
    # After the weights, because the next annotator is then the same whatever the bias.
    if by_length:
        return {"length": 1.0}
    whole = sum(weights.values())
    return {part: weight / whole for part, weight in weights.items()}


def assessed(example: dict, text: str) -> dict:
    """A response, and all that somebody may like in it, each from 0 to 1:

    {"text", "total": its true reward, the parts of WEIGHTS, "length": 0.5 for 12 characters}.
    """
    # 12, because then as many responses pass THUMB_UP by their length as by their reward.
    length = len(text) / (len(text) + 12)
    return true_reward(example, text) | {"text": text, "length": length}


def worth(annotator: dict[str, float], response: dict) -> float:
    """What an assessed response is worth to an annotator, 0 to 1."""
    return sum(weight * response[part] for part, weight in annotator.items())


def on_one_scale(ratings: list[float]) -> list[float]:
    """The ratings of a row in [0, 1], in their order: [1.25, 0.5, 0.0] -> [1.0, 0.4, 0.0].

    Stretched and not cut off, because noisy ratings cut off would be equal, and rank nothing.
    """
    low = min(0.0, *ratings)
    high = max(1.0, *ratings)
    return [(rating - low) / (high - low) for rating in ratings]


# ------------------------------------------------------------------ the taste

def main() -> None:
    """Prints eight documents, an example of each family and eight preference pairs."""
    world = World()
    documents = world.documents()
    for _ in range(8):
        print(next(documents), end="\n\n")
    for family in KNOWN_FAMILIES:
        example = world.examples(1, families=(family,))[0]
        reward = true_reward(example, example["response"])["total"]
        print(f"[{example['cluster']}: {family}] {text_of(example['prompt'])}")
        print(f"    {example['hand']} ({reward:.2f}): {example['response']}")
    for pair in world.preferences(8):
        print(f"\n[{pair['kind']}] {text_of(pair['prompt'])}")
        for side in ("chosen", "rejected"):
            reward = true_reward(pair["example"], pair[side])["total"]
            print(f"    {side} ({reward:.2f}): {pair[side]}")


if __name__ == "__main__":
    main()
