"""README.md from nbs/index.ipynb, without Quarto.

    python docs/readme.py            # write README.md
    python docs/readme.py --check    # fail when README.md is not what the notebook says
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.config import get_config

CFG = get_config(Path(__file__).parent)
NOTE = f'<!-- made from nbs/{CFG.readme_nb} by `make readme`: edit the notebook, not this file -->\n\n'


def visible(cell):
    "Is the cell meant for readers?"
    return not re.search(r'^#\|\s*(hide|default_exp|export)', cell.source, re.M) and bool(cell.source.strip())


def readable(cell):
    "A code cell that shows only its output becomes that output."
    if cell.cell_type != 'code' or not re.search(r'^#\|\s*echo:\s*false', cell.source, re.M): return cell
    texts = [''.join(o.data.get('text/markdown', '')) for o in cell.outputs if 'data' in o]
    return nbformat.v4.new_markdown_cell('\n\n'.join(texts))


def readme(path=None):
    "Text of README.md; links are relative to the repository."
    nb = nbformat.read(path or CFG.nbs_path/CFG.readme_nb, as_version=4)
    nb.cells = [readable(c) for c in nb.cells if visible(c)]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?!\w+:|#)([^)]+)\)', rf']({CFG.nbs_path.name}/\1)', text)
    return NOTE + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def main(check=False):
    "Write README.md, or compare."
    path, text = CFG.config_path/'README.md', readme()
    if not check: path.write_text(text, encoding='utf-8')
    elif path.read_text(encoding='utf-8') != text:
        print(f'README.md differs from nbs/{CFG.readme_nb}; run `make readme`')
        return 1
    return 0


if __name__ == '__main__': sys.exit(main('--check' in sys.argv[1:]))
