"The repository's own rules: one home for each fact, modules equal to notebooks, tidy notebooks, a README that is up to date."
import ast
import base64
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(ROOT).parts))
EXPORTING = [p for p in NOTEBOOKS if '#| default_exp' in p.read_text(encoding='utf-8')]
BIN = Path(sys.executable).parent


def name(path): return path.relative_to(ROOT).as_posix()


def cells(path, kind=None):
    "Cells of a notebook as (source, cell)."
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [(''.join(c['source']), c) for c in found if kind in (None, c['cell_type'])]


def parsed(source):
    "Syntax tree of a code cell, or None where it holds magics or shell commands."
    try: return ast.parse(source)
    except SyntaxError: return None


# One home for each fact

def settings():
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini


def test_the_installed_version_is_that_of_settings():
    import wsss_nb
    assert wsss_nb.__version__ == distribution('wsss_nb').version == settings()['package']['version']


def test_every_import_is_declared():
    "What the library imports is among the requirements, not merely somebody else's requirement."
    def plain(requirement): return re.split(r'[\[><=!~ ]', requirement)[0].lower().replace('_', '-')
    trees = [ast.parse(p.read_text(encoding='utf-8')) for p in (ROOT/'wsss_nb').rglob('*.py')]
    nodes = [n for t in trees for n in ast.walk(t)]
    found = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    modules = {f.split('.')[0] for f in found} - set(sys.stdlib_module_names) - {'wsss_nb'}
    declared, owners = {plain(r) for r in settings()['package']['requirements'].split()}, packages_distributions()
    assert {m for m in modules if not declared & {plain(d) for d in owners[m]}} == set()


def test_no_fact_stands_in_two_files():
    project = (ROOT/'pyproject.toml').read_text(encoding='utf-8')
    package, ini = (ROOT/'setup.py').read_text(encoding='utf-8'), settings()
    requirements = (ini['package']['requirements'] + ini['extras']['dev'] + ini['extras']['docs']).split()
    facts = [ini['package']['version'], ini['package']['python'], *(re.split('[><=]', r)[0] for r in requirements), *ini['commands'].values()]
    for text in (project, package):
        assert [f for f in facts if f not in ('wsss_nb[docs]', 'nbdev', 'pytest', 'ruff') and f'{f}' in text] == []
    description = re.search(r'^description = "(.*)"$', project, re.M).group(1)
    for path in ('settings.ini', 'setup.py'): assert description not in (ROOT/path).read_text(encoding='utf-8')


def test_the_address_of_the_repository_comes_from_one_place():
    home = re.search(r'^Repository = "https://github.com/(.*)"$', (ROOT/'pyproject.toml').read_text(encoding='utf-8'), re.M).group(1)
    texts = {p: p.read_text(encoding='utf-8') for p in [ROOT/'README.md', *NOTEBOOKS]}
    others = {name(p): set(re.findall(r'github(?:\.com)?/([\w-]+/wsss_nb)\b', t)) - {home} for p, t in texts.items()}
    assert {p: o for p, o in others.items() if o} == {}


def test_the_command_is_installed():
    assert [e.value for e in distribution('wsss_nb').entry_points if e.name == 'wsss'] == [settings()['commands']['wsss']]


# Modules and notebooks

@pytest.fixture(scope='module')
def copied(tmp_path_factory):
    "A copy of the repository's sources, exported and cleaned anew."
    copy = tmp_path_factory.mktemp('copy')/'wsss_nb'
    ignore = shutil.ignore_patterns('.*', '_proc', '_docs', '__pycache__', 'llms.txt')
    for folder in ('nbs', 'wsss_nb'): shutil.copytree(ROOT/folder, copy/folder, ignore=ignore)
    for file in ('pyproject.toml', 'settings.ini'): shutil.copy(ROOT/file, copy/file)
    environment = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    for command in ('nbdev-export', 'nbdev-clean'): subprocess.run([BIN/command], cwd=copy, env=environment, check=True, timeout=300)
    return copy


