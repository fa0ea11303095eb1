import copy
import html as entities
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from pared.errors import InputError
from pared.report import html, report

VOID = {"meta", "br", "wbr"}


class Checked(HTMLParser):
    """Every tag is closed in order; nothing is fetched or run."""

    def __init__(self):
        super().__init__()
        self.open, self.found, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("src", "href", "xlink:href"), (tag, name, value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def checked(page):
    parser = Checked()
    parser.feed(page)
    assert parser.open == []
    return parser


def text_of(page):
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.S).replace("<wbr>", "")
    return re.sub(r"\s+", " ", entities.unescape(re.sub(r"<[^>]+>", " ", body)))


def test_the_page_is_whole_and_fetches_nothing(result, large_result):
    for each in (result, large_result):
        page = html(each)
        checked(page)
        assert "http" not in page and "url(" not in page and "@import" not in page
        assert len(page) < 2_000_000


def test_headline_figures_are_those_of_the_result(result):
    result["before"]["file_bytes"], result["after"]["file_bytes"] = 1_724_320, 39_842
    text = text_of(html(result))
    assert "43.3×" in text and "1.72 MB → 39.8 kB" in text
    assert "0.13 points lost" in text
    assert "2.27× fewer MACs" in text
    assert "between −0.08 and 0.34; it cannot be told from none" in text
    assert "on 10,000 test examples" in text


def test_what_is_not_faster_is_said_to_be_not_faster(result):
    text = text_of(html(result))
    assert "not faster in torch" in text
    assert "2.11× faster in onnxruntime" in text
    result["after"]["latency_ms"]["torch"]["median"] = 0.9
    assert "2.18× slower in torch" in text_of(html(result))


def test_a_budget_that_is_missed_is_said(result):
    assert "drop at most 0.3: met" in text_of(html(result))
    result["met"], result["warnings"] = False, ["the budget is not met: ask for less"]
    text = text_of(html(result))
    assert "not met" in text and "ask for less" in text


def test_a_gain_is_not_called_a_loss(result):
    result["drop_pp"].update(value=-0.2, low=-0.4, high=-0.1)
    text = text_of(html(result))
    assert "0.20 points gained" in text and "+0.20 points" in text


def test_percentages_of_an_unbounded_score_are_named(result):
    result["drop_pp"].update(unit="%", value=1.5)
    result["after"]["metric"].update(name="log likelihood", value=-2.31)
    text = text_of(html(result))
    assert "1.50 % of the original lost" in text and "−2.31" in text


def test_groups_are_told(result):
    result["drop_pp"]["n_groups"] = 20
    assert "from 20 independent groups" in text_of(html(result))


SECTIONS = {
    "Bytes per layer": ["edits"],
    "Which layer hurts": ["sensitivity"],
    "Predicted and found": ["predicted_measured", "curve", "trials"],
    "Plans carried out": ["trials"],
    "Training": ["training"],
    "Layer by layer": ["edits"],
    "What was refused": ["refusals"],
    "What was left alone": ["untouched"],
    "To repeat it": ["recipe", "command"],
    "Circumstances": ["environment", "seconds", "seed", "data", "model"],
    "Before and after": ["after", "agreement"],
}


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("absent", ["missing", "none", "empty"])
def test_a_section_without_data_disappears(result, section, absent):
    heading = f"<h2>{section}</h2>"
    assert heading in html(result)
    for key in SECTIONS[section]:
        if absent == "missing":
            del result[key]
        elif absent == "none":
            result[key] = None
        else:
            result[key] = None if key == "seed" else type(result[key])()
    page = html(result)
    checked(page)
    assert heading not in page


def test_every_key_may_be_missing(result):
    checked(html({}))
    for key in result:
        checked(html({name: value for name, value in result.items() if name != key}))
        checked(html({key: result[key]}))


def test_numbers_that_are_missing_or_not_finite_do_not_break_the_page(result):
    def broken(value, bad):
        if isinstance(value, dict):
            return {key: broken(each, bad) for key, each in value.items()}
        if isinstance(value, list):
            return [broken(each, bad) for each in value]
        return value if isinstance(value, str | bool) else bad

    for bad in (None, float("nan"), float("inf"), 0, -1, 1e300, 1e-300, "x"):
        checked(html(broken(copy.deepcopy(result), bad)))


