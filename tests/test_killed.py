"SIGKILL in the middle of a stage over a store: finished files stay, none is half written, and the rest comes as in a run without it."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss_nb.data.items import Dataset, Item
from wsss_nb.data.store import LabelStore, Maps, MapStore

HERE = Path(__file__).parent
IDS = [f'i{n}' for n in range(6)]


# The stages, on six small inputs; also called in the process that is killed

def view(root):
    items = [Item(i, root/f'{i}.png', (1, 2)) for i in IDS]
    return Dataset('six', ['a', 'b'], items, {'train': IDS}).view('tags', 'train')


def prepare(root, size=(24, 32)):
    "Images, maps, edges and two region maps of each item."
    rng, (h, w) = np.random.default_rng(0), size
    for i in IDS:
        Image.fromarray(np.kron(rng.integers(0, 256, (h // 8, w // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)).save(root/f'{i}.png')
        MapStore(root/'maps').save(i, Maps([1, 2], rng.random((2, h // 4, w // 4))))
        MapStore(root/'edges').save(i, Maps([0], rng.random((1, h, w))))
        for n in 'ab': LabelStore(root/n).save(i, np.kron(rng.integers(0, 4, (h // 4, w // 4)), np.ones((4, 4))).astype(np.uint8))


def walks(root, out, **kwargs):
    from wsss_nb.refine.walk import write_walks
    return write_walks(view(root), MapStore(root/'maps'), MapStore(root/'edges'), MapStore(out), **{'workers': 1, 'exp_times': 4, **kwargs})


def regions(root, out):
    from wsss_nb.refine.regions import write_regions
    return write_regions(view(root), LabelStore(out), steps=2, n_segments=20, workers=1)


def patches(root, out):
    from wsss_nb.refine.regions import RegionStore, write_regions
    return write_regions(view(root), RegionStore(out), steps=0, workers=1)


def perimeterfit(root, out):
    from wsss_nb.refine.perimeter import write_perimeterfit
    return write_perimeterfit(view(root), MapStore(root/'maps'), [LabelStore(root/n) for n in 'ab'], MapStore(out), workers=1)


STAGES = dict(walks=walks, regions=regions, patches=patches, perimeterfit=perimeterfit)


def child(stage, root, out, nth):
    "Runs a stage; when the n-th file is about to get its name, only half of it is on the disk, and the process waits to be killed."
    rename, left = os.replace, [int(nth)]
    def replace(src, dst):
        left[0] -= 1
        if left[0]: return rename(src, dst)
        os.truncate(src, os.path.getsize(src) // 2)
        print('half', flush=True)
        time.sleep(600)
    os.replace = replace
    STAGES[stage](Path(root), Path(out))


def start(*args): return subprocess.Popen([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(HERE)!r}); import test_killed; test_killed.{args[0]}(*sys.argv[1:])', *map(str, args[1:])],
                                          stdout=subprocess.PIPE, text=True, start_new_session=True)


def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith('.')} if folder.exists() else {}


# The tests

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('inputs')
    prepare(folder)
    return folder


@pytest.mark.parametrize('stage', STAGES)
def test_killed_while_a_file_is_written(root, tmp_path, stage):
    "Twice, at the second file of what is left; then to the end."
    assert STAGES[stage](root, tmp_path/'whole') == []
    whole, out, times = contents(tmp_path/'whole'), tmp_path/'out', {}
    assert len(whole) == len(IDS)
    for kills in (1, 2):
        p = start('child', stage, root, out, 2)
        assert p.stdout.readline() == 'half\n'
        p.kill()
        assert p.wait() == -signal.SIGKILL
        got = contents(out)
        assert len(got) == kills and got.items() <= whole.items()       # one more file, whole, and none that is not
        assert {n: (out/n).stat().st_mtime_ns for n in times} == times
        times = {n: (out/n).stat().st_mtime_ns for n in got}
    assert len([p for p in out.iterdir() if p.name.startswith('.')]) == 2      # what was half written, under a name that no store reads
    assert STAGES[stage](root, out) == []
    assert contents(out) == whole
    assert {n: (out/n).stat().st_mtime_ns for n in times} == times             # not made again


def slow_walks(root, out): walks(Path(root), Path(out), exp_times=9, workers=2)


def test_killed_with_its_workers(tmp_path):
    "No hook: the process and its workers are killed as soon as a file is there."
    root, out = tmp_path/'in', tmp_path/'out'
    root.mkdir()
    prepare(root, (48, 64))
    assert walks(root, tmp_path/'whole', exp_times=9) == []
    whole, p = contents(tmp_path/'whole'), start('slow_walks', root, out)
    while p.poll() is None and not contents(out): time.sleep(.01)
    killed = p.poll() is None
    if killed: os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    got = contents(out)
    assert got and got.items() <= whole.items() and (not killed or p.returncode == -signal.SIGKILL)
    assert walks(root, out, exp_times=9) == [] and contents(out) == whole
