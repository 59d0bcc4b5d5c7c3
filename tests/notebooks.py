"""Every notebook as a test, by nbdev: a process for each, two at a time, forked from one that has the imports done.

    python tests/notebooks.py                   # all
    python tests/notebooks.py nbs/index.ipynb   # some
"""
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NBS = Path(__file__).absolute().parent.parent/'nbs'
IMPORTS = ['nbdev.test', 'fastai.vision.all', 'timm', 'segmentation_models_pytorch', 'sklearn.metrics', 'skimage.segmentation', 'matplotlib.pyplot', 'hypothesis', 'wsss_nb.study.cli']
LIMIT = 1200    # seconds for a notebook


def work(path):
    "In a process of its own: 0 when every cell runs."
    from joblib.externals.loky import get_reusable_executor
    from nbdev.test import test_nb
    good = test_nb(path, do_print=True, basepath=NBS.parent)[0]
    get_reusable_executor().shutdown(kill_workers=True)     # idle workers would be waited for, five minutes
    sys.exit(not good)


def run(path, context):
    "Path, exit code, and seconds."
    start, process = time.time(), context.Process(target=work, args=(path,))
    process.start()
    process.join(LIMIT)
    if process.is_alive(): process.kill(); process.join()
    return path, process.exitcode, time.time() - start


def main(paths):
    paths = [Path(p).absolute() for p in paths] or sorted(p for p in NBS.rglob('*.ipynb') if not any(x.startswith('.') for x in p.parts))
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(IMPORTS)
    with ThreadPoolExecutor(2) as pool: done = list(pool.map(lambda p: run(p, context), paths))
    print('slowest:', ', '.join(f'{p.stem} {s:.0f} s' for p, _, s in sorted(done, key=lambda d: -d[2])[:8]))
    bad = [f'{p} ({f"stopped after {LIMIT} s" if code == -9 else f"exit code {code}"})' for p, code, _ in done if code]
    print(f'{len(done) - len(bad)} of {len(done)} notebooks passed' + ''.join(f'\nFAILED {b}' for b in bad))
    return bool(bad)


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
