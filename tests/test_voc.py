"VOC 2012 with SBD: lists, tags from files, masks of both kinds, fetching; small trees in the published layouts, and files that lie."
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import urllib.request
import warnings
import zlib
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from scipy.io import savemat
from wsss_nb.data.items import VOID, InputError, read_mask, write_mask
from wsss_nb.data.voc import VOC_CLASSES, add_sbd, read_ids, read_labels, read_sbd, read_splits, sbd_masks, train_aug, voc

IDS = [f'2008_00000{n}' for n in range(10)]
LISTS = {'train': IDS[:4], 'val': IDS[4:6]}
SBD = {'train': IDS[2:7], 'val': IDS[5:]}       # cuts across VOC's lists, as the real one does
AUG = IDS[:4] + IDS[6:]
H, W = 20, 30


def truth(n, void):
    m = np.zeros((H, W), np.uint8)
    m[3:15, 4:20] = n + 1
    if void: m[3:15, 20:22] = VOID
    return m


def xml(objects):
    boxes = ''.join(f'<object><name>{n}</name><difficult>{d}</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>'
                    f'<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>' for n, d in objects)
    return f'<annotation><size><width>{W}</width><height>{H}</height></size>{boxes}</annotation>'


def mat(path, mask):
    "As SBD writes it: GTcls with the mask and 20 boundary maps."
    boundaries = np.empty((20, 1), object)
    for k in range(20): boundaries[k, 0] = np.zeros((2, 2))
    savemat(path, {'GTcls': {'Segmentation': mask, 'Boundaries': boundaries, 'CategoriesPresent': np.unique(mask)}}, do_compression=True)


def write_list(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(ids) + '\n')


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    "VOC2012 and benchmark_RELEASE beside it."
    root = tmp_path_factory.mktemp('published')
    v, s = root/'VOCdevkit/VOC2012', root/'benchmark_RELEASE/dataset'
    for p in (v/'JPEGImages', v/'Annotations', v/'SegmentationClass', s/'cls', s/'img'): p.mkdir(parents=True)
    for n, i in enumerate(IDS):
        Image.new('RGB', (W, H), (20 * n, 90, 200)).save(v/f'JPEGImages/{i}.jpg')
        (v/f'Annotations/{i}.xml').write_text(xml([(VOC_CLASSES[n], 0), ('person', n % 2)]))
        if n < 6: write_mask(v/f'SegmentationClass/{i}.png', truth(n, True))
        if n > 1:
            mat(s/f'cls/{i}.mat', truth(n, False))
            shutil.copy(v/f'JPEGImages/{i}.jpg', s/'img')
    for name, ids in LISTS.items(): write_list(v/f'ImageSets/Segmentation/{name}.txt', ids)
    for name, ids in SBD.items(): write_list(s/f'{name}.txt', ids)
    return root


@pytest.fixture
def pair(published, tmp_path):
    "A copy of both to spoil."
    shutil.copytree(published, tmp_path/'pair')
    return tmp_path/'pair/VOCdevkit/VOC2012', tmp_path/'pair/benchmark_RELEASE'


# --- lists

def test_train_aug_is_train_and_sbd_without_val(pair):
    v, s = pair
    assert train_aug(LISTS['train'], LISTS['val'], s) == AUG
    for folder in (s, s/'dataset', s.parent):
        data = voc(v.parent.parent, sbd=folder)
        assert data.splits == {**LISTS, 'train_aug': AUG, 'trainval': IDS[:6]}
    assert all(data[i].tags == tuple(sorted({n + 1, 15})) for n, i in enumerate(IDS))


