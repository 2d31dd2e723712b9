"""Checks that every link in the given Markdown or HTML files, and in the folders of such, leads to something that is there.

Of a link with a `#`, what follows has to be a heading of the page, or an `id` in it. Links to other sites are not followed.
"""

import html.parser
import pathlib
import re
import sys
import urllib.parse

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*$")
INCLUDE = re.compile(r"\{\{#include ([^}:]+)\}\}")


class Html(html.parser.HTMLParser):
    """The links of a page, each with its line, and what can be linked to in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and tag != "base":
                self.links.append((self.getpos()[0], value))


class Markdown:
    """The same of a page in Markdown, whose headings have the ids that GitHub and mdBook give them."""

    def __init__(self, text, path):
        self.links, self.anchors = [], set()
        in_code = False
        for number, line in enumerate(text.splitlines(), 1):
            if line.lstrip().startswith("```"):
                in_code = not in_code
            if in_code:
                continue
            if heading := HEADING.match(line):
                self.anchors.add(self.unused(anchor(heading[1])))
            self.anchors.update(re.findall(r'<a id="([^"]+)">', line))
            if included := INCLUDE.fullmatch(line.strip()):
                # What a page takes in is its own.
                self.anchors |= page((path.parent / included[1]).resolve()).anchors
            without_code = re.sub(r"`[^`]*`", "`code`", line)
            self.links += [(number, link) for link in LINK.findall(without_code)]

    def unused(self, name):
        """The same heading a second time has `-1` after its id."""
        number, tried = 0, name
        while tried in self.anchors:
            number += 1
            tried = f"{name}-{number}"
        return tried


def anchor(heading):
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


PAGES = {}


def page(path):
    if path not in PAGES:
        text = path.read_text(encoding="utf-8")
        PAGES[path] = Html(text) if path.suffix == ".html" else Markdown(text, path)
    return PAGES[path]


def fault(path, link):
    """What is wrong with a link of a page, if anything is."""
    parts = urllib.parse.urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    to = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
    if not to.exists():
        return "there is no such file"
    if parts.fragment and to.suffix in (".md", ".html"):
        if urllib.parse.unquote(parts.fragment) not in page(to).anchors:
            return "the page has no such heading"
    return None


def main(arguments):
    paths = []
    for given in map(pathlib.Path, arguments):
        within = sorted(path for path in given.rglob("*") if path.suffix in (".md", ".html"))
        paths += within if given.is_dir() else [given]
    checked, wrong = 0, 0
    for path in (path.resolve() for path in paths):
        for line, link in page(path).links:
            checked += 1
            if why := fault(path, link):
                wrong += 1
                print(f"{path.relative_to(pathlib.Path.cwd())}:{line}: {link}: {why}", file=sys.stderr)
    print(f"{checked} links in {len(paths)} pages, {wrong} of them lead nowhere", file=sys.stderr)
    return 1 if wrong or not checked else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
