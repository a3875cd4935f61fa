"""The two pages in headless Chromium: drop an image, ask, look at a token, stop; and the page of tools/look.py."""

import json
import shutil

import pytest
from test_read_again import tiny_chat
from test_look import folder, page_of, tok  # noqa: F401
from test_serve import running, slow, until  # noqa: F401

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(params=[1100, 390], ids=["desk", "phone"])
def page(request, browser):
    """An empty page; an error in its script, and a request to another place, fail the test"""
    page, bad = browser.new_page(viewport={"width": request.param, "height": 800}), []
    page.on("pageerror", lambda e: bad.append(str(e)))
    page.on("console", lambda m: bad.append(m.text) if m.type == "error" and "status of 400" not in m.text else None)
    page.on("request", lambda r: bad.append(r.url) if not r.url.startswith(("http://127.0.0.1", "data:", "file:",
                                                                             "blob:")) else None)
    yield page
    wide = page.evaluate("document.documentElement.scrollWidth")
    page.close()
    assert bad == [] and wide <= request.param, "the page must not be wider than the screen"


def veil(page, i=0):
    """Alpha values of the map over image i; 0 is the brightest place"""
    return page.locator("canvas").nth(i).evaluate(
        "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).filter((_, i) => i % 4 == 3)")


@pytest.fixture(scope="module")
def plain_chat(tok):  # noqa: F811
    chat = tiny_chat(tok, max_position_embeddings=400)
    chat.stop_ids = set()
    return chat


def test_a_chat_with_an_image(page, plain_chat, folder):  # noqa: F811
    with running(plain_chat, model="runs/tiny") as server:
        page.goto(server.url())
        assert page.locator("#model").text_content() == "runs/tiny" and page.locator("#stop").is_disabled()
        page.set_input_files("#file", folder / "a.png")
        page.locator("#pictures img").wait_for()
        page.fill("#text", "What is this?")
        page.fill("#tokens", "6")
        page.click("#send")
        page.locator(".token").nth(5).wait_for()
        true = plain_chat.ask(folder / "a.png", "What is this?", 6)
        assert "".join(page.locator(".token").all_text_contents()).replace("\u21b5", "").strip() == true
        assert page.locator(".top .name").count() == 5 and page.locator(".top .name.own").count() == 1
        page.locator(".token").nth(3).click()
        assert "token 4 of 6" in page.locator("#panel h2").first.text_content()
        seen = [veil(page)]
        assert min(seen[0]) == 0 < max(seen[0]) and len(seen[0]) == 4
        page.locator("#panel select").nth(0).select_option("1")
        page.locator("#panel select").nth(1).select_option("raw")
        seen.append(veil(page))
        page.locator(".token").nth(1).hover()
        seen.append(veil(page))
        assert seen[0] != seen[1] != seen[2] and "of the token's attention" in page.locator("#panel").text_content()
        page.locator("summary").click()
        prompt = page.locator(".prompt")
        assert prompt.locator(".image").all_text_contents() == ["4 x image"]
        assert "<|im_start|>" in prompt.locator(".control").all_text_contents()[0] and prompt.is_visible()
        page.fill("#text", "And <b>now</b>?")                   # a second turn, with the keyboard
        page.press("#text", "Enter")
        page.locator(".token").nth(11).wait_for()
        tiles, blocks = plain_chat.look([folder / "a.png"])
        turns = [("<image>\nWhat is this?", true), ("And <b>now</b>?", None)]
        second, = plain_chat.answers([plain_chat.prompt(turns, blocks)], tiles, 6)
        assert "".join(page.locator(".answer").nth(1).locator(".token").all_text_contents()).strip() == second
        assert page.locator("b").count() == 0
        page.click("#new")
        assert page.locator("#talk > *").count() == 0


def test_stop_ends_the_answer_and_errors_are_shown(page, plain_chat, slow):  # noqa: F811
    count, release = slow
    with running(plain_chat, max_images=0) as server:
        page.goto(server.url())
        page.fill("#text", "Hi!")
        page.click("#send")
        until(lambda: count[0] == 1)
        release(3)
        until(lambda: count[0] == 4)
        page.click("#stop")
        page.get_by_text("stopped").wait_for()
        release(3)
        until(lambda: server.places._value == 9)
        assert count[0] <= 7 and page.locator("#stop").is_disabled()
        page.evaluate("() => { pictures = ['data:image/png;base64,aGk=']; }")
        page.fill("#text", "And this?")
        page.click("#send")
        page.locator(".reply.bad").wait_for()
        assert "1 images; the limit is 0" in page.locator(".reply.bad").text_content()
        assert page.input_value("#text") == "And this?"         # the question goes back


def test_a_dropped_image_and_a_token(page, plain_chat):
    with running(plain_chat, token="secret") as server:
        page.goto(server.url())
        drop = """() => { const t = new DataTransfer(); const bytes = Uint8Array.from([1, 2]);
                  t.items.add(new File([bytes], 'a.png', {type: 'image/png'}));
                  const how = {dataTransfer: t, bubbles: true, cancelable: true};
                  document.dispatchEvent(new DragEvent('drop', how)); }"""
        page.evaluate(drop)
        page.locator("#pictures img").wait_for(state="attached")
        page.locator("#pictures button").click()
        assert page.locator("#pictures img").count() == 0
        page.fill("#text", "Hi!")
        page.fill("#tokens", "3")
        page.click("#send")
        page.locator(".token").nth(2).wait_for()
        assert "Point at" not in page.locator("#panel").text_content() and page.locator("canvas").count() == 0


def test_the_page_of_one_answer(page, folder):  # noqa: F811
    page_of(folder, prompt="What </script>is this?", layer=1)
    page.goto(f"file://{folder}/page/look.html")
    data = json.loads(page.locator("#data").text_content())
    shown = page.locator(".token").all_text_contents()
    assert len(shown) == len(data["record"]["tokens"])
    assert "What </script>is this?" in page.locator("#left").text_content()
    assert page.locator("#panel select").first.input_value() == "1" and min(veil(page)) == 0
    page.locator(".token").nth(2).focus()
    assert "token 3 of" in page.locator("#panel h2").first.text_content()