@pytest.mark.parametrize('place', ['Segmentation/trainaug.txt', 'Segmentation/train_aug.txt', 'SegmentationAug/train_aug.txt', 'Segmentation/TrainAug.txt'])
@pytest.mark.parametrize('line', ['{}', '/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png', 'JPEGImages\\{}.jpg', '{} 1'])
def test_a_list_of_any_form(pair, place, line):
    v, _ = pair
    write_list(v/'ImageSets'/place, ['\ufeff' + line.format(AUG[0])] + [line.format(i) for i in AUG[1:]] + ['', line.format(AUG[0])])
    assert read_splits(v)['train_aug'] == AUG
    (v/'ImageSets'/place).with_name('._train_aug.txt').write_bytes(b'\0\x05\xff')     # left by a Mac
    assert voc(v).splits['train_aug'] == AUG


def test_names_keep_their_dots(tmp_path):
    write_list(tmp_path/'l.txt', ['a.b', 'x/c.d.jpg', 'e.PNG'])
    assert read_ids(tmp_path/'l.txt') == ['a.b', 'c.d', 'e']


def test_val_never_trains(pair):
    v, s = pair
    write_list(v/'ImageSets/Segmentation/trainaug.txt', AUG + LISTS['val'][:1])
    with pytest.warns(UserWarning, match=f'train_aug.txt and in val.txt, such as {LISTS["val"][0]}'): splits = read_splits(v)
    assert splits['train_aug'] == AUG
    write_list(v/'ImageSets/Segmentation/train.txt', LISTS['train'] + LISTS['val'][:1])
    with pytest.warns(UserWarning, match='in train.txt'): assert read_splits(v, s)['train_aug'] == AUG


def test_the_test_list_loads_without_annotations(pair):
    v, _ = pair
    write_list(v/'ImageSets/Segmentation/test.txt', ['2008_000100', '2008_000101'])
    with pytest.warns(UserWarning, match='none of the images of test.txt'): assert 'test' not in voc(v).splits
    for i in ('2008_000100', '2008_000101'): Image.new('RGB', (W, H)).save(v/f'JPEGImages/{i}.jpg')
    data = voc(v)
    assert [(o.tags, o.boxes, o.mask) for o in data.view('masks', 'test')] == [(None, None, None)] * 2
    os.remove(v/'JPEGImages/2008_000101.jpg')
    with pytest.raises(InputError, match='listed images are missing, such as 2008_000101.jpg'): voc(v)


@pytest.mark.parametrize('spoil, says', [
    (lambda v, s: (v/'ImageSets/Segmentation/val.txt').write_bytes(b'\xff\xfe\x00\x9f'), 'val.txt: not a text'),
    (lambda v, s: (s/'dataset/val.txt').unlink(), 'val.txt: no such list'),
    (lambda v, s: shutil.rmtree(s/'dataset/cls'), 'SBD is not in this folder'),
    (lambda v, s: shutil.rmtree(s), 'benchmark_RELEASE: no such folder')])
def test_missing_parts_are_named(pair, spoil, says):
    spoil(*pair)
    with pytest.raises(InputError, match=says): voc(pair[0], sbd=pair[1])


# --- tags

def test_difficult_objects_count_unless_told(published):
    v = published/'VOCdevkit/VOC2012'
    hard, easy = voc(v), voc(v, difficult=False)
    for n, i in enumerate(LISTS['train']):
        assert hard[i].tags == tuple(sorted({n + 1, 15})) and easy[i].tags == ((n + 1,) if n % 2 else hard[i].tags)
        assert hard[i].boxes == easy[i].boxes and [b.difficult for b in easy[i].boxes] == [False, bool(n % 2)]     # a person's head is no object


def hot(*ids):
    a = np.zeros(20, np.float32)
    a[np.array(ids, int) - 1] = 1
    return a


@pytest.mark.parametrize('kind', ['csv', 'json', 'npz', 'npz of numbers'])
def test_tags_from_a_label_file(published, tmp_path, kind):
    v, (a, b, c) = published/'VOCdevkit/VOC2012', IDS[:3]
    p = tmp_path/f'l.{kind[:4].strip()}'
    if kind == 'csv': p.write_text(f'image,tags\n{a}.jpg,person;aeroplane\n{b},\n{c},cat\n')
    elif kind == 'json': p.write_text(json.dumps({a: ['person', 1, 'person'], b: [], f'{c}.jpg': [8]}))
    else: np.savez(p, **{k.replace('_', '') if 'numbers' in kind else k: t for k, t in ((a, hot(1, 15)), (b, hot()), (c, hot(8)))})
    data = voc(v, labels=p)
    assert [data[i].tags for i in IDS[:4]] == [(1, 15), (), (8,), None]       # one that the file does not name is unknown
    assert data[a].boxes == voc(v)[a].boxes


