"""The page in Chromium: curves move, filters and keys work, text stays text, nothing else loads."""

import re
from contextlib import contextmanager

import pytest
from dashboard_process import Dashboard, write_run
from live_run import HOSTILE

from rlsys.dashboard.queries import MAX_ROWS

pytestmark = pytest.mark.slow

VIEWS = ("overview", "completions", "completions?row=42-1-1", "time", "health")
SIZES = {"wide": (1280, 900), "phone": (390, 844)}


@pytest.fixture
def open_page(browser, dashboard):
    """Opens a view; at the end no page had an error or asked another host."""
    problems: list[str] = []
    contexts = []

    def open_page(hash: str, *, size: str = "wide", scheme: str = "light", url: str | None = None):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        base = url or dashboard.url
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on(
            "console",
            lambda line: problems.append(f"console: {line.text}") if line.type == "error" else None,
        )
        page.on(
            "request",
            lambda r: None if r.url.startswith(base) else problems.append(f"elsewhere: {r.url}"),
        )
        page.goto(base + hash)
        page.set_default_timeout(30_000)
        page.problems = problems
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@contextmanager
def refused(page):
    """The browser itself reports answers of 4xx as errors: these are expected here."""
    before = len(page.problems)
    yield
    page.wait_for_timeout(50)
    expected = [text for text in page.problems[before:] if "Failed to load resource" in text]
    assert expected
    page.problems[before:] = [t for t in page.problems[before:] if t not in expected]


def run_id(page, name: str) -> str:
    """The id under which the API has a run."""
    found = page.evaluate("fetch('/api/runs').then((answer) => answer.json())")
    return next(run["id"] for run in found if run["name"] == name)


def view(open_page, hash: str, name: str = "seed0", **options):
    """A view of one run."""
    page = open_page("", **options)
    page.goto(page.url.split("#")[0] + hash.replace("RUN", run_id(page, name)))
    return page


def count(page) -> int:
    """The completions that the table says it has."""
    page.wait_for_selector(".note:has-text('completions')")
    return int(re.sub(r"\D.*", "", page.inner_text("p.note").replace(",", "")))


def test_curves_of_a_live_run_move(open_page):
    page = view(open_page, "#/overview?runs=RUN", "live")
    chart = page.locator(".chart", has=page.locator("h3", has_text=re.compile("^reward$")))
    chart.locator("canvas").wait_for()
    picture = "element => element.querySelector('canvas').toDataURL()"
    before, shown = chart.evaluate(picture), chart.locator(".readout").inner_text()
    assert re.match(r"step \d", shown)
    page.wait_for_function(
        "before => [...document.querySelectorAll('.readout')][0].innerText !== before", arg=shown
    )
    assert chart.evaluate(picture) != before


def test_seeds_are_one_curve_with_a_band(open_page):
    page = open_page("")
    ids = f"{run_id(page, 'seed0')},{run_id(page, 'seed1')}"
    page.goto(f"{page.url.split('#')[0]}#/overview?runs={ids}")
    page.locator(".legend small").wait_for()
    assert "mean of 2" in page.inner_text(".legend")
    page.get_by_label("Seeds as mean and range").uncheck()
    page.wait_for_function("document.querySelectorAll('.legend li').length === 2")
    assert "seeds=0" in page.url
    assert page.locator("th:has-text('seed')").count()


def test_a_metric_is_added_by_name(open_page):
    page = view(open_page, "#/overview?runs=RUN")
    page.wait_for_selector(".chart canvas")
    page.keyboard.press("/")
    page.keyboard.type("rewards/*/mean")
    page.keyboard.press("Enter")
    page.wait_for_selector("h3:has-text('rewards/countdown/mean')")
    assert page.locator("h3:has-text('rewards/format/mean')").count() == 1
    page.keyboard.type("no such metric")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=No metric is called no such metric.")
    page.reload()
    page.wait_for_selector("h3:has-text('rewards/countdown/mean')")


def test_filters_sorting_and_links(open_page):
    page = view(open_page, "#/completions?run=RUN")
    assert count(page) == 60 * 8
    page.fill("#where", "countdown = 1 and step > 50")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=20 completions")
    page.fill("#grep", "give up")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=No completion fits.")
    page.fill("#where", "")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=120 completions")
    page.get_by_title("Sort by step").click()
    page.get_by_title("Sort by step").click()
    page.wait_for_selector("[role=columnheader][aria-sort=ascending]")
    assert page.locator("[role=gridcell].c-step").first.inner_text() == "1"
    page.reload()
    page.wait_for_selector("text=120 completions")
    assert page.input_value("#grep") == "give up"


@pytest.mark.parametrize("where", ["nothing = 1", "1; drop table completions", "reward ="])
def test_a_bad_condition_is_explained(open_page, where):
    page = view(open_page, "#/completions?run=RUN")
    count(page)
    with refused(page):
        page.fill("#where", where)
        page.keyboard.press("Enter")
        page.wait_for_selector(".failed")
    assert where in page.inner_text(".failed")
    page.fill("#where", "reward = 2")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=120 completions")


