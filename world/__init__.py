"""
The embedded world: a village of toy bears, made from a seed, about which the truth is known.

    world.py       class World: the bears, and streams of documents, examples, preferences, prompts
    tasks.py       the task families: what a task has, how it is asked; how to add a family
    families.py    how an instance of each family is drawn
    talk.py        small talk, and turns that refer to earlier ones
    judge.py       true_reward and parse_answer: what a response is really worth
    documents.py   the corpus: stories, facts, dialogues, sums, lessons, and Bearish
    text.py        all words and sentences, as templates, and the functions that fill them

    python -m world.world          # a taste of everything
"""
