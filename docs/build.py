"""The documentation site without Quarto: nbdev's processed notebooks, adapted for myst-nb, built by Sphinx.

    python docs/build.py [FOLDER [PROCESSED]]      # FOLDER/html is the site, default docs/_build; PROCESSED: a folder made by nbdev
"""
import ast
import os
import re
import shutil
import sys
from pathlib import Path
from posixpath import normpath

import nbformat
import yaml
from nbconvert import MarkdownExporter
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import patch_name
from nbdev.serve import proc_nbs
from sphinx.cmd.build import main as sphinx_build

HERE = Path(__file__).parent
CFG = get_config(HERE)
SITE = CFG.doc_host + CFG.doc_baseurl
# Sidebar: folder -> caption, in reading order. Folders that have no notebooks yet are left out.
ROOMS = {
    '70_tutorials': 'Start here', '00_data': 'Data', '10_localize': 'Localize', '20_refine': 'Refine',
    '30_segment': 'Segment', '40_evaluate': 'Evaluate', '50_study': 'Study', '60_tables': 'Published tables',
}


# Pages and their addresses

def page_of(path):
    "Page of a notebook below nbs/: `00_data/00_items.ipynb` is `00_data/items`, the address that nbdev gives it."
    return nbpath2html(path).with_suffix('').as_posix()


def label(page, symbol):
    "The name under which a page can refer to a symbol of (another) page."
    return f'{page}-{symbol}'.lower().replace('/', '-').replace('.', '-')


def shown(cell):
    "The symbol that a `show_doc` cell shows, or None."
    found = cell.cell_type == 'code' and re.search(r'^show_doc\((\w[\w.]*)', cell.source, re.M)
    return found.group(1) if found else None


# Links

def doc_link(found, labels):
    "nbdev's absolute link to a symbol -> a reference that Sphinx checks; a method without its own entry leads to its class."
    page, symbol = found.group(1), found.group(2) or ''
    for name in (symbol, symbol.rpartition('.')[0]):
        if name and label(page, name) in labels: return f'](#{label(page, name)})'
    return f'](/{page}.ipynb)'


def near_link(found, folder, labels):
    "A relative link to a notebook or to its page, read in `folder` below nbs/ -> the same kind of reference."
    page, anchor = page_of(Path(normpath(f'{folder}/{found.group(1)}'))), found.group(2)
    if anchor and label(page, anchor) in labels: return f'](#{label(page, anchor)})'
    return f'](/{page}.ipynb' + (f'#{heading_anchor(anchor)})' if anchor else ')')


def heading_anchor(anchor):
    "The anchor of a heading as Jupyter writes it -> as Sphinx names it: small letters, no punctuation."
    return re.sub(r'[^\w-]', '', anchor.lower())


def relink(text, folder, labels):
    "All links of a Markdown text; headings are named in small letters."
    text = re.sub(rf'\]\({re.escape(SITE)}/([\w/.-]+?)\.html(?:#([\w.]+))?\)', lambda m: doc_link(m, labels), text)
    text = re.sub(r'\]\((?!\w+:|/|#)([^)\s]+?\.(?:ipynb|html))(?:#([^)]*))?\)', lambda m: near_link(m, folder, labels), text)
    return re.sub(r'\]\(#([^)]+)\)', lambda m: f'](#{heading_anchor(m.group(1))})', text)


# Cells

def definitions(module):
    "Source of every function, class and patched method of a module file."
    text = module.read_text(encoding='utf-8')
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return {patch_name(node): ast.get_source_segment(text, node)
            for node in ast.parse(text).body if isinstance(node, kinds) and isinstance(patch_name(node), str)}


