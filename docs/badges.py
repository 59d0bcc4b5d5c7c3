"""The Open-in-Colab badge of every notebook, made from the repository address in pyproject.toml.

    python docs/badges.py            # insert or renew
    python docs/badges.py --check    # only name the notebooks whose badge is missing or old
"""
import sys
from pathlib import Path

from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob

CFG = get_config(Path(__file__).parent)
PICTURE = 'https://colab.research.google.com/assets/colab-badge.svg'


def badge(path):
    "Markdown of the badge that opens the notebook `path` on Colab."
    place = Path(path).absolute().relative_to(CFG.config_path).as_posix()
    page = f'https://colab.research.google.com/github/{CFG.user}/{CFG.repo}/blob/{CFG.branch}/{place}'
    return f'[![Open In Colab]({PICTURE})]({page})'


def with_badge(cells, text):
    "`cells` with one badge, after `#| default_exp` or, where nothing is exported, after the title."
    cells = [c for c in cells if PICTURE not in c.source]
    exports = [i for i, c in enumerate(cells[:3]) if c.cell_type == 'code' and 'default_exp' in c.source]
    place = (exports or [0])[0] + 1
    return cells[:place] + [mk_cell(text, 'markdown', id='colab-badge')] + cells[place:]


def stale(path):
    "The notebook with its badge, or None when it has it already."
    nb = read_nb(path)
    old = [c.source for c in nb.cells]
    nb.cells = with_badge(list(nb.cells), badge(path))
    return nb if old != [c.source for c in nb.cells] else None


def main(check=False):
    "Renew the badges; with `check` only name what is out of date and fail."
    old = {path: nb for path in nbglob(as_path=True) if (nb := stale(path))}
    for path, nb in old.items():
        if not check: write_nb(nb, path)
        print(f'{path}: badge ' + ('is missing or old; run `make badges`' if check else 'renewed'))
    return int(check and bool(old))


if __name__ == '__main__': sys.exit(main('--check' in sys.argv[1:]))
