"""Figures and tables of a page as HTML and SVG text: they need no script. Knows neither run nor score.

Everything that is not Markup is text and escaped; colours are the names of the template's custom properties.
"""

import html


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(child):
    return child if isinstance(child, Markup) else html.escape(str(child))


def element(tag, attributes=None, *children):
    """<tag …>children</tag>; None and "" among the children are left out, lists are opened."""
    named = [f' {name}="{html.escape(str(value))}"' for name, value in (attributes or {}).items()]
    return Markup(f"<{tag}{''.join(named)}>{joined(children)}</{tag}>")


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


def small(*children):
    return element("span", {"class": "soft small"}, *children)


def isolated(text):
    """Text of a tweet or a model, whose direction does not touch its surroundings."""
    return element("bdi", {}, text)


def percent(share, digits=1):
    return f"{100 * share:.{digits}f}"


def figure(title, note, *content):
    """A card: title, a line on how to read it, what it shows."""
    note = element("p", {"class": "soft small"}, note) if note else None
    return element("section", {"class": "card"}, element("h3", {}, title), note, *content)


def table(header, rows, name="table"):
    """Rows of cells; the first column is text. name: for screen readers."""
    head = element("tr", {}, *(element("th", {"scope": "col"}, cell) for cell in header))
    body = [element("tr", {}, *(element("td", {}, cell) for cell in row)) for row in rows]
    grid = element("table", {}, element("thead", {}, head), element("tbody", {}, *body))
    return element("div", {"class": "scroll", "tabindex": 0, "role": "group", "aria-label": name}, grid)


def track(share, colour="accent", *more):
    """A bar of `share` of the width."""
    style = f"width: {percent(share, 2)}%; background: var(--{colour})"
    return div("track", element("div", {"class": "fill", "style": style}), *more)


def whisker(low, high):
    """The interval low … high on a track, as shares of its width."""
    style = f"left: {percent(low, 2)}%; width: {percent(high - low, 2)}%"
    return element("div", {"class": "whisker", "style": style})


def bars(rows):
    """rows: (name, share of the width, value, colour, [whisker …])."""
    cells = []
    for name, share, value, colour, more in rows:
        cells += [
            div("name ours" if more else "name", name),
            track(share, colour, *more),
            div("value", value),
        ]
    return div("bars", *cells)


def diverging(header, rows):
    """Two counts a row, to the left and to the right. header: (left, right); rows: (name, colour, left
    count, right count, meaning)."""
    most = max((max(left, right) for _, _, left, right, _ in rows), default=0) or 1
    cells = [div("name"), div("head left", header[0]), div("head", header[1])]
    for name, colour, left, right, meaning in rows:
        cells.append(div("name", dot(colour), name))
        cells.append(side(left, most, colour, "left"))
        cells.append(side(right, most, colour, "right"))
        cells.append(div("soft meaning", meaning))
    return div("bars diverge", *cells)


def side(count, most, colour, where):
    """Half a row of `diverging`: a bar that grows away from the middle, with its count beyond its end."""
    share = 72 * count / most
    style = f"width: {share:.1f}%; background: var(--{colour})"
    fill = element("div", {"class": "fill", "style": style}) if count else None
    towards = "right" if where == "left" else "left"
    label = element("span", {"class": "count", "style": f"{towards}: calc({share:.1f}% + 7px)"}, count)
    return div(f"track {where}", fill, label)


def dot(colour):
    return element("span", {"class": "dot", "style": f"--c: var(--{colour})"})


# -------------------------------------------------------------------------------- a curve

WIDTH, HEIGHT = 480, 240  # of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 10, 34  # margins
STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def curve(points, label):
    """SVG of a curve with a band. points: [(x, y, deviation or None)], x rising, y a share."""
    last = points[-1][0]
    low = min(y - (deviation or 0) for _, y, deviation in points)
    high = max(y + (deviation or 0) for _, y, deviation in points)
    margin = max((high - low) * 0.15, 0.005)
    low = max(0.0, low - margin)
    high = min(1.0, high + margin)

    def place_x(x):
        share = 0.5 if last == 1 else (x - 1) / (last - 1)
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    def place_y(y):
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - low) / (high - low))

    upper = [f"{place_x(x):.1f},{place_y(y + (d or 0)):.1f}" for x, y, d in points]
    lower = [f"{place_x(x):.1f},{place_y(y - (d or 0)):.1f}" for x, y, d in reversed(points)]
    line = [f"{place_x(x):.1f},{place_y(y):.1f}" for x, y, _ in points]
    marks = []
    for x, y, deviation in points:
        spread = f" ± {percent(deviation, 2)}" if deviation is not None else ""
        title = element("title", {}, f"k = {x}: {percent(y, 2)}{spread} %")
        centre = {"class": "point", "cx": f"{place_x(x):.1f}", "cy": f"{place_y(y):.1f}", "r": 4}
        marks.append(element("circle", centre, title))
    return element(
        "svg",
        {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": label},
        grid_lines(low, high, place_y),
        x_ticks(last, place_x),
        element("polygon", {"class": "band", "points": " ".join(upper + lower)}),
        element("polyline", {"class": "curve", "points": " ".join(line)}),
        marks,
    )


def grid_lines(low, high, place_y):
    step = next(step for step in STEPS if high - low <= 5 * step)
    first = -(-low // step)  # rounded up
    parts = []
    for number in range(int((high - first * step) / step + 1e-9) + 1):
        value = (first + number) * step
        y = f"{place_y(value):.1f}"
        parts.append(
            element("line", {"class": "grid-line", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": y, "y2": y})
        )
        label = percent(value, 1 if step < 0.01 else 0)
        parts.append(
            element("text", {"x": LEFT - 8, "y": f"{place_y(value) + 4:.1f}", "text-anchor": "end"}, label)
        )
    return parts


def x_ticks(last, place_x):
    ticks = sorted({1, round(last / 4), round(last / 2), round(3 * last / 4), last} - {0})
    parts = []
    for x in ticks:
        anchor = "end" if x == last > 1 else "middle"
        position = {"x": f"{place_x(x):.1f}", "y": HEIGHT - 14, "text-anchor": anchor}
        parts.append(element("text", position, x))
    return parts
