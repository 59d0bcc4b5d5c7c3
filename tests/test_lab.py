"The first tutorial, run in JupyterLab in a real browser, as a reader does it."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = '70_tutorials/first_masks.ipynb'
LATEST = 600    # seconds until the last cell must have run
SETTINGS = {    # no news, and every cell in the page
    'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False},
    'notebook-extension/tracker': {'windowingMode': 'none'},
}


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture
def lab(tmp_path, browser):
    "Address of a JupyterLab on a copy of the notebooks, with settings of its own."
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.*'))
    for name, value in SETTINGS.items():
        path = tmp_path/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    folders = {'JUPYTER_CONFIG_DIR': 'config', 'JUPYTER_RUNTIME_DIR': 'runtime', 'IPYTHONDIR': 'ipython',
               'JUPYTERLAB_SETTINGS_DIR': 'settings', 'JUPYTERLAB_WORKSPACES_DIR': 'workspaces'}
    environment = {**os.environ, **{k: str(tmp_path/v) for k, v in folders.items()}, 'WSSS_PROFILE': 'smoke', 'OMP_NUM_THREADS': '1'}
    port = free_port()
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}',
               '--ServerApp.port_retries=0', '--IdentityProvider.token=', f'--ServerApp.root_dir={tmp_path/"nbs"}']
    with open(tmp_path/'lab.log', 'w') as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
        try:
            wait_for(f'http://127.0.0.1:{port}/api', server, tmp_path/'lab.log')
            yield f'http://127.0.0.1:{port}/lab/tree/{TUTORIAL}?reset'
        finally:
            server.terminate()
            server.wait(30)


def wait_for(address, server, log, seconds=120):
    "Until the server answers."
    for _ in range(seconds*2):
        assert server.poll() is None, log.read_text()
        try: return urllib.request.urlopen(address, timeout=5).read()
        except OSError: time.sleep(.5)
    raise AssertionError(f'JupyterLab did not start\n{log.read_text()}')


PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent.trim())"
ERRORS = "[...document.querySelectorAll('.jp-OutputArea-output')].map(e => e.textContent).filter(t => t.includes('Traceback (most recent'))"
IMAGES = "[...document.querySelectorAll('.jp-OutputArea-output img')].map(e => e.complete && e.naturalWidth)"


def run_all(page):
    "Run, Run All Cells; returns when every code cell has its number. A cell that fails ends the wait at once."
    before = page.evaluate(PROMPTS)
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    done = f'() => {{ const p = {PROMPTS}; return p.every(t => /^\\[\\d+\\]/.test(t)) || {ERRORS}.length > 0 }}'
    page.wait_for_function(done, timeout=LATEST*1000, polling=500)
    return before


@pytest.mark.timeout(LATEST + 200)
def test_first_tutorial_runs_in_jupyterlab(lab, browser, keep):
    source = json.loads((ROOT/'nbs'/TUTORIAL).read_text(encoding='utf-8'))
    code = [c for c in source['cells'] if c['cell_type'] == 'code' and ''.join(c['source']).strip()]
    page = browser.new_page(viewport={'width': 1440, 'height': 1000})
    page.goto(lab)
    page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=120_000)
    page.wait_for_selector('#jp-main-statusbar >> text=/\\| Idle/', timeout=120_000)
    before = run_all(page)
    assert len(before) == len(code) and not any(any(c.isdigit() for c in prompt) for prompt in before), 'nothing had run before'
    errors = page.evaluate(ERRORS)
    keep(page, 'lab')
    assert errors == []
    page.wait_for_timeout(500)
    images = page.evaluate(IMAGES)
    assert images and all(images), 'every picture is drawn'
    page.locator('.jp-OutputArea-output img').last.scroll_into_view_if_needed()
    keep(page, 'lab_picture')
    page.close()