def test_hostile_names_are_shown_and_not_run(result):
    evil = '<script>alert("x")</script>\'"><img src=x onerror=alert(1)>{{ 7*7 }}'

    def poisoned(value):
        if isinstance(value, dict):
            return {key: poisoned(each) for key, each in value.items()}
        if isinstance(value, list):
            return [poisoned(each) for each in value]
        return value + evil if isinstance(value, str) else value

    bad = poisoned(result)
    bad["drop_pp"]["unit"] = "pp"
    bad["after"]["latency_ms"] = {evil: bad["after"]["latency_ms"]["torch"]}
    bad["before"]["latency_ms"] = {evil: bad["before"]["latency_ms"]["torch"]}
    bad["environment"][evil] = evil
    bad["seconds"][evil] = 1.0
    page = html(bad)
    checked(page)
    assert evil not in page
    assert "7*7" in page


def test_a_heat_map_tells_every_value(result):
    page = html(result)
    for row in result["sensitivity"]:
        assert f'title="{row["path"]}, ' in page
    assert page.count("chosen") >= len(result["edits"])
    assert "damage" in page


def test_the_worst_option_has_the_deepest_colour(result):
    result["sensitivity"] = [
        {"path": "fc", "technique": f"quantize.integer(bits={bits})", "stored_bits": bits, "damage": damage}
        for bits, damage in ((2, 1.0), (4, 0.1), (8, 0.01))
    ]
    depths = [float(d) for d in re.findall(r"--d:([\d.]+)", html(result))]
    assert depths == sorted(depths, reverse=True) and depths[0] > 0.9 and depths[2] < 0.1
    assert depths[0] - depths[1] == pytest.approx(depths[1] - depths[2], abs=0.011)


def test_bars_are_on_one_scale_and_the_small_layers_share_a_line(large_result):
    page = html(large_result)
    widths = [float(w) for w in re.findall(r'class="old"[^>]*width="([\d.]+)%"', page)]
    assert widths[0] == 100 and widths == sorted(widths, reverse=True) and len(widths) == 40
    assert "60 smaller ones together" in page


def test_points_on_the_diagonal_are_drawn_on_the_diagonal(result):
    result["predicted_measured"] = [
        {"path": "a", "technique": "t", "predicted": value, "measured": value} for value in (1e-4, 1e-3, 1e-2, 1e-1)
    ]
    page = html(result)
    figure = page[page.index("Predicted against measured") :]
    points = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', figure[: figure.index("</figure>")])
    slope = [(float(b[1]) - float(a[1])) / (float(b[0]) - float(a[0])) for a, b in pairwise(points)]
    assert len(points) == 4 and max(slope) - min(slope) < 0.01 and slope[0] < 0
    assert "rank correlation 1.00" in page


def test_plots_have_words_for_those_who_cannot_see_them(result):
    page = html(result)
    assert page.count("<svg") == len(re.findall(r'<svg[^>]*(aria-label="[^"]+"|aria-hidden="true")', page))


def test_a_file_is_written_and_a_place_that_cannot_be_is_named(result, tmp_path):
    report(json.loads(json.dumps(result)), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(InputError, match="must be written to"):
        report(result, tmp_path / "none" / "report.html")


@pytest.mark.parametrize(
    "bad, where",
    [([], "result"), ({"edits": {}}, "edits"), ({"after": 3}, "after"), ({"after": {"metric": []}}, "after.metric")],
)
def test_what_is_no_result_is_named(bad, where):
    with pytest.raises(InputError, match=where):
        html(bad)


def test_how_the_drop_was_accepted_is_told(result):
    stated = {"max_drop": 0.5, "drop": 0.21, "standard_error": 0.17, "margin": 0.17, "n": 2000, "n_groups": 2000, "unit": "pp"}
    result["acceptance"] = stated
    text = text_of(html(result))
    assert "On validation data the drop was 0.21 points; with a margin of 0.17 for chance, against 0.5" in text
    assert "asked for, it was accepted." in text
    result["acceptance"] = {**stated, "drop": 0.4}
    assert "it was not accepted" in text_of(html(result))