def changed(copy, folder, pattern):
    "Files that differ between the repository and its copy, or stand in only one of the two."
    here, there = ({p.relative_to(base).as_posix() for p in (base/folder).rglob(pattern)} for base in (ROOT, copy))
    here = {p for p in here if not any(part[0] == '.' for part in Path(p).parts)}
    return sorted(here ^ there) + sorted(p for p in here & there if not filecmp.cmp(ROOT/p, copy/p, shallow=False))


def test_modules_are_what_the_notebooks_export(copied):
    assert changed(copied, 'wsss_nb', '*.py') == [], 'run `make export`'


def test_notebooks_are_clean(copied):
    assert changed(copied, 'nbs', '*.ipynb') == [], 'run `make export`'


def test_every_module_has_its_notebook():
    exported = {re.search(r'#\| default_exp ([\w.]+)', p.read_text(encoding='utf-8')).group(1).replace('.', '/') + '.py': p for p in EXPORTING}
    modules = {p.relative_to(ROOT/'wsss_nb').as_posix() for p in (ROOT/'wsss_nb').rglob('*.py') if p.name[0] != '_'}
    assert modules == set(exported)
    for module, path in exported.items():      # the mirror: no number in the module's path
        assert module == re.sub(r'(^|/)\d+_', r'\1', path.relative_to(ROOT/'nbs').with_suffix('.py').as_posix())


def imported_rooms(module):
    "Rooms that a module imports from."
    nodes = [n for n in ast.walk(ast.parse(module.read_text(encoding='utf-8'))) if isinstance(n, (ast.Import, ast.ImportFrom))]
    text = ' '.join(['.'*(getattr(n, 'level', 0) or 0) + (getattr(n, 'module', '') or '') + ' ' + ' '.join(a.name for a in n.names) for n in nodes])
    return set(re.findall(r'(?:wsss_nb\.|\.\.)(\w+)', text))


ALLOWED = {
    'data': {'data'}, 'localize': {'data', 'localize'}, 'refine': {'data', 'localize', 'refine'},
    'segment': {'data', 'localize', 'refine', 'segment'}, 'evaluate': {'data', 'evaluate'},
    'study': {'data', 'localize', 'refine', 'segment', 'evaluate', 'study'},
}


@pytest.mark.parametrize('room', ALLOWED)
def test_data_flows_one_way(room):
    for module in (ROOT/'wsss_nb'/room).glob('*.py'): assert imported_rooms(module) <= ALLOWED[room], module.name


# The shape of a notebook

@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_first_cells(path):
    first = cells(path)
    title, badge = first[0], first[2 if path in EXPORTING else 1]
    assert title[1]['cell_type'] == 'markdown' and re.match(r'# [^\n]+\n+> [^\n]+', title[0]), 'a title and a one-line promise'
    if path in EXPORTING: assert re.fullmatch(r'#\| default_exp [\w.]+', first[1][0].strip())
    assert 'colab-badge.svg' in badge[0], 'run `make badges`'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_colab_can_install(path):
    imports = [i for i, (s, _) in enumerate(cells(path)) if re.search(r'^\s*(from|import) wsss_nb', s, re.M)]
    installs = [i for i, (s, _) in enumerate(cells(path)) if re.search(r'^! \[ -e /content \] && pip install', s, re.M) and '#| hide' in s]
    if imports: assert installs and installs[0] < imports[0], 'the hidden cell that installs the package on Colab comes first'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_size_and_pictures(path):
    assert path.stat().st_size <= 1.5e6
    outputs = [o for _, c in cells(path, 'code') for o in c['outputs']]
    pictures = [''.join(o['data'][kind]) for o in outputs for kind in ('image/png', 'image/jpeg') if kind in o.get('data', {})]
    assert max((len(base64.b64decode(p)) for p in pictures), default=0) <= 150e3


def is_import(node): return isinstance(node, (ast.Import, ast.ImportFrom))


def is_setting(node):
    "A switch or a constant that stands with the imports, such as `plt.rcParams[...] = ...`, is no import."
    return isinstance(node, (ast.Expr, ast.Assign, ast.For, ast.With, ast.FunctionDef, ast.ClassDef))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_imports_have_cells_of_their_own(path):
    for source, _ in cells(path, 'code'):
        body = getattr(parsed(source), 'body', [])
        if any(map(is_import, body)): assert not any(map(is_setting, body)), source


