"""The page, by a person's clicks in headless Chromium, and by what it answers to others.

Needs Gradio (`pip install -e ".[gallery]" -c constraints.txt`); the clicks need selenium, and Debian's chromium and
chromium-driver, too.
"""

import base64
import http.client
import io
import os
import shutil

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.gallery.small import session
from uvit_fast import cli
from uvit_fast.gallery.recipe import from_png

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[gallery]' -c constraints.txt")
from uvit_fast.gallery import page as pages  # noqa: E402


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """A session and its page's address."""
    of = session(tmp_path_factory.mktemp("gallery"))
    with pages.serving(of, "127.0.0.1", 0) as (_, url):
        yield of, url


def status(url, path, host=None):
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=20)
    connection.request("GET", path, headers={"Host": host} if host else {})
    return connection.getresponse().status


def test_no_file_is_served_and_no_other_name_answered(gallery, tmp_path):
    _, url = gallery
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    assert status(url, "/") == 200 and status(url, "/config") == 200
    for route in (
        "file=",
        "gradio_api/file=",
        "gradio_api/file/",
        "gradio_api//file=",
        "static/",
        "assets/",
        "svelte/",
    ):
        for path in (secret, os.path.relpath(secret), f"..%2f..%2f..%2f..{secret}", "setup.py", "constraints.txt"):
            assert status(url, f"/{route}{path}") in (403, 404), (route, path)
    for route in (
        "gradio_api/proxy=http://localhost",
        "gradio_api/component_server",
        "gradio_api/info",
        "runs",
        "monitoring",
    ):
        assert status(url, f"/{route}") == 404, route
    assert status(url, "/", "somewhere.example") == 400  # a name that was made to lead to the loopback


def test_it_listens_at_the_loopback_and_shares_nothing(gallery):
    _, url = gallery
    port = int(url.rstrip("/").split(":")[-1])
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == port] == ["127.0.0.1"]


def test_uploads_have_a_bound(gallery):
    _, url = gallery
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=20)
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + bytes(pages.LARGEST_UPLOAD + 1) + b"\r\n--x--\r\n"
    connection.request("POST", "/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})
    assert connection.getresponse().status == 413


def test_a_port_in_use_is_one_line(gallery):
    of, url = gallery
    with pytest.raises(pages.UserError, match="cannot be listened at; expected another --port"):
        pages.serve(of, "127.0.0.1", int(url.rstrip("/").split(":")[-1]))


@pytest.fixture(scope="module")
def browser(gallery):
    webdriver = pytest.importorskip("selenium.webdriver", reason="a person's clicks need selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("a person's clicks need chromium and chromedriver: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chrome.get(gallery[1])
    yield chrome
    chrome.quit()


def one(browser, css, seconds=20):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(lambda b: next(iter(b.find_elements(By.CSS_SELECTOR, css)), None))


def saved(browser, where):
    """The files behind the finished pictures of a place, once they are there."""
    from selenium.webdriver.common.by import By

    one(browser, f"{where} .finished")
    links = browser.find_elements(By.CSS_SELECTOR, f"{where} a[download]")
    return [base64.b64decode(link.get_attribute("href").partition(",")[2]) for link in links]


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))[..., None]


def write(browser, css, text):
    from selenium.webdriver.common.keys import Keys

    field = one(browser, css)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text, Keys.TAB)


def test_a_person_draws_compares_walks_and_loads_back(gallery, browser, tmp_path):
    of, _ = gallery
    write(browser, "#seed input", "5")
    one(browser, "#draw-button").click()
    files = saved(browser, "#drawn")
    recipes = [from_png(data)[0] for data in files]
    assert [(r.label, r.seed, r.steps) for r in recipes] == [(label, 5, 12) for label in range(4)]
    *_, view = of.draw(recipes)
    assert all(np.array_equal(pixels(data), image) for data, image in zip(files, view.images))
    assert " ms: 4 pictures, 12 evaluations, on a CPU" in one(browser, "#drawn .finished").text

    one(browser, "button[role=tab]:nth-of-type(2)").click()
    write(browser, "#steps-b input[type=number]", "6")
    one(browser, "#side-button").click()
    (a, *_), (b, *_) = saved(browser, "#side-a"), saved(browser, "#side-b")
    (a, _), (b, _) = from_png(a), from_png(b)
    assert (a.checkpoint, a.steps, a.seed) == ("a", 12, 5) and (b.checkpoint, b.steps, b.seed) == ("other", 6, 5)

    one(browser, "button[role=tab]:nth-of-type(3)").click()
    write(browser, "#to-seed input", "9")
    one(browser, "#walk-button").click()
    walk = saved(browser, "#walked")
    assert [from_png(data)[0].position for data in walk] == pytest.approx([i / 7 for i in range(8)])

    (tmp_path / "saved.png").write_bytes(walk[3])
    one(browser, "button[role=tab]:nth-of-type(1)").click()
    browser.execute_script("document.querySelector('#drawn .finished').remove()")
    one(browser, "input[type=file]").send_keys(str(tmp_path / "saved.png"))
    (again,) = saved(browser, "#drawn")
    assert again == walk[3]


def test_a_picture_appears_as_it_is_denoised(browser):
    from selenium.webdriver.support.ui import WebDriverWait

    write(browser, "#steps input[type=number]", "120")
    browser.execute_script(
        "window.seen = []; new MutationObserver(() => document.querySelectorAll('#drawn .said').forEach("
        "e => seen.push(e.textContent))).observe(document.body, {subtree: true, childList: true, characterData: true})"
    )
    one(browser, "#draw-button").click()
    WebDriverWait(browser, 20).until(lambda b: " ms: one picture, 120 evaluations" in one(b, "#drawn .said").text)
    seen = browser.execute_script("return window.seen")
    assert {"12 of 120 evaluations", "24 of 120 evaluations"} & set(
        seen
    ) and " ms: one picture, 120 evaluations" in seen[-1]


def test_another_checkpoint_brings_its_own_settings(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    one(browser, "#checkpoint input").click()
    one(browser, "[role=option]")
    options = browser.find_elements(By.CSS_SELECTOR, "[role=option]")
    next(option for option in options if option.text.endswith("other")).click()
    steps = one(browser, "#steps input[type=number]")
    WebDriverWait(browser, 20).until(lambda _: steps.get_attribute("value") == "9")


def test_a_mistake_is_a_line_in_the_page(browser, tmp_path):
    (tmp_path / "other.png").write_bytes(b"GIF89a")
    one(browser, "input[type=file]").send_keys(str(tmp_path / "other.png"))
    assert "expected a PNG that the gallery saved" in one(browser, ".toast-body").text


def test_a_missing_checkpoint_is_one_line(capsys):
    assert cli.main(["gallery", "--checkpoint", "runs/nowhere"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
