# SPDX-License-Identifier: Apache-2.0
"""The page: what it says, that it needs nothing from outside, and that it opens in a browser without a network."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import reports
from hansa.core import storage
from hansa.sinks.report import _data_figures, page, selection, verdict, write
from hansa.sinks.summary import Row, Summary, summary

VOID = {"meta", "link", "br", "path", "use", "rect", "line", "polyline", "polygon", "circle"}


class Reader(HTMLParser):
    """Collects text, ids and attributes, and checks that elements nest."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.text, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def words(html: str) -> str:
    return " ".join(" ".join(read(html).text).split())


def test_the_page_has_the_numbers_and_says_how_they_were_made():
    shown = words(page(reports.report()))
    for expected in (
        "Base model 10.00 10.00",
        "Local only 5.500 10.25",
        "Federated 6.750 7.000",
        "Central (the ceiling) 6.000 6.250",
        "perplexity on held-out data; lower is better",
        "averaged over 2 sites, each counting once",
        "one value over all sites’ held-out data pooled",
        "everyone’s is the mean over the sites’ models",
        "a 8.000 5.000 6.000 5.500 30 train, 10 test",
        "1,234,567 parameters trained",
        "9.0 MB sent in all: 6.0 MB down, 3.0 MB up",
        "1 b late took 3.00 s, the deadline is 2 s",
        "Nothing was chosen on held-out data",
        "0" * 64,
        '"rounds": 3',
    ):
        assert expected in shown, expected


def test_the_verdict_is_said_whichever_way_it_went():
    lines = verdict(summary(reports.report()))
    assert lines == [
        "On everyone's held-out data the federated model (7.000) is better than base (10.00) and local only (10.25).",
        "On the sites' own held-out data the federated model (6.750) is better than base (10.00) and worse than "
        "local only (5.500).",
    ]
    rows = (Row("base", 0.5, 0.5, {}), Row("federated", 0.5, 0.4, {}))
    assert verdict(Summary("f1", "max", rows, ("a",), ())) == [
        "On everyone's held-out data the federated model (0.4000) is worse than base (0.5000).",
        "On the sites' own held-out data the federated model (0.5000) is equal to base (0.5000).",
    ]
    assert verdict(Summary("f1", "max", rows[:1], ("a",), ())) == []


def test_a_choice_made_on_held_out_data_is_called_optimistic():
    best = reports.report(settings={"output": {"model": "best"}})
    assert "optimistic" in selection(best)[0]
    assert "optimistic" in words(page(best))
    stopped = reports.report(settings={"rounds": 9, "evaluation": {"patience": 1}})
    assert "When to stop was chosen on the data" in selection(stopped)[0]
    assert "optimistic" not in words(page(reports.report()))


def test_samples_are_shown_before_and_after_and_are_no_markup():
    samples = [{"prompt": "def f(", "before": "<script>alert(1)</script>", "after": "x): return x & 1"}]
    html = page(reports.report(samples=samples))
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "x): return x &amp; 1" in html


def test_a_hostile_name_is_no_markup():
    values = reports.report()
    values["sites"][0]["site"] = values["rounds"][0]["absent"][0]["site"] = '"><img src=x onerror=alert(1)>'
    values["sites"][0]["labels"] = {"<b>$\\frac$</b>": 3}
    html = page(values)
    assert "<img" not in html
    assert "<b>$" not in html
    assert "$\\frac$" in html
    read(html)


def test_nothing_comes_from_outside_and_ids_are_unique():
    reader = read(page(reports.report()))
    assert len(reader.ids) == len(set(reader.ids)) > 10
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith("#") or value == "data:,", (name, value)
    html = page(reports.report())
    assert not re.search(r"https?://|@import|<script|<iframe", html)
    assert re.findall(r"url\((?!#)", html) == []


def test_the_same_report_gives_the_same_bytes():
    assert page(reports.report()) == page(reports.report())


def test_what_a_run_does_not_have_is_left_out():
    bare = reports.report(sites=[], rounds=[], baselines={}, model=None)
    shown = words(page(bare))
    assert "No model has been judged" in shown
    assert "<svg" not in page(bare)
    assert "No round has ended yet" in shown


def test_many_sites_and_labels_are_cut_and_said_to_be():
    sites = [
        {"site": f"site-{i:03d}", "counts": {"train": i + 1}, "labels": {f"label {j}": j + 1 for j in range(40)}}
        for i in range(100)
    ]
    shown = words(page(reports.report(sites=sites)))
    assert "The first 60 of 100 sites." in shown
    assert "The 24 most frequent of 40 labels." in shown


def test_it_is_written_from_report_json(tmp_path):
    storage.write_json(tmp_path / "report.json", reports.report())
    path = write(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text() == page(reports.report())


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("needs a chromium on the path: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        options += ["--disable-background-networking", "--disable-component-update"]
        started = playwright.chromium.launch(executable_path=found, args=options)
        yield started
        started.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_in_a_browser_without_a_network(browser, tmp_path: Path, width: int, scheme: str):
    storage.write_json(tmp_path / "report.json", reports.report())
    context = browser.new_context(offline=True, viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    asked, problems = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(write(tmp_path).as_uri())
    tab.wait_for_load_state("load")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert problems == []
    assert tab.locator("figure svg").count() == 5
    assert tab.locator("figure svg").first.bounding_box()["width"] > 250
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
    assert dark == (scheme == "dark")
    context.close()


@pytest.mark.filterwarnings("error")
def test_many_long_labels_leave_room_for_their_cells() -> None:
    plots = pytest.importorskip("hansa.sinks.plots")
    labels = [f"a_rather_long_name_of_a_label_{i}" for i in range(77)]
    sites = [{"site": f"site-{i}", "counts": {"train": 9}, "labels": dict.fromkeys(labels, 1)} for i in range(6)]
    figure = _data_figures(sites, plots)[-1]
    assert figure["title"] == "Labels at each site"
    assert labels[0] not in figure["svg"]
    assert plots.shortened(labels[0]) in figure["svg"]
