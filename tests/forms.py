"""How quintuples are written: FORMS, a name → a function from a list of quintuples to a text.

Forms that models were seen to write, or that published prompts ask for; test_reader.py writes real gold sets
in each.
"""

import json

ITEM = "[{0}, {1}, {2}, {3}, {4}]"
ROUND = "({0}, {1}, {2}, {3}, {4})"
FIELDS = "{0}, {1}, {2}, {3}, {4}"
TABLE = "| Head | Head Type | Tail | Tail Type | Relation |\n|---|---|---|---|---|\n"
WIDE_TABLE = (
    "Here is the table:\n\n| # | Head Entity | Relation | Tail Entity | Head Type | Tail Type | Evidence |\n"
    "|:--|:-:|---|---|---|---|---|\n"
)
KEY_LINES = "Head: {0}\nHead Type: {1}\nTail: {2}\nTail Type: {3}\nRelation: {4}"
KEY_BULLETS = (
    "**Quintuple {i}**\n- **Head entity:** {0}\n- **Head type:** {1}\n- **Tail entity:** {2}\n"
    "- **Tail type:** {3}\n- **Relation:** {4}"
)
YAML = "  - head: {0}\n    head_type: {1}\n    tail: {2}\n    tail_type: {3}\n    relation: {4}"
XML = (
    "<quintuple><head>{0}</head><head_type>{1}</head_type><tail>{2}</tail><tail_type>{3}</tail_type>"
    "<relation>{4}</relation></quintuple>"
)
THOUGHTS = "Maybe [A, per, B, loc, peer]? No."

