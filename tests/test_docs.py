"The documentation site: built from the notebooks, without Quarto, then read as files and used in a real browser."
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'docs'))
import build as site_builder  # noqa: E402

NOTEBOOKS = [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
PAGES = {site_builder.page_of(p.relative_to(ROOT/'nbs')): p for p in NOTEBOOKS}


def run_build(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    return subprocess.run([sys.executable, ROOT/'docs'/'build.py', *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the built site."
    out = tmp_path_factory.mktemp('site')
    done = run_build(out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out/'html'


@pytest.fixture(scope='module')
def read(site):
    "Function: the parsed HTML of a page."
    kept = {}

    def parse(path):
        path = Path(path)
        if path not in kept: kept[path] = BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser')
        return kept[path]
    return parse


def test_every_notebook_is_a_page_in_reading_order(site, read):
    assert [p for p in PAGES if not (site/f'{p}.html').exists()] == []
    links = [a['href'].removesuffix('.html') for a in read(site/'index.html').select('.sidebar-tree a.reference')]
    rooms = list(site_builder.ROOMS)
    order = sorted((p for p in PAGES if '/' in p), key=lambda p: (rooms.index(p.split('/')[0]), PAGES[p].name))
    assert links == order + ['api', 'changelog', 'contributing']


def test_title_and_promise(site, read):
    for page, path in PAGES.items():
        first = nbformat.read(path, as_version=4).cells[0].source
        title = re.match(r'# (.*)', first).group(1).replace('`', '')
        assert read(site/f'{page}.html').h1.get_text().rstrip('#¶').strip() == title
        assert read(site/f'{page}.html').select_one('.promise'), page


def links(soup):
    "All addresses that a page refers to."
    return [e[k] for e in soup.find_all(True) for k in ('href', 'src') if e.has_attr(k) and e[k]]


def test_every_link_within_the_site_leads_somewhere(site, read):
    broken = []
    for page in sorted(site.rglob('*.html')):
        for link in links(read(page)):
            if re.match(r'\w+:|//', link): continue
            path, _, anchor = link.partition('#')
            target = (page.parent/path.split('?')[0]).resolve() if path else page
            if not target.exists(): broken.append((page.name, link))
            elif anchor and target.suffix == '.html' and not read(target).find(id=anchor): broken.append((page.name, link))
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site, read):
    for page in site.rglob('*.html'):
        loaded = [e.get('src') or e.get('href') for e in read(page).select('script[src], img[src], iframe[src], link[rel=stylesheet]')]
        assert [x for x in loaded if re.match(r'\w+:|//', x) and not x.startswith('data:')] == [], page


def public(module):
    "Public functions and classes of a module file."
    tree = ast.parse(module.read_text(encoding='utf-8'))
    names = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__')
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n for n in tree.body if isinstance(n, kinds) and n.name in names]


def test_every_public_name_has_its_signature(site, read):
    missing = []
    for module in (ROOT/'wsss_nb').glob('*/[!_]*.py'):
        page = next(p for p in PAGES if re.sub(r'^\d+_', '', p) == f'{module.parent.name}/{module.stem}')
        text = read(site/f'{page}.html').get_text()
        for node in public(module):
            if read(site/f'{page}.html').find(id=node.name.lower()) is None: missing.append((page, node.name))
            if isinstance(node, ast.FunctionDef): missing += [(page, node.name, a.arg) for a in node.args.args if not re.search(rf'\b{a.arg}\b', text)]
    assert missing == []


def test_docments_and_code_are_shown(site, read):
    text = read(site/'00_data/items.html').get_text()
    assert re.search(r'def read_image\(\s+path,\s+# image file', text)
    assert 'show_doc' not in text and '#|' not in text and '__main__' not in text
    assert read(site/'00_data/items.html').select('details.code .highlight')


def test_names_lead_to_other_pages(site, read):
    crossing = {a['href'] for page in PAGES for a in read(site/f'{page}.html').select('article a.reference.internal[href*="items.html#"]')}
    assert any('inputerror' in href for href in crossing), crossing


def pictures(path):
    "Pictures that a reader of the notebook sees."
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code' and not re.search(r'^#\|\s*(hide|export)', c.source, re.M)]
    return sum('image/png' in o.get('data', {}) for c in cells for o in c.outputs)


def test_figures_and_formulas(site, read):
    for page, path in PAGES.items():
        assert len(read(site/f'{page}.html').select('article img')) >= pictures(path), page
        sources = '\n'.join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'markdown')
        if re.search(r'\$[^$]+\$', re.sub(r'`[^`]*`', '', sources)): assert read(site/f'{page}.html').find('math'), page


def test_addresses_in_the_modules_exist(site):
    home = site_builder.SITE
    for module in (ROOT/'wsss_nb').glob('*/[!_]*.py'):
        address = re.search(r'Docs: (\S+?)"""', module.read_text(encoding='utf-8')).group(1)
        assert address.startswith(home) and (site/address[len(home) + 1:]).exists(), address


def test_a_broken_link_fails_the_build(tmp_path):
    proc = tmp_path/'proc'
    proc.mkdir()
    cells = [nbformat.v4.new_raw_cell('---\ntitle: Front\ndescription: One line.\n---'), nbformat.v4.new_markdown_cell('[gone](00_data/99_gone.ipynb)')]
    kernel = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), proc/'index.ipynb')
    done = run_build(tmp_path/'out', proc)
    assert done.returncode != 0 and '00_data/gone' in done.stderr


