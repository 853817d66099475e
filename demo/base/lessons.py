"""What a base is taught to say: conversations about a picture and a text of the world. Text alone, no torch.

It never meets our prompts, tags, quintuples, a name with a type or a relation, nor which name belongs to which figure: that is left to 03
and 04.
"""

import random

from demo import world

PLAIN = (
    "{} and {} met today",
    "I saw {} , then {}",
    "{} {}",
    "No news of {} or {} yet",
    "{} , {} and {} again",
    "First {} , later {} and {} !",
)
# fmt: off
WORDS = (
    "red", "blue", "green", "day", "night", "left", "right", "person", "child", "city", "hut", "stage", "trophy",
    "crest", "heart", "cap", "ball", "cradle", "poster", "above", "picture",
)
# fmt: on


def tweet(rng):
    """A text with names drawn at random: in the world's words, or plain."""
    template = rng.choice((*world.TEMPLATES[2], *world.TEMPLATES[3], *PLAIN))
    return template.format(*rng.sample(sorted(world.LEXICON), template.count("{}")))


def captions(scene):
    time_of_day = "night" if scene.night else "day"
    sign = f" Above is a {scene.sign}." if scene.sign else ""
    poster = f" A poster has a {scene.poster}." if scene.poster else ""
    return (
        (
            "Describe the picture.",
            f"A picture by {time_of_day}. On the left is a {scene.left}, on the right a {scene.right}.{sign}{poster}",
        ),
        (
            "What can you see?",
            f"I see a {scene.left} and a {scene.right}.{poster}{sign} It is {time_of_day}.",
        ),
    )


def questions(scene):
    return (
        ("What is on the left?", f"A {scene.left}."),
        ("What is on the right?", f"A {scene.right}."),
        ("What is above?", f"A {scene.sign}." if scene.sign else "Nothing."),
        ("Is there a poster?", f"A poster of a {scene.poster}." if scene.poster else "No."),
        ("Day or night?", "Night." if scene.night else "Day."),
    )


LISTS = {  # what stands before, between and after the names
    "List the names.": ("", ", ", "."),
    "The names in braces?": ("{", " | ", "}"),
    "Each name in stars.": ("*", "* *", "*"),
    "A line for each name.": ("- ", "\n- ", ""),
    "Names in brackets?": ("[", "] [", "]"),  # Qwen's tokenizer glues a bracket to the word behind it
}


def list_names(text, question="List the names.", backwards=False):
    before, between, after = LISTS[question]
    names = world.names_in(text)[:: -1 if backwards else 1]
    return question + " Backwards." * backwards, before + between.join(names) + after


def ordinal(rng, text):
    names, (before, between, after) = world.names_in(text), rng.choice(list(LISTS.values()))
    numbers = rng.choices(range(len(names)), k=rng.randint(1, 3))
    asked = before + between.join(str(i + 1) for i in numbers) + after
    return f"Which names are these? {asked}", before + between.join(names[i] for i in numbers) + after


def after(rng, text):
    words = text.split()
    i = rng.choice([i for i, word in enumerate(words[:-1]) if words.count(word) == 1])
    return f"Which word stands after {words[i]} ?", words[i + 1]


def say_after_me(rng):
    words = [
        rng.choice((rng.choice(WORDS), rng.choice(sorted(world.LEXICON)))) for _ in range(rng.randint(3, 9))
    ]
    return f"Say: {' '.join(words)}", " ".join(words)


def turns(rng, scene, text, count):
    """[(question, answer)]; (SCRAMBLE, "") stands for tokens drawn at random, to be said again."""
    made = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.25:
            made.append(rng.choice(captions(scene)))
        elif kind < 0.45:
            made.append(rng.choices(questions(scene), (1, 1, 3, 1, 2))[0])  # signs are small, and learnt last
        elif kind < 0.58:
            made.append(list_names(text, rng.choice(list(LISTS)), rng.random() < 0.3))
        elif kind < 0.66:
            made.append(("Repeat the text.", text))
        elif kind < 0.77:
            made.append(ordinal(rng, text))
        elif kind < 0.81:
            made.append(after(rng, text))
        elif kind < 0.91:
            made.append(say_after_me(rng))
        else:
            made.append((SCRAMBLE, ""))
        if len(made) > 1 and SCRAMBLE not in (made[-1][0], made[-2][0]) and rng.random() < 0.3:  # two at once
            (asked, said), (then, more) = made.pop(-2), made.pop()
            made.append((f"{asked} Then: {then}", f"{said}\n{more}"))
    return made


SCRAMBLE = "Say again: "


def generic(size=1500):
    """Turns of the conversations below, as text."""
    rng = random.Random("generic")
    return [
        part
        for _ in range(size)
        for turn in turns(rng, rng.choice(world.scenes()), tweet(rng), 1)
        for part in turn
        if isinstance(part, str)
    ]