@pytest.mark.parametrize('path', EXPORTING, ids=name)
def test_exported_cells_are_short(path):
    for source, _ in cells(path, 'code'):
        code = [line for line in source.splitlines() if line.strip() and not line.strip().startswith('#')]
        if re.search(r'^#\|\s*export', source, re.M): assert len(code) <= 40, source


def shows(source):
    "Does the cell make a picture or end in a value? Exported, hidden and skipped cells aside."
    if re.search(r'^#\|\s*(export|hide|eval: false|notest|default_exp)', source, re.M): return False
    return bool(re.search(r'\b(imshow|subplots|show_image|print)\(', source)) and not re.search(r'^\s*def ', source, re.M)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_outputs_are_kept(path):
    missing = [s for s, c in cells(path, 'code') if shows(s) and not c['outputs']]
    assert missing == [], 'run `make notebooks`'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_nothing_of_one_machine_is_kept(path):
    text = path.read_text(encoding='utf-8')
    assert re.findall(r'/(?:root|home|Users|work|tmp)/[\w.-]+', text) == []
    errors = [o for _, c in cells(path, 'code') for o in c['outputs'] if o['output_type'] == 'error']
    assert errors == []


# Badges and README

@pytest.mark.parametrize('script', ['badges', 'readme'])
def test_made_files_are_up_to_date(script):
    done = subprocess.run([sys.executable, ROOT/'docs'/f'{script}.py', '--check'], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_badges_are_renewed_and_stay_single(tmp_path):
    sys.path.insert(0, str(ROOT/'docs'))
    import badges
    from fastcore.nbio import mk_cell
    start = [mk_cell('# A\n> b.', 'markdown'), mk_cell('#| default_exp data.x')]
    once = badges.with_badge(start, badges.badge(ROOT/'nbs'/'00_data'/'x.ipynb'))
    assert 'blob/main/nbs/00_data/x.ipynb' in once[2].source
    twice = badges.with_badge(once, 'new ' + badges.PICTURE)
    assert [c.source for c in twice] == ['# A\n> b.', '#| default_exp data.x', 'new ' + badges.PICTURE]
    assert badges.with_badge([mk_cell('# A\n> b.', 'markdown')], 'B')[1].source == 'B'


def test_lines_of_the_readme_are_commands():
    from wsss_nb.study.cli import parser
    lines = re.findall(r'^wsss (.*?)(?:\s+#.*)?$', (ROOT/'README.md').read_text(encoding='utf-8'), re.M)
    assert len(lines) >= 5
    for line in lines: assert parser().parse_args(line.split()).run, line


def test_code_outside_the_notebooks_has_no_slips():
    done = subprocess.run([BIN/'ruff', 'check', '.'], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_commands_of_the_readme_exist():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    makefile = (ROOT/'Makefile').read_text(encoding='utf-8')
    for target in set(re.findall(r'\bmake (\w+)', text)) - {'by'}: assert re.search(rf'^{target}:', makefile, re.M), target
    for link in re.findall(r'\]\((nbs/[^)#]+)', text): assert (ROOT/link).exists(), link


# The runner of notebooks

def test_a_notebook_that_fails_fails_the_check(tmp_path):
    "Each notebook has a process of its own: what one leaves behind (a name, idle workers) does not reach the next, and the check does not wait for it."
    sources = {'bad': 'assert 1 == 2', 'good': "from joblib import Parallel, delayed\nassert 'left' not in globals()\nleft = Parallel(2)(delayed(abs)(k) for k in range(4))", 'same': "assert 'left' not in globals()"}
    for k, source in sources.items(): (tmp_path/f'{k}.ipynb').write_text(json.dumps({'cells': [{'cell_type': 'code', 'id': 'a', 'metadata': {}, 'execution_count': None, 'outputs': [], 'source': source}],
        'metadata': {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}, 'nbformat': 4, 'nbformat_minor': 5}))
    done = subprocess.run([sys.executable, ROOT/'tests/notebooks.py', *(tmp_path/f'{k}.ipynb' for k in sources)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and '2 of 3 notebooks passed' in done.stdout and re.findall('FAILED .*/(.*).ipynb', done.stdout) == ['bad'], done.stdout + done.stderr
    assert 'assert 1 == 2' in done.stderr
