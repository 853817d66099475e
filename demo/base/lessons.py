"""What a base is taught to say: conversations about a picture and a text of the world. Text alone, no torch.

They hold none of our prompts, tags and quintuples, no name with a type or a relation, and never tell which
name belongs to which figure: that is left to 03 and 04."""

import random

from demo import world

PLAIN = (  # texts beside the world's own
    "{} and {} met today",
    "I saw {} , then {}",
    "{} {}",
    "No news of {} or {} yet",
    "{} , {} and {} again",
    "First {} , later {} and {} !",
)
WORDS = (
    "red", "blue", "green", "day", "night", "left", "right", "person", "child", "city", "hut",
    "stage", "trophy", "crest", "heart", "cap", "ball", "cradle", "poster", "above", "picture",
)  # fmt: skip
LISTS = {  # question: what stands before, between and after the names
    "List the names.": ("", ", ", "."),
    "The names in braces?": ("{", " | ", "}"),
    "Each name in stars.": ("*", "* *", "*"),
    "A line for each name.": ("- ", "\n- ", ""),
    "Names in brackets?": ("[", "] [", "]"),  # Qwen's tokenizer glues a bracket to the word behind it
}
SCRAMBLE = "Say again: "  # tokens drawn at random follow, and are the answer


def tweet(rng):
    """A text with names drawn at random: in the world's words, or plain."""
    template = rng.choice((*world.TEMPLATES[2], *world.TEMPLATES[3], *PLAIN))
    return template.format(*rng.sample(sorted(world.LEXICON), template.count("{}")))


# ------------------------------------------------------------------------------------------------ to see


def captions(scene):
    """Two ways to ask for the whole picture, with their answers."""
    time_of_day = "night" if scene.night else "day"
    sign = f" Above is a {scene.sign}." if scene.sign else ""
    poster = f" A poster has a {scene.poster}." if scene.poster else ""
    sides = f"On the left is a {scene.left}, on the right a {scene.right}."
    described = f"A picture by {time_of_day}. {sides}{sign}{poster}"
    seen = f"I see a {scene.left} and a {scene.right}.{poster}{sign} It is {time_of_day}."
    return (("Describe the picture.", described), ("What can you see?", seen))


def questions(scene):
    """One part of the picture at a time: [(question, answer)]"""
    return (
        ("What is on the left?", f"A {scene.left}."),
        ("What is on the right?", f"A {scene.right}."),
        ("What is above?", f"A {scene.sign}." if scene.sign else "Nothing."),
        ("Is there a poster?", f"A poster of a {scene.poster}." if scene.poster else "No."),
        ("Day or night?", "Night." if scene.night else "Day."),
    )


# ------------------------------------------------------------------------------------------------ to copy


def list_names(text, question="List the names.", backwards=False):
    """(question, answer)"""
    before, between, after = LISTS[question]
    names = world.names_in(text)
    if backwards:
        names.reverse()
        question += " Backwards."
    return question, before + between.join(names) + after


def ordinal(rng, text):
    """Names asked for by their place in the text."""
    names = world.names_in(text)
    before, between, after = rng.choice(list(LISTS.values()))
    places = rng.choices(range(len(names)), k=rng.randint(1, 3))
    asked = before + between.join(str(place + 1) for place in places) + after
    answer = before + between.join(names[place] for place in places) + after
    return f"Which names are these? {asked}", answer


def next_word(rng, text):
    words = text.split()
    places = [i for i, word in enumerate(words[:-1]) if words.count(word) == 1]
    place = rng.choice(places)
    return f"Which word stands after {words[place]} ?", words[place + 1]


def say_after_me(rng):
    words = []
    for _ in range(rng.randint(3, 9)):
        word, name = rng.choice(WORDS), rng.choice(sorted(world.LEXICON))
        words.append(rng.choice((word, name)))
    words = " ".join(words)
    return f"Say: {words}", words


# ------------------------------------------------------------------------------------------------ both


def turns(rng, scene, text, count):
    """[(question, answer)], at most `count`; (SCRAMBLE, "") stands for tokens to be drawn and said again."""
    made = []
    for _ in range(count):
        made.append(turn(rng, scene, text))
        scrambled = SCRAMBLE in [question for question, _ in made[-2:]]
        if len(made) > 1 and not scrambled and rng.random() < 0.3:  # two at once
            then, more = made.pop()
            asked, said = made.pop()
            made.append((f"{asked} Then: {then}", f"{said}\n{more}"))
    return made


def turn(rng, scene, text):
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(captions(scene))
    if kind < 0.45:
        return rng.choices(questions(scene), (1, 1, 3, 1, 2))[0]  # signs are small, and learnt last
    if kind < 0.58:
        return list_names(text, rng.choice(list(LISTS)), rng.random() < 0.3)
    if kind < 0.66:
        return "Repeat the text.", text
    if kind < 0.77:
        return ordinal(rng, text)
    if kind < 0.81:
        return next_word(rng, text)
    if kind < 0.91:
        return say_after_me(rng)
    return SCRAMBLE, ""


def generic(size=1500):
    """Turns as texts, for the tokenizer."""
    rng = random.Random("generic")
    texts = []
    for _ in range(size):
        scene = rng.choice(world.scenes())
        for question, answer in turns(rng, scene, tweet(rng), 1):
            texts += [question, answer]
    return texts
