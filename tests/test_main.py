"""Whole commands, as a shell runs them: the main job, killed and resumed, on photos of one's own, and with bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss_nb.data.items import read_mask
from wsss_nb.data.pets import pets
from wsss_nb.data.sample import sample
from wsss_nb.study.main import classifier_stage, profile_settings, train_from_tags

WSSS = Path(sys.executable).parent/'wsss'    # the installed command
ENV = {**os.environ, 'WSSS_PROFILE': 'smoke', 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}


def wsss(*args, **kwargs):
    "Run the command in a process of its own."
    return subprocess.run([WSSS, *map(str, args)], capture_output=True, text=True, env=ENV, timeout=300, **kwargs)


def table(runs):
    "The text of the final table of a folder of runs."
    files = list(Path(runs).glob('main-*.json'))
    assert len(files) == 1, files
    return files[0].read_text()


def weights(runs, stage):
    "The bytes of a trained network."
    return next(Path(runs).glob(f'{stage}-*/**/*.safetensors')).read_bytes()


@pytest.fixture(scope='module')
def root(): return sample(profile='smoke')


@pytest.fixture(scope='module')
def runs(tmp_path_factory, root):
    "A main job that nobody disturbed."
    folder = tmp_path_factory.mktemp('main')/'runs'
    r = wsss('study', '-o', folder)
    assert r.returncode == 0, r.stderr
    (folder.parent/'said.txt').write_text(r.stdout)
    return folder


def test_study_says_where_it_wrote(runs):
    said = (runs.parent/'said.txt').read_text()
    for name in ('all foreground', 'centre ellipse', 'U-Net on pseudo masks', 'U-Net on true masks'): assert name in said
    for line in said.splitlines():
        if line.startswith(('table ', 'pictures ')): assert Path(line.split(maxsplit=1)[1]).is_file()
    with Image.open(next(runs.glob('*.png'))) as sheet: assert sheet.width > 400 and sheet.getextrema()[0][0] < sheet.getextrema()[0][1]
    records = [json.loads(p.read_text()) for p in runs.glob('*/record.json')]
    assert {r['stage'] for r in records} == {'classifier', 'cam', 'pseudo', 'segment', 'segment_truth', 'predict', 'predict_truth'}
    assert all(r['packages']['torch'] and r['wall_s'] > 0 and r['peak_memory_gb'] < 3 for r in records)


def test_second_call_reuses(runs):
    before = {p: p.stat().st_mtime_ns for p in runs.glob("*/record.json")}
    r = wsss('study', '-o', runs)
    assert r.returncode == 0 and r.stdout.count('reused') == 7
    assert {p: p.stat().st_mtime_ns for p in runs.glob('*/record.json')} == before
    assert table(runs)


def test_killed_and_resumed_is_bitwise_the_same(runs, tmp_path):
    "SIGKILL after each few files, wherever that is, until it gets through."
    folder, kills = tmp_path/'runs', 0
    command = [WSSS, 'study', '-o', str(folder)]
    count = lambda: sum(1 for p in folder.rglob('*') if p.is_file() and not p.name.startswith('.')) if folder.exists() else 0
    for step in (1, 2, 9, 13, 1, 2, 3, 4):
        p, had = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV), count()
        while p.poll() is None and count() < had + step: time.sleep(.02)
        if p.poll() is None: p.send_signal(signal.SIGKILL); kills += 1
        p.wait()
    r = wsss('study', '-o', folder)
    assert r.returncode == 0 and kills >= 5, (kills, r.stderr)
    for stage in ('classifier', 'segment', 'segment_truth'): assert weights(folder, stage) == weights(runs, stage)
    assert table(folder) == table(runs)


def test_training_needs_no_mask(root, tmp_path, runs):
    "All mask files deleted: the tag pipeline gives the same network."
    shutil.copytree(root/'pets', tmp_path/'pets')
    shutil.rmtree(tmp_path/'pets/annotations/trimaps')
    made = train_from_tags(tmp_path/'runs', pets(tmp_path/'pets', classes='breeds').view('tags', 'trainval'), profile_settings('smoke'), say=lambda t: None)
    assert made['segment'].done
    from safetensors.numpy import load
    a, b = (load(weights(r, 'classifier')) for r in (tmp_path/'runs', runs))
    assert a.keys() == b.keys() and all(np.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_rounds(root, tmp_path):
    "A second round learns from the first network's masks; three rounds reuse what two have done; deleted stages come back the same."
    view = pets(root/'pets', classes='breeds').view('tags', 'trainval')
    s = profile_settings('smoke', classifier_train='head', rounds=2)
    made = train_from_tags(tmp_path, view, s, say=lambda t: None)
    assert list(made) == ['classifier', 'cam', 'pseudo', 'segment_1', 'relabel_1', 'segment']
    assert made['segment'].config['labels'] == made['relabel_1'].hash != made['segment_1'].config['labels']
    assert sorted(p.stem for p in (made['relabel_1']/'masks').glob('*.png')) == sorted(view.ids)
    before = (made['segment']/'model/model.safetensors').read_bytes()
    shutil.rmtree(made['relabel_1'].folder); shutil.rmtree(made['segment'].folder)
    three = train_from_tags(tmp_path, view, profile_settings('smoke', classifier_train='head', rounds=3), say=lambda t: None)
    assert three['segment_2'].folder == made['segment'].folder and (made['segment']/'model/model.safetensors').read_bytes() == before


@pytest.mark.parametrize('how, extra, says', [('alll', {}, 'known: head, all, warm, sgd'), ('head', {'pieces': 4}, "needs 'warm', 'all' or 'sgd'")])
def test_unknown_ways_to_train(how, extra, says, root, tmp_path):
    view = pets(root/'pets', classes='breeds').view('tags', 'trainval')
    with pytest.raises(ValueError, match=says): classifier_stage(tmp_path, view, profile_settings('smoke', classifier_train=how), 'x', print, **extra)
    assert not any(tmp_path.iterdir())


def test_edited_run_is_refused(runs, tmp_path):
    copy = shutil.copytree(runs, tmp_path/'runs')
    config = next(copy.glob('classifier-*/config.json'))
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 7'))
    r = wsss('study', '-o', copy)
    assert r.returncode == 1 and 'config.json' in r.stderr and 'Delete the folder' in r.stderr and 'Traceback' not in r.stderr


@pytest.fixture(scope='module')
def photos(root, tmp_path_factory):
    "Photos with a list of tags; two are bad."
    folder = tmp_path_factory.mktemp('own')
    (folder/'photos').mkdir()
    rows = ['image,tags']
    for p in sorted((root/'pets/images').glob('*.jpg')):
        shutil.copy(p, folder/'photos'); rows.append(f'{p.name},{"cat" if p.stem[0].isupper() else "dog"}')
    (folder/'photos/broken.jpg').write_bytes(b'\xff\xd8\xff half a photo'); rows.append('broken.jpg,cat')
    shutil.copy(p, folder/'photos/untagged.jpg')
    (folder/'tags.csv').write_text('\n'.join(rows) + '\n')
    return folder


def test_own_photos(photos):
    r = wsss('segment', photos/'photos', '--labels', photos/'tags.csv', '-o', photos/'model', '--epochs', 1, '--size', 96)
    assert r.returncode == 1 and 'broken.jpg' in r.stderr and 'untagged.jpg' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    assert (photos/'model/model.safetensors').is_file() and (photos/'model/pseudo_masks.jpg').is_file()
    r = wsss('predict', photos/'model', photos/'photos', '-o', photos/'masks')
    assert r.returncode == 1 and 'broken.jpg' in r.stderr
    good = [p for p in (photos/'photos').iterdir() if p.name != 'broken.jpg']
    for p in good:
        with Image.open(p) as im: assert read_mask(photos/f'masks/{p.stem}.png', n_classes=2).shape == im.size[::-1]
        assert (photos/f'masks/overlays/{p.stem}.jpg').is_file()
    (photos/'photos/broken.jpg').unlink()
    assert wsss('predict', photos/'model', photos/'photos', '-o', photos/'masks').returncode == 0


def test_evaluate_command(root, tmp_path):
    truth = root/'pets/annotations/trimaps'
    ds = pets(root/'pets')
    (tmp_path/'masks').mkdir()
    for o in ds.items: Image.fromarray((ds.read_truth(o) == 1).astype(np.uint8)).save(tmp_path/f'masks/{o.id}.png')
    r = wsss('evaluate', tmp_path/'masks', truth, '--trimaps')
    assert r.returncode == 0 and '1.000' in r.stdout, r.stderr
    next((tmp_path/'masks').iterdir()).rename(tmp_path/'masks/stranger.png')
    r = wsss('evaluate', tmp_path/'masks', truth, '--trimaps')
    assert r.returncode == 1 and 'stranger' in r.stdout


@pytest.mark.parametrize('args, code, word', [
    (['--help'], 0, 'segment'), (['study', '--help'], 0, '--profile'), ([], 2, 'commands'), (['fly'], 2, 'invalid choice'),
    (['segment', 'nowhere'], 1, 'no such folder'), (['predict', 'nowhere', 'nowhere'], 1, 'nowhere'), (['--version'], 0, 'wsss_nb')])
def test_endings(args, code, word, tmp_path):
    r = wsss(*args, cwd=tmp_path)
    assert r.returncode == code and word in r.stdout + r.stderr and 'Traceback' not in r.stderr