# name: what one quintuple looks like ({0} … {4} its fields, {i} its number), what stands between, before,
# after
TEMPLATES = {
    "canonical": (ITEM, "\n", "", ""),
    "commas between": (ITEM, ", ", "", ""),
    "semicolons between": (ROUND, "; ", "", ""),
    "full-width semicolons between": (ITEM, "；", "", ""),
    "and between": (ITEM, " and ", "", ""),
    "nothing between": (ITEM, "", "", ""),
    "<|> between": (ROUND, "<|>", "", ""),
    "\\n written out": (ITEM, "\\n", "", ""),
    "<br>": (ITEM, "<br>", "", ""),
    "CRLF": (ITEM, "\r\n", "", ""),
    "list of lists": (ITEM, ", ", "[", "]"),
    "list of lists on lines": (f"  {ITEM}", ",\n", "[\n", "\n]"),
    "field a line": ("[\n{0},\n{1},\n{2},\n{3},\n{4}\n]", "\n", "", ""),
    "round brackets": (ROUND, "\n", "", ""),
    "braces": ("{{{0}, {1}, {2}, {3}, {4}}}", "\n", "", ""),
    "Figure 10": (ITEM, ", ", "{", "}"),
    "angle brackets": ("<{0}, {1}, {2}, {3}, {4}>", "\n", "", ""),
    "（full-width）": ("（{0}，{1}，{2}，{3}，{4}）", "\n", "", ""),
    "【】": ("【{0}, {1}, {2}, {3}, {4}】", "\n", "", ""),
    "［］": ("［{0}, {1}, {2}, {3}, {4}］", "\n", "", ""),
    "ideographic commas": ("[{0}、{1}、{2}、{3}、{4}]", "\n", "", ""),
    "back-ticks": (f"`{ITEM}`", "\n", "", ""),
    "bold": (f"**{ITEM}**", "\n", "", ""),
    "bulleted": (f"- {ITEM}", "\n", "", ""),
    "bulleted back-ticks": (f"* `{ITEM}`", "\n", "", ""),
    "numbered": (f"{{i}}. {ITEM}", "\n", "", ""),
    "(1)": (f"({{i}}) {ITEM}", "\n", "", ""),
    "Quintuple 1:": (f"**Quintuple {{i}}:** {ITEM}", "\n", "", ""),
    "Answer:": (ITEM, ", ", "Answer: ", ""),
    "\\boxed": (ITEM, ", ", "\\boxed{", "}"),
    "\\boxed{\\text}": (ITEM, ", ", "$$\\boxed{\\text{", "}}$$"),
    "\\[ \\]": (ITEM, ", ", "\\[ ", " \\]"),
    "$ $": (f"${ITEM}$", "\n", "", ""),
    "one-line fence": (ITEM, " ", "```", "```"),
    "fenced text": (ITEM, "\n", "```text\n", "\n```"),
    "fields in double quotes": ('["{0}", "{1}", "{2}", "{3}", "{4}"]', "\n", "", ""),
    "fields in single quotes": ("('{0}', '{1}', '{2}', '{3}', '{4}')", "\n", "", ""),
    "fields in curly quotes": ("[“{0}”, “{1}”, “{2}”, “{3}”, “{4}”]", "\n", "", ""),
    "items in quotes": (f'"{ITEM}"', "\n", "", ""),
    "bold fields": ("{i}. **{0}**, **{1}**, **{2}**, **{3}**, **{4}**", "\n", "", ""),
    "bare lines": (FIELDS, "\n", "", ""),
    "bare lines, full stop": (f"{FIELDS}.", "\n", "", ""),
    "bare lines, comment": (f"{FIELDS} - the tweet says so", "\n", "", ""),
    "bare, semicolons between fields": ("{0}; {1}; {2}; {3}; {4}", "\n", "", ""),
    "pipes": ("{0} | {1} | {2} | {3} | {4}", "\n", "", ""),
    "tabs": ("{0}\t{1}\t{2}\t{3}\t{4}", "\n", "", ""),
    "table": ("| {0} | {1} | {2} | {3} | {4} |", "\n", TABLE, ""),
    "table, other columns": ("| {i} | {0} | {4} | {2} | {1} | {3} | the tweet |", "\n", WIDE_TABLE, ""),
    "key lines": (KEY_LINES, "\n\n", "", ""),
    "key bullets": (KEY_BULLETS, "\n", "", ""),
    "keys, types in brackets": ("- Head: {0} ({1})\n  Relation: {4}\n  Tail: {2} ({3})", "\n", "", ""),
    "keys in brackets": (
        "[head: {0}, head type: {1}, tail: {2}, tail type: {3}, relation: {4}]",
        "\n",
        "",
        "",
    ),
    "YAML": (YAML, "\n", "quintuples:\n", ""),
    "XML": (XML, "\n", "", ""),
    "arrows": ("{0} ({1}) -> {4} -> {2} ({3})", "\n", "", ""),
    "bold arrows": ("- **{0}** ({1}) → *{4}* → **{2}** ({3})", "\n", "", ""),
    "--[relation]-->": ("{0} ({1}) --[{4}]--> {2} ({3})", "\n", "", ""),
    "e1 (t1), r, e2 (t2)": ("({0} ({1}), {4}, {2} ({3}))", "\n", "", ""),
    "e1 (t1), e2 (t2), r": ("[{0} ({1}), {2} ({3}), {4}]", "\n", "", ""),
    "pairs": ("[({0}, {1}), ({2}, {3}), {4}]", "\n", "", ""),
    "KECPM's sentence": ('The relation between {0} ({1}) and {2} ({3}) is "{4}";', "\n", "", ""),
    "comment behind": (f"{ITEM} (since she works there)", "\n", "", ""),
    "courtesies around": (
        ITEM,
        "\n",
        "Sure! Here are the quintuples I found:\n\n",
        "\n\nLet me know what you think!",
    ),
    "heading": (ITEM, "\n", "### Quintuples\n\n", ""),
    "reasoning, then Final Answer:": (ITEM, "\n", f"{THOUGHTS}\n\n**Final Answer:**\n", ""),
    "think block": (ITEM, "\n", f"<think>{THOUGHTS}</think>\n", ""),
    "think block of the template": (ITEM, "\n", f"{THOUGHTS}\n</think>\n\n", ""),
    "answer tags in capitals": (ITEM, "\n", "<Think>x</Think>\n<Answer>\n", "\n</Answer>"),
    "end of turn": (ITEM, "\n", "", "<|im_end|>"),
}
KEYS = {
    "head …": ("head", "head_type", "tail", "tail_type", "relation"),
    "subject …": ("subject", "subject_type", "object", "object_type", "predicate"),
    "e1 …": ("e1", "t1", "e2", "t2", "r"),
    "headEntity …": ("headEntity", "headType", "tailEntity", "tailType", "relation"),
    "head entity …": ("head entity", "head entity type", "tail entity", "tail entity type", "relation"),
    "entity1 …": ("entity1", "type1", "entity2", "type2", "relation"),
    "source …": ("source", "source_type", "target", "target_type", "relationship"),
}
ORDERS = {
    "": (0, 1, 2, 3, 4),
    ", relation in the middle": (0, 1, 4, 2, 3),
    ", relation first": (4, 0, 1, 2, 3),
}


def from_template(template, between, before, after):
    def write(quintuples):
        items = [template.format(*q, i=i) for i, q in enumerate(quintuples, 1)]
        return before + between.join(items) + after

    return write


def from_keys(keys, order, indent=None):
    def write(quintuples):
        rows = [{keys[k]: q[k] for k in order} for q in quintuples]
        return as_json(rows, indent)

    return write


def as_json(value, indent=None):
    return json.dumps(value, ensure_ascii=False, indent=indent)


def lists(quintuples):
    return [list(q) for q in quintuples]


