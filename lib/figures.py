"""Figures and tables of a page as HTML and SVG text: they need no script. Knows neither run nor score.

Everything that is not Markup is text and escaped; colours are the names of the template's custom properties.
"""

import html


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(child):
    if isinstance(child, Markup):
        return child
    return html.escape(str(child))


def element(tag, attributes=None, *children):
    """<tag …>children</tag>; None and "" among the children are left out, lists are opened."""
    named = ""
    for name, value in (attributes or {}).items():
        named += f' {name}="{html.escape(str(value))}"'
    return Markup(f"<{tag}{named}>{joined(children)}</{tag}>")


def joined(children):
    """Children as Markup."""
    text = ""
    for child in children:
        if isinstance(child, list | tuple):
            text += joined(child)
        elif child is not None:
            text += escaped(child)
    return Markup(text)


def div(name, *children):
    return element("div", {"class": name}, *children)


def span(name, *children):
    return element("span", {"class": name}, *children)


def paragraph(name, *children):
    return element("p", {"class": name}, *children)


def card(name, *children):
    return element("section", {"class": f"card {name}"}, *children)


def small(*children):
    return span("soft small", *children)


def isolated(text):
    """Text of a tweet or a model, whose direction does not touch its surroundings."""
    return element("bdi", {}, text)


def percent(share, digits=1):
    return f"{100 * share:.{digits}f}"


def figure(title, note, *content):
    """A card: title, a line on how to read it, what it shows."""
    title = element("h3", {}, title)
    if note:
        note = paragraph("soft small", note)
    return card("", title, note, *content)


def table(header, rows, name="table"):
    """Rows of cells; the first column is text. name: for screen readers."""
    titles = [element("th", {"scope": "col"}, cell) for cell in header]
    head = element("thead", {}, element("tr", {}, titles))
    body = []
    for row in rows:
        cells = [element("td", {}, cell) for cell in row]
        body.append(element("tr", {}, cells))
    grid = element("table", {}, head, element("tbody", {}, body))
    attributes = {"class": "scroll", "tabindex": 0, "role": "group", "aria-label": name}
    return element("div", attributes, grid)


def track(share, colour="accent", *more):
    """A bar of `share` of the width."""
    return div("track", fill(percent(share, 2), colour), *more)


def fill(width, colour):
    style = f"width: {width}%; background: var(--{colour})"
    return element("div", {"class": "fill", "style": style})


def whisker(low, high):
    """The interval low … high on a track, as shares of its width."""
    style = f"left: {percent(low, 2)}%; width: {percent(high - low, 2)}%"
    return element("div", {"class": "whisker", "style": style})


def bars(rows):
    """rows: (name, share of the width, value, colour, [whisker …])."""
    cells = []
    for name, share, value, colour, more in rows:
        cells.append(div("name ours" if more else "name", name))
        cells.append(track(share, colour, *more))
        cells.append(div("value", value))
    return div("bars", *cells)


def diverging(header, rows):
    """Two counts a row, to the left and to the right. header: (left, right); rows: (name, colour, left
    count, right count, meaning)."""
    most = 1
    for _, _, left, right, _ in rows:
        most = max(most, left, right)
    before, after = header
    cells = [div("name"), div("head left", before), div("head", after)]
    for name, colour, left, right, meaning in rows:
        cells.append(div("name", dot(colour), name))
        cells.append(side(left, most, colour, "left"))
        cells.append(side(right, most, colour, "right"))
        cells.append(div("soft meaning", meaning))
    return div("bars diverge", *cells)


def side(count, most, colour, where):
    """Half a row of `diverging`: a bar that grows away from the middle, with its count beyond its end."""
    share = f"{72 * count / most:.1f}"
    bar = fill(share, colour) if count else None
    towards = "right" if where == "left" else "left"
    style = f"{towards}: calc({share}% + 7px)"
    label = element("span", {"class": "count", "style": style}, count)
    return div(f"track {where}", bar, label)


def dot(colour):
    return element("span", {"class": "dot", "style": f"--c: var(--{colour})"})


# -------------------------------------------------------------------------------- a curve

WIDTH, HEIGHT = 480, 240  # of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 10, 34  # margins
STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def curve(points, label):
    """SVG of a curve with a band. points: [(x, y, deviation or None)], x rising, y a share."""
    last, _, _ = points[-1]
    bands = [(x, y - (deviation or 0), y + (deviation or 0)) for x, y, deviation in points]
    low = min(bottom for _, bottom, _ in bands)
    high = max(top for _, _, top in bands)
    margin = max((high - low) * 0.15, 0.005)
    low = max(0.0, low - margin)
    high = min(1.0, high + margin)

    def place_x(x):
        if last == 1:
            return WIDTH / 2
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - 1) / (last - 1)

    def place_y(y):
        share = (y - low) / (high - low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    def place(x, y):
        return f"{place_x(x):.1f},{place_y(y):.1f}"

    upper = [place(x, top) for x, _, top in bands]
    lower = [place(x, bottom) for x, bottom, _ in reversed(bands)]
    band = " ".join(upper + lower)
    line = " ".join(place(x, y) for x, y, _ in points)
    marks = []
    for x, y, deviation in points:
        spread = f" ± {percent(deviation, 2)}" if deviation is not None else ""
        title = element("title", {}, f"k = {x}: {percent(y, 2)}{spread} %")
        cx, cy = place(x, y).split(",")
        centre = {"class": "point", "cx": cx, "cy": cy, "r": 4}
        marks.append(element("circle", centre, title))
    return element(
        "svg",
        {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": label},
        grid_lines(low, high, place_y),
        x_ticks(last, place_x),
        element("polygon", {"class": "band", "points": band}),
        element("polyline", {"class": "curve", "points": line}),
        marks,
    )


def grid_lines(low, high, place_y):
    step = next(step for step in STEPS if high - low <= 5 * step)
    first = -(-low // step)  # rounded up
    beyond = int(high / step + 1e-9) + 1
    digits = 1 if step < 0.01 else 0
    parts = []
    for number in range(int(first), beyond):
        value = number * step
        y = place_y(value)
        ends = {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
        parts.append(element("line", {"class": "grid-line", **ends}))
        position = {"x": LEFT - 8, "y": f"{y + 4:.1f}", "text-anchor": "end"}
        parts.append(element("text", position, percent(value, digits)))
    return parts


def x_ticks(last, place_x):
    ticks = {round(last * quarter / 4) for quarter in (1, 2, 3, 4)}
    ticks.add(1)
    parts = []
    for x in sorted(ticks - {0}):
        anchor = "end" if x == last > 1 else "middle"
        position = {"x": f"{place_x(x):.1f}", "y": HEIGHT - 14, "text-anchor": anchor}
        parts.append(element("text", position, x))
    return parts