def api_cell(cell, page, level, sources, taken):
    "A `show_doc` cell -> a Markdown cell: anchor, heading, link to the source, signature, docstring, folded source."
    name, slug = shown(cell), label(page, shown(cell))
    while slug in taken: slug += '-2'     # `Thing` and `thing` on one page
    taken.add(slug)
    text = ''.join(cell.outputs[0]['data']['text/markdown'])
    link = re.search(r'\[source\]\(([^)]*)\)', text)
    body = re.sub(r'\b__main__\.|:NoneType(?==None)', '', re.split(r'^#+ .*$', text, maxsplit=1, flags=re.M)[-1])
    code = sources.get(name)
    return nbformat.v4.new_markdown_cell('\n\n'.join(filter(None, [
        f'<span id="{name.lower()}"></span>' if slug == label(page, name) else '', f'({slug})=', f'{"#"*max(level, 3)} `{name}`',
        f'[source]({link.group(1)}){{.source}}' if link else '', body.strip(),
        f'<details class="code"><summary>Code</summary>\n\n```python\n{code}\n```\n\n</details>' if code else ''])),
        metadata={'symbol': name, 'label': slug})


def directives(source):
    "The `#|` lines of a cell as a dict, and the source without them."
    lines = source.splitlines()
    flags = dict((re.split(r':?\s+', line[2:].strip(), maxsplit=1) + ['true'])[:2] for line in lines if line.startswith('#|'))
    return flags, '\n'.join(line for line in lines if not line.startswith('#|')).strip()


def code_cell(cell, page):
    "Quarto's directives -> myst-nb's tags; metadata that nbformat refuses is dropped."
    flags, source = directives(cell.source)
    tags = [tag for key, tag in (('echo', 'remove-input'), ('output', 'remove-output')) if flags.get(key) == 'false']
    return nbformat.v4.new_code_cell(source, outputs=cell.outputs, execution_count=1, metadata={'tags': tags} if tags else {})


def markdown_cell(cell, page):
    "Only the Colab badge is changed: a link with a class instead of a picture from elsewhere."
    badge = re.search(r'\[!\[Open In Colab\]\([^)]*\)\]\(([^)]*)\)', cell.source)
    return nbformat.v4.new_markdown_cell(f'[Open in Colab]({badge.group(1)}){{.colab}}' if badge else cell.source)


def asis(cell):
    "Outputs that are Markdown become Markdown cells, so that their links and pictures are the site's."
    texts = [''.join(o['data']['text/markdown']) for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {})]
    cell.outputs = [o for o in cell.get('outputs', []) if 'text/markdown' not in o.get('data', {})]
    return [nbformat.v4.new_markdown_cell(text) for text in texts]


def title_cell(cell):
    "The front matter that nbdev made of the first cell -> title and promise."
    matter = yaml.safe_load(cell.source.strip().strip('-'))
    promise = matter.get('description', '')
    return nbformat.v4.new_markdown_cell(f'# {matter["title"]}' + (f'\n\n{{.promise}}\n{promise}' if promise else ''))


def adapt(nb, page, sources):
    "The cells of one processed notebook, as myst-nb wants them."
    level, cells, taken = 1, [], set()
    for cell in nb.cells:
        if cell.cell_type == 'raw': cells.append(title_cell(cell))
        elif shown(cell): cells.append(api_cell(cell, page, level + 1, sources, taken))
        elif cell.cell_type == 'code':
            texts, cell = asis(cell), code_cell(cell, page)
            if cell.source or cell.outputs: cells.append(cell)
            cells += texts
        elif 'AUTOGENERATED' not in cell.source:
            cells.append(markdown_cell(cell, page))
            headings = re.findall(r'^(#+) ', re.sub(r'```.*?```', '', cell.source, flags=re.S), re.M)
            level = min(len(headings[-1]), 4) if headings else level
    return nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': nb.metadata.kernelspec, 'language_info': {'name': 'python'}})


# Pages that no notebook has

def toctrees(pages):
    "The sidebar: one caption for each room, its notebooks in the order of their numbers."
    def tree(caption, names): return '```{toctree}\n:hidden:\n:caption: ' + caption + '\n\n' + '\n'.join(names) + '\n```'
    rooms = [(caption, [p for p in pages if p.startswith(room + '/')]) for room, caption in ROOMS.items()]
    return '\n\n'.join(tree(*room) for room in rooms + [('Reference', ['api', 'changelog', 'contributing'])] if room[1])