def test_names_without_image_are_told(tmp_path):
    images = dict.fromkeys(IDS)
    (tmp_path/'l.csv').write_text(f'image,tags\nzebra,cat\n{IDS[0]},cat\n')
    (tmp_path/'l.json').write_text(json.dumps({'zebra': ['cat'], IDS[0]: ['cat']}))
    for p in tmp_path.iterdir():
        with pytest.warns(UserWarning, match='1 names have no image.*zebra'): assert read_labels(p, images) == {IDS[0]: (8,)}


class Boom:
    "Makes a folder when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('name', ['cls_labels.npy', 'l.pkl', 'l.npz', 'l.PICKLE', 'l.pt', 'renamed.json', 'renamed.csv'])
def test_pickles_are_not_opened(tmp_path, name):
    p, trap = tmp_path/name, tmp_path/'trap'
    if name.endswith('npy'): np.save(p, {IDS[0]: Boom(trap)}, allow_pickle=True)
    elif name.endswith('npz'): np.savez(p, **{IDS[0]: np.array([Boom(trap)], object)})
    else: p.write_bytes(pickle.dumps({IDS[0]: Boom(trap)}))
    with pytest.raises(InputError) as e: read_labels(p, dict.fromkeys(IDS))
    assert not trap.exists() and str(p) in str(e.value)
    if 'renamed' not in name: assert 'np.savez("cls_labels.npz"' in str(e.value)


def test_the_remedy_works(tmp_path, monkeypatch):
    "The line in the message, run as it stands, makes what is read."
    monkeypatch.chdir(tmp_path)
    np.save('cls_labels.npy', {2008000000: hot(3), '2008_000001': hot(4, 20)}, allow_pickle=True)
    with pytest.raises(InputError) as e: read_labels('cls_labels.npy', dict.fromkeys(IDS))
    exec(re.search(r'np\.savez\(.*\)', str(e.value))[0], {'np': np})
    assert read_labels('cls_labels.npz', dict.fromkeys(IDS)) == {IDS[0]: (3,), IDS[1]: (4, 20)}


@pytest.mark.parametrize('name, content, says', [
    ('l.json', '[1, 2]', 'not a table'), ('l.json', '{', 'not a readable JSON'), ('l.json', '[' * 100000, 'not a readable JSON|not a table'),
    ('l.json', '{"a": "cat"}', 'not a list'), ('l.json', '{"a": ["caat"]}', "Did you mean 'cat'"), ('l.json', '{"a": [0]}', '0 is no class'),
    ('l.json', '{"a": [21]}', '21 is no class'), ('l.json', '{"a": [true]}', 'True is no class'), ('l.json', '{"a": [[1]]}', 'is no class'),
    ('l.csv', 'image,tags\na,caat\n', "Did you mean 'cat'"), ('l.csv', '', 'is empty'), ('l.csv', 'a\n', 'no second column'),
    ('l.npz', 'no archive', 'not a readable label file'), ('l.yaml', 'a: cat', 'no label file'), ('l.txt', 'a cat', 'no label file')])
def test_bad_label_files(tmp_path, name, content, says):
    (tmp_path/name).write_text(content)
    with pytest.raises(InputError, match=says) as e: read_labels(tmp_path/name, {'a': None})
    assert name in str(e.value)
    with pytest.raises(InputError, match='no such file'): read_labels(tmp_path/f'absent_{name}', {'a': None})