def test_a_table_longer_than_an_answer_is_scrolled_to_its_end(open_page, tmp_path):
    write_run(tmp_path / "long", 300).wait()
    assert MAX_ROWS < 300 * 8
    dashboard = Dashboard(tmp_path)
    page = open_page("#/completions?sort=step&asc=1", url=dashboard.url)
    assert count(page) == 2400
    page.eval_on_selector(".table", "table => table.scrollTo(0, table.scrollHeight)")
    page.wait_for_selector(f"[aria-rowindex='{2400}'] .c-step:text('300')")
    assert page.locator("[role=row]").count() < 100
    dashboard.stop()


def test_everything_works_by_keyboard(open_page):
    page = view(open_page, "#/overview?run=RUN&runs=RUN")
    page.wait_for_selector(".chart canvas")
    page.keyboard.press("l")
    page.keyboard.press("]")
    page.wait_for_function("location.hash.includes('log=1')")
    page.wait_for_function("location.hash.includes('smooth=0.1')")
    page.focus(".plot")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelector('.readout').innerText.startsWith('step 59')")
    page.keyboard.press("+")
    page.wait_for_function("location.hash.includes('x=')")
    page.keyboard.press("0")
    page.wait_for_function("!location.hash.includes('x=')")

    page.keyboard.press("2")
    count(page)
    page.keyboard.press("/")
    page.keyboard.type("reward = 2")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=120 completions")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector(".detail h2:has-text('#0')")
    page.keyboard.press("n")
    page.wait_for_selector(".detail h2:has-text('#1')")
    page.keyboard.press("Escape")
    page.wait_for_selector(".detail", state="detached")

    page.keyboard.press("3")
    page.wait_for_selector("canvas[aria-label*='Timeline']")
    page.keyboard.press("a")
    page.wait_for_function("location.hash.includes('from=')")
    whole = page.url
    page.keyboard.press("+")
    page.wait_for_function("whole => location.href !== whole", arg=whole)
    page.keyboard.press("0")
    page.wait_for_function("!location.hash.includes('from=')")
    page.keyboard.press("4")
    page.wait_for_selector("h2:has-text('Warnings')")
    page.keyboard.press("?")
    page.wait_for_selector(".help")
    page.keyboard.press("Escape")
    page.wait_for_selector(".help", state="detached")


def test_what_the_model_wrote_is_shown_as_text(open_page):
    page = view(open_page, "#/completions?run=RUN&where=index+%3D+2&sort=step")
    page.locator("[role=row][aria-rowindex='1']").click()
    page.wait_for_selector(".detail .siblings article")
    detail = page.inner_text(".detail")
    assert detail.count(HOSTILE) >= 3, "in the prompt, the completion and among its siblings"
    page.goto(page.url.split("#")[0] + f"#/health?run={run_id(page, 'seed0')}")
    page.wait_for_selector("pre.log:has-text('step 60')")
    assert HOSTILE in page.inner_text("pre.log")
    assert "<b>fast</b>" in page.inner_text(".warnings")
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script, main b b").count() == 0


def test_a_completion_whole(open_page):
    page = view(open_page, "#/completions?run=RUN&row=42-1-1")
    page.wait_for_selector(".detail h2:text('Step 42, group 1, #1')")
    assert page.locator(".piece.tool_call").inner_text().endswith("sum(3, 5)")
    siblings = page.locator(".siblings").first.locator("article")
    assert siblings.count() == 4
    assert "advantage +1.5" in siblings.first.inner_text()
    # Problem 5 came at steps 2, 7, 12, ... 57.
    page.wait_for_selector("text=train:5: 48 completions at 12 steps")
    siblings.first.get_by_role("button").click()
    page.wait_for_selector(".detail h2:text('Step 42, group 1, #0')")


def test_tokens_are_coloured_by_what_is_known_of_each(open_page):
    page = view(open_page, "#/completions?run=RUN")
    count(page)

    def with_tokens(route):
        """The server's answer, as for a run with tracking.completion_tokens."""
        answer = route.fetch().json()
        tokens = {
            "text": ["<b>", " un", "likely", "\n"],
            "ids": [11, 12, 13, 14],
            "rollout_logprobs": [0.0, -0.1, -9.0, -1.0],
            "logprobs": [0.0, -0.2, -8.8, -1.0],
            "advantages": [1.5, 1.5, -1.5, 0.0],
        }
        route.fulfill(json={**answer, "tokens": tokens})

    page.route("**/completion/*", with_tokens)
    page.locator("[role=row][aria-rowindex='1']").click()
    tokens = page.locator(".tokens span")
    tokens.first.wait_for()
    classes = "spans => spans.map((span) => span.className)"
    assert page.inner_text(".tokens").startswith("<b> unlikely")
    assert tokens.evaluate_all(classes) == [
        *("", "tok logprob-p1", "tok logprob-p5", "tok logprob-p1")
    ]
    assert "token 2, id 13" in tokens.nth(2).get_attribute("title")
    page.get_by_label("mismatch").check()
    page.wait_for_function("location.hash.includes('color=mismatch')")
    # Least to greatest: 0.1 less probable for the policy is half of 0.2 more probable.
    assert tokens.evaluate_all(classes) == ["", "tok mismatch-d3", "tok mismatch-u5", ""]
    page.get_by_role("radio", name="advantage").check()
    page.wait_for_selector(".advantage-d5")
    assert tokens.evaluate_all(classes)[0] == "tok advantage-u5"


