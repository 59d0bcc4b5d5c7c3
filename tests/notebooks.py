"Runs every notebook as a test, each in a process of its own that starts with the heavy imports done."
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

PRELOAD = 'torch', 'torchvision', 'timm', 'fastai.vision.all', 'segmentation_models_pytorch', 'skimage.segmentation', 'sklearn.metrics', 'matplotlib.pyplot', 'pandas', 'cv2', 'nbdev.test'


def run(path):
    "Test one notebook in this process, and end it without waiting for idle workers that the notebook has left."
    from joblib.externals.loky import reusable_executor
    from nbdev.test import test_nb
    ok, seconds = test_nb(Path(path), do_print=True, basepath=Path.cwd())
    if reusable_executor._executor is not None: reusable_executor._executor.shutdown(wait=True, kill_workers=True)
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(0 if ok else 1)


def tested(context, path):
    start, process = time.perf_counter(), context.Process(target=run, args=(str(path),))
    process.start(); process.join()
    return path, process.exitcode, time.perf_counter() - start


def main():
    context = get_context('forkserver')
    context.set_forkserver_preload(list(PRELOAD))
    names = sys.argv[1:] or sorted(str(p) for p in Path('nbs').rglob('*.ipynb') if not any(part.startswith('.') for part in p.parts))
    with ThreadPoolExecutor(2) as pool: found = list(pool.map(lambda p: tested(context, p), names))
    for path, _, seconds in sorted(found, key=lambda f: -f[2])[:12]: print(f'{seconds:6.1f} s  {path}')
    failed = [path for path, code, _ in found if code]
    print(f'{len(found)} notebooks, {len(failed)} failed', *failed, sep='\n  ')
    return int(bool(failed))


if __name__ == '__main__': sys.exit(main())