def test_links_to_headings_with_punctuation():
    "Jupyter keeps the question mark of a heading in its anchor, Sphinx does not."
    text = site_builder.relink('[a](#Which-side?) [b](../00_data/00_items.ipynb#Why,-and-how?)', '10_localize', {})
    assert text == '[a](#which-side) [b](/00_data/items.ipynb#why-and-how)'


# In the browser

@pytest.fixture
def page(browser):
    "A page that complains about failed requests and script errors when it is closed."
    tab, complaints = browser.new_page(viewport={'width': 1440, 'height': 1000}), []
    tab.on('pageerror', lambda e: complaints.append(str(e)))
    tab.on('requestfailed', lambda r: complaints.append(r.url) if 'ABORTED' not in r.failure else None)  # aborted: the reader went on
    tab.on('response', lambda r: complaints.append(r.url) if r.status >= 400 else None)
    yield tab
    tab.close()
    assert complaints == []


def test_search_in_the_browser(page, site, serve, keep):
    page.goto(serve(site) + '/index.html')
    keep(page, 'docs_front')
    page.fill('input.sidebar-search', 'pseudo mask')
    page.keyboard.press('Enter')
    page.wait_for_selector('ul.search li a')
    assert page.locator('ul.search li').count() >= 1
    keep(page, 'docs_search')
    page.fill('input.sidebar-search', 'read_image')
    page.keyboard.press('Enter')
    page.wait_for_url('**q=read_image*')
    page.locator('ul.search li a', has_text='Images, labels and views').first.click()
    page.wait_for_selector('h1')
    assert 'read_image' in page.inner_text('article')
    keep(page, 'docs_items', full_page=True)


def test_signature_anchor_and_dark_mode_in_the_browser(page, site, serve, keep):
    page.emulate_media(color_scheme='dark')
    page.goto(serve(site) + '/00_data/items.html#read_image')
    page.wait_for_timeout(300)
    assert abs(page.locator('[id=read_image]').first.bounding_box()['y']) < 200, 'the anchor is scrolled to'
    keep(page, 'docs_dark')
    box = page.locator('article').bounding_box()
    assert box['width'] > 600
    page.set_viewport_size({'width': 390, 'height': 800})
    keep(page, 'docs_phone')
    assert page.evaluate('document.documentElement.scrollWidth') <= 400, 'nothing is wider than a telephone'