@pytest.mark.parametrize('values', [np.zeros(21), np.full(20, 2), np.full(20, np.nan), np.array(['cat']), np.zeros(2**18)])
def test_bad_arrays_of_tags(tmp_path, values):
    np.savez(tmp_path/'l.npz', a=values)
    with pytest.raises(InputError, match='l.npz'): read_labels(tmp_path/'l.npz', {'a': None})


# --- masks

def test_palette_and_grey_give_the_same_numbers(pair):
    v, _ = pair
    before = [voc(v).read_truth(voc(v)[i]) for i in IDS[:6]]
    for n, i in enumerate(IDS[:6]):
        assert np.array_equal(before[n], truth(n, True))
        Image.fromarray(truth(n, True)).save(v/f'SegmentationClass/{i}.png')
        with Image.open(v/f'SegmentationClass/{i}.png') as im: assert im.mode == 'L'
    for n, i in enumerate(IDS[:6]): assert np.array_equal(voc(v).read_truth(voc(v)[i]), before[n])
    colours = Image.fromarray(truth(0, True)).convert('RGB'); colours.save(v/f'SegmentationClass/{IDS[0]}.png')
    with pytest.raises(InputError, match='not colours'): voc(v).read_truth(voc(v)[IDS[0]])


def test_sbd_equals_torchvision(pair, tmp_path):
    from torchvision.datasets import SBDataset
    v, s = pair
    assert sbd_masks(s, tmp_path/'png', workers=1) == []
    for split in SBD:
        theirs = SBDataset(s/'dataset', split, 'segmentation')
        for i, (image, mask) in zip(SBD[split], theirs): assert np.array_equal(np.array(mask), read_mask(tmp_path/f'png/{i}.png', 20, image.size[::-1]))


def test_sbd_masks_are_augmented_masks(pair):
    "With VOC's own masks for VOC's images; the list goes with them; the loader needs nothing else."
    v, s = pair
    with pytest.raises(InputError, match='SegmentationClassAug: no such folder of masks.*add_sbd'): voc(v, masks='SegmentationClassAug')
    assert add_sbd(v, s, workers=1) == []
    shutil.rmtree(s)
    data = voc(v, masks='SegmentationClassAug')
    assert data.splits['train_aug'] == AUG
    for n, i in enumerate(IDS): assert np.array_equal(data.read_truth(data[i]), truth(n, n < 6)) if i in AUG else True
    assert voc(v)[IDS[9]].mask is None        # VOC itself has none of it