def summary(cell):
    "First sentence of the docstring in an API cell."
    found = re.search(r'^\*(.+?)\*$', cell.source, re.M | re.S)
    return re.split(r'(?<=\.)\s|;', found.group(1).replace('\n', ' '))[0].rstrip('.') if found else ''


def entries(page, nb):
    "The public symbols of one page, one line each, under the page's title."
    title = re.search(r'^# (.*)', nb.cells[0].source).group(1)
    cells = [c for c in nb.cells if '.__' not in c.metadata.get('symbol', '.__')]
    lines = [f'- [`{c.metadata.symbol}`](#{c.metadata.label}): {summary(c)}'.removesuffix(': ') for c in cells]
    return [f'**[{title}](/{page}.ipynb)**', '\n'.join(lines)] if lines else []


def api_page(pages):
    "All public symbols by room and page."
    text = ['# All functions and classes', '{.promise}\nEvery public name, its first line, and the page that explains it.']
    for room, caption in ROOMS.items():
        found = [line for page, nb in pages.items() if page.startswith(room + '/') for line in entries(page, nb)]
        if found: text += [f'## {caption}'] + found
    return '\n\n'.join(text) + '\n'


# The build

def read_pages(proc):
    "Processed notebooks below `proc`, adapted; their order is the reading order."
    pages = {}
    for path in sorted(proc.rglob('*.ipynb'), key=lambda p: p.relative_to(proc).parts):
        page, nb = page_of(path.relative_to(proc)), nbformat.v4.reads(path.read_text(encoding='utf-8'))
        module = CFG.lib_path/(re.sub(r'^\d+_', '', page) + '.py')
        pages[page] = adapt(nb, page, definitions(module) if module.exists() else {})
    return pages


def write_pages(pages, source, labels):
    "Adapted notebooks with their links, and the pages that no notebook has."
    pages['index'].cells.append(nbformat.v4.new_markdown_cell(toctrees(pages)))
    for page, nb in pages.items():
        for cell in nb.cells:
            if cell.cell_type == 'markdown': cell.source = relink(cell.source, Path(page).parent.as_posix(), labels)
        path = source/f'{page}.ipynb'
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, path)
    (source/'api.md').write_text(api_page(pages), encoding='utf-8')
    for name in ('CHANGELOG', 'CONTRIBUTING'): shutil.copy(CFG.config_path/f'{name}.md', source/f'{name.lower()}.md')


def write_markdown(pages, html):
    "Each page once more as plain Markdown under `PAGE.html.md`, the address in the modules' docstrings."
    for page, nb in pages.items():
        text, _ = MarkdownExporter().from_notebook_node(nb)
        (html/f'{page}.html.md').write_text(re.sub(r'!\[\w+\]\(output_[^)]*\)\n*', '', text), encoding='utf-8')


def build(out=HERE/'_build', proc=None):
    "Build the site into `out/html`; a broken link or reference of ours fails the build."
    os.chdir(CFG.config_path)
    out, proc = Path(out).absolute(), Path(proc or proc_nbs(n_workers=2)).absolute()
    source, html = out/'source', out/'html'
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(proc, source, ignore=shutil.ignore_patterns('*.ipynb', '*.yml', '_*', '.*'))
    pages = read_pages(proc)
    write_pages(pages, source, {c.metadata.label for nb in pages.values() for c in nb.cells if 'label' in c.metadata})
    failed = sphinx_build(['-b', 'html', '-c', str(HERE), '-d', str(out/'doctrees'), '-W', '--keep-going', '-q', str(source), str(html)])
    if failed: sys.exit('The site has broken links or references, see above.')
    write_markdown(pages, html)
    return html


if __name__ == '__main__': print(f"The site: {build(*sys.argv[1:3])/'index.html'}")