def test_the_time_of_every_actor(open_page):
    page = view(open_page, "#/time?run=RUN")
    canvas = page.locator("canvas[aria-label*='Timeline of 3 actors']")
    canvas.wait_for()
    assert page.locator(".actors").inner_text().split("\n")[0] == "driver"
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 10)
    page.wait_for_selector(".note.span:has-text('driver:')")
    page.mouse.wheel(0, -300)
    page.wait_for_function("location.hash.includes('from=')")


def test_warnings_actors_and_a_log_that_grows(open_page):
    page = view(open_page, "#/health?run=RUN")
    page.wait_for_selector(".warnings li")
    assert "entropy collapse" in page.inner_text(".warnings")
    assert "look at rlsys completions RUN --step 12" in page.inner_text(".warnings")
    assert "step 12, over at step 30" in page.inner_text(".warnings")
    assert page.locator(".warnings li").count() == 1
    cells = page.locator("table.cards tbody td").all_inner_texts()
    assert {"policy 0", "policy rank 0", "4321", "1.5 GiB", "CPU"} <= set(cells)
    page.locator(".warnings button").click()
    page.wait_for_selector("h3:text('entropy')")

    page = view(open_page, "#/health?run=RUN", "live")
    page.wait_for_selector("pre.log:has-text('step')")
    last = page.inner_text("pre.log").rstrip().split("\n")[-1]
    page.wait_for_function(
        "last => !document.querySelector('pre.log').innerText.trimEnd().endsWith(last)", arg=last
    )
    at_end = "log => log.scrollHeight - log.scrollTop - log.clientHeight < 30"
    assert page.eval_on_selector("pre.log", at_end), "followed"


def test_a_server_that_goes_away_is_said_and_asked_again(open_page, runs):
    first = Dashboard(runs / "seed0")
    page = open_page("", url=first.url)
    page.wait_for_selector(".chart canvas")
    first.stop()
    page.wait_for_selector("text=The server has not answered since")
    assert page.locator(".chart canvas").count(), "what was shown stays"
    again = Dashboard(runs / "seed0", port=first.port)
    page.wait_for_selector(".gone", state="detached")
    again.stop()
    page.problems[:] = [t for t in page.problems if "ERR_CONNECTION_REFUSED" not in t]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hash", VIEWS)
def test_each_view_fits_and_can_be_read(open_page, hash, size, scheme):
    mark = "&" if "?" in hash else "?"
    page = view(open_page, f"#/{hash}{mark}run=RUN", size=size, scheme=scheme)
    page.wait_for_selector("main .panel, main .table")
    page.wait_for_load_state("networkidle")
    width = SIZES[size][0]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRASTS) == []


CONTRASTS = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => {
      const part = v / 255;
      return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)|transparent/.test(color)) return color.startsWith("rgba") ? null : color;
    }
    return "rgb(255, 255, 255)";
  };
  const found = new Set();
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const back = own && element.checkVisibility() && behind(element);
    if (!back) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.add(`${element.className || element.tagName}: ${ratio.toFixed(2)}`);
  }
  return [...found];
}"""
"""Texts whose contrast is below 4.5, what WCAG 2 asks of small text."""


def test_the_switch_of_colours(open_page):
    page = open_page("", scheme="dark")
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == "dark", "as the system has it"
    page.keyboard.press("t")
    page.wait_for_function(f"{theme} === 'light'")
    page.reload()
    page.wait_for_function(f"{theme} === 'light'")


def test_100_000_steps_are_drawn_with_their_spike(open_page, tmp_path):
    rows = [f'{{"step": {s}, "reward": {9 if s == 54_321 else 0.5}}}' for s in range(1, 100_001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    dashboard = Dashboard(tmp_path)
    page = open_page("", url=dashboard.url)
    page.wait_for_selector(".readout:has-text('step 100k')")
    page.goto(f"{dashboard.url}#/overview?x=54300:54340")
    page.wait_for_selector(".readout:has-text('step 54,340')")
    page.focus(".plot")
    for _ in range(54_340 - 54_321):
        page.keyboard.press("ArrowLeft")
    assert "9" in page.locator(".readout b").all_inner_texts()
    dashboard.stop()