def objects(quintuples):
    return [dict(zip(KEYS["head …"], q, strict=True)) for q in quintuples]


def nested(q):
    return {"head": {"name": q[0], "type": q[1]}, "tail": {"name": q[2], "type": q[3]}, "relation": q[4]}


def neo4j(q):
    relation = q[4].upper().replace(" ", "_")
    return {"source": {"id": q[0], "type": q[1]}, "target": {"id": q[2], "type": q[3]}, "type": relation}


def jmere(q):
    """As the EEGA release labels a tweet."""
    first = {"name": q[0], "pos": [0, 1], "tags": q[1]}
    second = {"name": q[2], "pos": [3, 4], "tags": q[3]}
    return {"beg_ent": first, "sec_ent": second, "relation": q[4].replace(" ", "_")}


def keyword_arguments(q):
    given = ", ".join(f"{key}={as_json(field)}" for key, field in zip(KEYS["head …"], q, strict=True))
    return f"Quintuple({given})"


def long_types(q):
    names = {"per": "Person", "org": "Organization", "loc": "Location", "misc": "Miscellaneous"}
    return ITEM.format(q[0], names[q[1]], q[2], names[q[3]], q[4])


def shouted(q):
    return ITEM.format(q[0], q[1].upper(), q[2], q[3].upper(), q[4].upper().replace(" ", "_"))


def camel(q):
    first, *rest = q[4].split()
    return ITEM.format(*q[:4], first + "".join(word.title() for word in rest))


def csv(quintuples):
    rows = [",".join(f'"{field}"' if "," in field else field for field in q) for q in quintuples]
    return "\n".join([",".join(KEYS["head …"]), *rows])


FORMS = {name: from_template(*parts) for name, parts in TEMPLATES.items()}
for keys_name, keys in KEYS.items():
    for order_name, order in ORDERS.items():
        FORMS[f"objects {keys_name}{order_name}"] = from_keys(keys, order)
FORMS |= {
    "lists": lambda qs: as_json(lists(qs)),
    "lists, ASCII": lambda qs: json.dumps(lists(qs)),
    "lists, pretty": lambda qs: as_json(lists(qs), 2),
    "objects, pretty": lambda qs: as_json(objects(qs), 4),
    "list a line": lambda qs: "\n".join(map(as_json, lists(qs))),
    "object a line": lambda qs: "\n".join(map(as_json, objects(qs))),
    "nested objects": lambda qs: as_json([nested(q) for q in qs]),
    "Neo4j relationships": lambda qs: as_json({"relationships": [neo4j(q) for q in qs]}),
    "JMERE's own": lambda qs: as_json([jmere(q) for q in qs]),
    "wrapper": lambda qs: as_json({"quintuples": lists(qs)}),
    "wrapper, further keys": lambda qs: as_json(
        {"reasoning": "So it is.", "quintuples": objects(qs), "score": 0.9}
    ),
    "fenced JSON": lambda qs: f"```json\n{as_json(lists(qs), 2)}\n```",
    "talk, fenced JSON, talk": lambda qs: (
        f"Here:\n\n```json\n{as_json(objects(qs), 2)}\n```\n\nNote: (probably) so."
    ),
    "trailing commas": lambda qs: "[\n" + "".join(f"  {as_json(row)},\n" for row in lists(qs)) + "]",
    "comments #": lambda qs: "[\n" + "".join(f"  {as_json(row)},  # so it says\n" for row in lists(qs)) + "]",
    "comments //": lambda qs: (
        "[\n" + "".join(f"  {as_json(row)}, // as it says\n" for row in objects(qs)) + "]"
    ),
    "strings": lambda qs: as_json([FIELDS.format(*q) for q in qs]),
    "strings with brackets": lambda qs: as_json([ITEM.format(*q) for q in qs]),
    "answer in a string": lambda qs: as_json({"answer": "\n".join(ITEM.format(*q) for q in qs)}),
    "JSON escaped": lambda qs: as_json(lists(qs)).replace('"', '\\"'),
    "Python tuples": lambda qs: repr([tuple(q) for q in qs]),
    "Python dicts": lambda qs: repr(objects(qs)),
    "Python set": lambda qs: "{" + ", ".join(repr(tuple(q)) for q in qs) + "}",
    "Python assignment": lambda qs: "```python\nquintuples = " + repr([tuple(q) for q in qs]) + "\n```",
    "keyword arguments": lambda qs: "\n".join(map(keyword_arguments, qs)),
    "long types": lambda qs: "\n".join(map(long_types, qs)),
    "capitals": lambda qs: "\n".join(map(shouted, qs)),
    "camelCase": lambda qs: "\n".join(map(camel, qs)),
    "CSV": csv,
}
