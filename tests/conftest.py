"The same examples for every property; a real browser for the tests that need one, and a small web server."
import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import hypothesis
import pytest

# The same examples every time, so that a change is judged by itself; WSSS_HYPOTHESIS=random looks for new ones.
hypothesis.settings.register_profile('same', derandomize=True)
if os.environ.get('WSSS_HYPOTHESIS') != 'random': hypothesis.settings.load_profile('same')

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'


@pytest.fixture(scope='module')
def browser():
    "Chromium, driven by Playwright; without Chromium the tests that ask for it are skipped."
    if not CHROMIUM: pytest.skip('no Chromium found; install it with: apt install chromium')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "The rendered scenes in the layout of VOC 2012, the smallest sample, in a folder of their own."
    from wsss_nb.data.sample import sample
    return Path(shutil.copytree(sample(profile='smoke')/'voc/VOC2012', tmp_path_factory.mktemp('photos')/'VOC2012'))


@pytest.fixture(scope='module')
def serve():
    "Function that serves a folder over HTTP and returns its address."
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *args): pass     # the browser went on to another page

    def start(folder):
        servers.append(Server(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder))))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{servers[-1].server_port}'

    yield start
    for server in servers: server.shutdown()


@pytest.fixture
def keep(tmp_path):
    "Function that saves a screenshot of a page under a name, in the folder WSSS_SCREENSHOTS where that is set."
    folder = Path(os.environ.get('WSSS_SCREENSHOTS') or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name, **kwargs: page.screenshot(path=folder/f'{name}.png', **kwargs)
