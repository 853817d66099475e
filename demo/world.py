"""The picture world (stub: texts only, for the tokenizer)."""


def corpus():
    names = [
        "Alice",
        "Bob",
        "Carol",
        "Dave",
        "Emma",
        "Frank",
        "Grace",
        "Henry",
        "Lions",
        "Tigers",
        "Eagles",
        "Paris",
        "London",
        "Berlin",
        "Oscar",
        "Nobel",
        "Grammy",
    ]
    return [f"{name} meets {other} at the game today . [{name}, per, {other}, org, member of]" for name in names for other in names]