def test_finished_masks_are_kept_and_bad_ones_named(pair, tmp_path):
    v, s = pair
    cls, out = s/'dataset/cls', tmp_path/'png'
    whole = (cls/f'{IDS[3]}.mat').read_bytes()
    (cls/f'{IDS[3]}.mat').write_bytes(whole[:len(whole) // 2])
    mat(cls/f'{IDS[4]}.mat', np.zeros((H, W + 1), np.uint8))
    mat(cls/f'{IDS[5]}.mat', np.full((H, W), 21, np.uint8))
    bad = dict(sbd_masks(s, out, workers=1))
    assert [*bad] == IDS[3:6] and 'not a readable mask of SBD' in bad[IDS[3]] and 'the mask is 31×20, its image 30×20' in bad[IDS[4]] and '[21]' in bad[IDS[5]]
    assert all(f'{i}.mat' in b for i, b in bad.items()) and sorted(p.stem for p in out.iterdir()) == [IDS[2], *IDS[6:]]
    stamp = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    (cls/f'{IDS[3]}.mat').write_bytes(whole)
    assert [i for i, _ in sbd_masks(s, out, workers=1)] == IDS[4:6]
    assert {p: (out/p).stat().st_mtime_ns for p in stamp} == stamp and (out/f'{IDS[3]}.png').is_file()


def test_masks_of_voc_replace_earlier_ones(pair):
    "A folder begun without VOC's own masks does not keep SBD's where they should not be."
    v, s = pair
    sbd_masks(s, v/'SegmentationClassAug', workers=1)
    add_sbd(v, s, workers=1)
    assert (read_mask(v/f'SegmentationClassAug/{IDS[3]}.png') == VOID).any()


def test_two_processes_write_the_same(pair, tmp_path):
    _, s = pair
    for n in (1, 2): assert sbd_masks(s, tmp_path/str(n), workers=n) == []
    assert {p.name: p.read_bytes() for p in (tmp_path/'1').iterdir()} == {p.name: p.read_bytes() for p in (tmp_path/'2').iterdir()}


# --- MATLAB files that lie

def element(kind, body): return struct.pack('<2I', kind, len(body)) + body


HEADER = b'MATLAB 5.0 MAT-file'.ljust(124) + b'\x00\x01IM'


@pytest.mark.parametrize('content, says', [
    (b'', ''), (b'GTcls', ''), (HEADER, ''), (HEADER + b'\x0f', ''), (HEADER + element(15, b'no zlib'), 'error'),
    (HEADER + element(15, zlib.compress(bytes(2**27))), 'too large'), (HEADER + element(15, zlib.compress(bytes(2**25))) * 3, 'too large'),
    (HEADER + struct.pack('<2I', 15, 2**32 - 1) + zlib.compress(bytes(2**27)), 'too large'),
    (b'\x89HDF\r\n\x1a\n' + bytes(600), ''), (b'MATLAB 7.3 MAT-file'.ljust(124) + b'\x00\x02IM' + bytes(400), 'HDF')])
def test_no_mat_file_at_all(tmp_path, content, says):
    (tmp_path/'a.mat').write_bytes(content)
    with pytest.raises(InputError, match='a.mat: not a readable mask of SBD') as e: read_sbd(tmp_path/'a.mat')
    assert says in str(e.value)


@pytest.mark.parametrize('held', [
    {'GTinst': {'Segmentation': np.zeros((3, 4))}}, {'GTcls': np.zeros((3, 4))}, {'GTcls': {'Boundaries': np.zeros((3, 4))}}, {'GTcls': {'Segmentation': 'cat'}},
    {'GTcls': {'Segmentation': np.zeros((2, 3, 4))}}, {'GTcls': {'Segmentation': np.full((3, 4), .5)}}, {'GTcls': {'Segmentation': np.full((3, 4), -1)}},
    {'GTcls': {'Segmentation': np.full((3, 4), 256)}}, {'GTcls': {'Segmentation': np.full((3, 4), np.nan)}}, {'GTcls': {'Segmentation': np.zeros((0, 0))}},
    {'GTcls': {'Segmentation': np.zeros((3, 4), complex)}}, {'GTcls': []}])
def test_a_mat_file_of_something_else(tmp_path, held):
    savemat(tmp_path/'a.mat', held)
    with warnings.catch_warnings(), pytest.raises(InputError, match='a.mat: not a readable mask of SBD'):
        warnings.simplefilter('ignore', RuntimeWarning)
        read_sbd(tmp_path/'a.mat')


def test_large_files_are_not_opened(tmp_path):
    mat(tmp_path/'a.mat', truth(3, False))
    with pytest.raises(InputError, match='too large'): read_sbd(tmp_path/'a.mat', most=100)
    with pytest.raises(InputError, match='no such mask'): read_sbd(tmp_path/'b.mat')


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
    p = tmp_path_factory.mktemp('sound')
    savemat(p/'a.mat', {'GTcls': {'Segmentation': truth(3, False)}})
    return p


@pytest.fixture
def little_memory():
    "Two gigabytes more than now, so that a size that lies cannot take the machine along."
    resource = pytest.importorskip('resource')
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(re.search(r'VmSize:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024 if Path('/proc/self/status').is_file() else 2**36
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_altered_bytes_never_break_through(sound, little_memory, data):
    "Any change of a sound file gives a mask or an `InputError`."
    b = bytearray((sound/'a.mat').read_bytes())
    for _ in range(data.draw(st.integers(1, 4))): b[data.draw(st.integers(100, 420))] = data.draw(st.integers(0, 255))
    (sound/'b.mat').write_bytes(b[:data.draw(st.integers(100, len(b)))])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: assert read_sbd(sound/'b.mat').dtype == np.uint8
        except InputError as e: assert 'b.mat' in str(e)


# --- fetching

@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs): raise OSError('network is unreachable')
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)


def archive(path, members, mode):
    "A tar of name -> text; its MD5."
    with tarfile.open(path, mode) as t:
        for name, text in members.items():
            info = tarfile.TarInfo(name); info.size = len(text)
            t.addfile(info, io.BytesIO(text.encode()))
    return md5(path.read_bytes()).hexdigest()


def fetchers():
    from torchvision.datasets import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT
    from wsss_nb.data.voc import download_sbd, download_voc
    d = DATASET_YEAR_DICT['2012']
    return {'voc': (download_voc, d['url'], d['filename'], 'w', 'VOCdevkit/VOC2012', lambda m, v: m.setitem(d, 'md5', v)),
            'sbd': (download_sbd, SBDataset.url, SBDataset.filename, 'w:gz', 'benchmark_RELEASE', lambda m, v: m.setattr(SBDataset, 'md5', v))}


@pytest.mark.parametrize('which', ['voc', 'sbd'])
def test_fetching(which, tmp_path, monkeypatch, offline):
    fetch, url, name, mode, inside, expect = fetchers()[which]
    with pytest.raises(InputError) as e: fetch(tmp_path/'new')
    assert all(s in str(e.value) for s in (url, 'network is unreachable', str(tmp_path/'new'/name), 'MD5'))
    digest = archive(tmp_path/name, {f'{inside}/a.txt': 'sound'}, mode)
    with pytest.raises(InputError, match='network'): fetch(tmp_path)      # placed by hand, but not what it should be
    assert not (tmp_path/inside).exists()
    expect(monkeypatch, digest)
    assert fetch(tmp_path) == tmp_path/inside and (tmp_path/inside/'a.txt').read_text() == 'sound'
    (tmp_path/name).unlink()
    assert fetch(tmp_path) == tmp_path/inside     # it is there: nothing to fetch
    assert not [*tmp_path.glob('.unpack-*')]


@pytest.mark.parametrize('which', ['voc', 'sbd'])
def test_an_archive_stays_in_its_folder(which, tmp_path, monkeypatch, offline):
    fetch, url, name, mode, inside, expect = fetchers()[which]
    (tmp_path/'in').mkdir()
    expect(monkeypatch, archive(tmp_path/'in'/name, {f'{inside}/a.txt': 'sound', '../../outside.txt': 'evil'}, mode))
    before = getattr(tarfile.TarFile, 'extraction_filter', None)
    with pytest.raises(InputError, match='outside'): fetch(tmp_path/'in')
    assert not [*tmp_path.rglob('outside.txt')] and not (tmp_path/'in'/inside).exists() and not [*(tmp_path/'in').glob('.unpack-*')]
    assert getattr(tarfile.TarFile, 'extraction_filter', None) is before


# --- the command

def test_wsss_data_voc(pair, tmp_path, capsys, offline):
    from wsss_nb.study.cli import main
    assert main(['data', 'voc', str(tmp_path/'empty')]) == 1
    says = capsys.readouterr().err
    assert 'VOCtrainval_11-May-2012.tar' in says and len(says.splitlines()) == 1
    root = pair[0].parent.parent
    assert main(['data', 'voc', str(root)]) == 0 and str(pair[0]) in capsys.readouterr().out
    assert main(['data', 'voc', str(root), '--sbd', '--workers', '1']) == 0
    assert 'train_aug 8' in capsys.readouterr().out and len([*(pair[0]/'SegmentationClassAug').iterdir()]) == 10
    (pair[0]/f'SegmentationClassAug/{IDS[9]}.png').unlink(); (pair[1]/f'dataset/cls/{IDS[9]}.mat').write_bytes(b'short')
    assert main(['data', 'voc', str(root), '--sbd', '--workers', '1']) == 1
    assert f'{IDS[9]}.mat' in capsys.readouterr().err
