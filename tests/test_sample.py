"The rendered sample: same files from any number of processes, layouts that others' readers accept, exact boxes."
import hashlib
from pathlib import Path
from xml.etree import ElementTree

import cv2, numpy as np, pytest
from PIL import Image
from torchvision.datasets import OxfordIIITPet, VOCDetection, VOCSegmentation

from wsss_nb.data.items import InputError
from wsss_nb.data.sample import BREEDS, VOC, pet_picture, render_background, render_pets, render_voc, sample, stream, void_ring


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp('rendered')
    render_pets(path/'pets'/'oxford-iiit-pet', n_train=48, n_test=24, size=64, workers=1)
    render_voc(path/'voc'/'VOCdevkit', n_train=40, n_val=8, size=96, workers=1)
    render_background(path/'background', 6, size=64, workers=1)
    return path


def digests(folder):
    folder = Path(folder)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file()}


def boxes(xml):
    return [(o.findtext('name'), tuple(int(e.text) for e in o.find('bndbox')), o.findtext('difficult')) for o in ElementTree.parse(xml).iter('object')]


def test_two_workers_write_the_same_files(root, tmp_path):
    render_pets(tmp_path/'pets', n_train=48, n_test=24, size=64, workers=2)
    assert digests(tmp_path/'pets') == digests(root/'pets/oxford-iiit-pet')
    render_voc(tmp_path/'voc', n_train=40, n_val=8, size=96, workers=2)
    assert digests(tmp_path/'voc') == digests(root/'voc/VOCdevkit')


def test_a_picture_depends_on_its_name_and_seed_only(root, tmp_path):
    small = digests(render_pets(tmp_path/'few', n_train=16, n_test=8, size=64, workers=1)/'images')
    large = digests(root/'pets/oxford-iiit-pet/images')
    assert all(large[k] == v for k, v in small.items()) and len(set(large.values())) == len(large)
    other = digests(render_pets(tmp_path/'other', n_train=16, n_test=8, size=64, seed=1, workers=1)/'images')
    assert not set(other.values()) & set(small.values())


def test_torchvision_reads_the_pets(root):
    for split, n in (('trainval', 48), ('test', 24)):
        d = OxfordIIITPet(root/'pets', split, target_types=('category', 'binary-category', 'segmentation'))
        assert len(d) == n and len(d.classes) == len(BREEDS)
        for i in range(len(d)):
            im, (breed, species, trimap) = d[i]
            t = np.array(trimap)
            assert t.shape == im.size[::-1] and set(np.unique(t)) <= {1, 2, 3} and {1, 3} <= set(np.unique(t))
            assert BREEDS[breed].species == ('cat', 'dog')[species]
            assert d.classes[breed] == ' '.join(p.title() for p in BREEDS[breed].name.split('_'))


def test_border_lies_between_pet_and_background(root):
    for p in (root/'pets/oxford-iiit-pet/annotations/trimaps').iterdir():
        t = np.array(Image.open(p))
        near = cv2.dilate((t == 2).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert not (near & (t == 1)).any()


def test_pet_lists_and_head_boxes(root):
    a = root/'pets/oxford-iiit-pet/annotations'
    lines = (a/'list.txt').read_text().splitlines()
    assert lines[0] == '#Image CLASS-ID SPECIES BREED ID'
    rows = [l.split() for l in lines if not l.startswith('#')]
    split = {s: [l.split()[0] for l in (a/f'{s}.txt').read_text().splitlines()] for s in ('trainval', 'test')}
    assert sorted(r[0] for r in rows) == sorted(split['trainval'] + split['test'])
    assert {r[2] for r in rows if r[0][0].isupper()} == {'1'} and {r[2] for r in rows if r[0][0].islower()} == {'2'}
    xmls = {p.stem for p in (a/'xmls').iterdir()}
    assert xmls <= set(split['trainval']) and len(xmls) > .8 * len(split['trainval'])
    for stem in xmls:
        (name, (x0, y0, x1, y1), _), = boxes(a/f'xmls/{stem}.xml')
        t = np.array(Image.open(a/f'trimaps/{stem}.png'))
        assert name == ('cat' if stem[0].isupper() else 'dog')
        assert 1 <= x0 < x1 <= t.shape[1] and 1 <= y0 < y1 <= t.shape[0]
        assert (t[y0 - 1:y1, x0 - 1:x1] != 2).mean() > .3      # a head box is mostly pet


def test_head_is_part_of_the_pet():
    for i in range(16):
        rgb, mask, head = pet_picture(i % len(BREEDS), stream(3, f'{i}'), 64)
        assert rgb.dtype == np.uint8 and rgb.shape[:2] == mask.shape == head.shape and max(mask.shape) == 64
        assert not (head & ~mask).any()


def test_torchvision_reads_voc(root):
    for split, n in (('train', 40), ('val', 8), ('trainval', 48)):
        d = VOCSegmentation(root/'voc', '2012', split)
        assert len(d) == n == len(VOCDetection(root/'voc', '2012', split))
        for im, m in d:
            m = np.array(m)
            assert m.shape == im.size[::-1] and set(np.unique(m)) <= {*range(21), 255}


def test_voc_boxes_are_tight_around_instances(root):
    v = root/'voc/VOCdevkit/VOC2012'
    several = 0
    for xml in (v/'Annotations').iterdir():
        o, m = (np.array(Image.open(v/f'{d}/{xml.stem}.png')) for d in ('SegmentationObject', 'SegmentationClass'))
        found = boxes(xml)
        numbers = [k for k in np.unique(o) if 0 < k < 255]
        assert len(found) == len(numbers) >= 1
        several += len(found) > 1
        for k, (name, box, difficult) in zip(numbers, found):
            ys, xs = np.nonzero(o == k)
            assert box == (xs.min() + 1, ys.min() + 1, xs.max() + 1, ys.max() + 1)
            assert set(m[o == k]) == {VOC.index(name) + 1} and difficult == str(int((o == k).mean() < .006))
    assert several > 5


def test_weak_labels_tell_the_truth(root):
    v = root/'voc/VOCdevkit/VOC2012'
    for p in (v/'scribbles').iterdir():
        m, o, s, q = (np.array(Image.open(v/d/p.name)) for d in ('SegmentationClass', 'SegmentationObject', 'scribbles', 'points'))
        for weak in (s, q):
            known = weak != 254
            assert (weak[known] == m[known]).all() and 255 not in weak
            for k in (k for k in np.unique(o) if 0 < k < 255): assert known[o == k].any()
        assert 2 <= (q != 254).sum() <= 6 and (s != 254).mean() < .2


def test_main_lists_agree_with_the_boxes(root):
    v = root/'voc/VOCdevkit/VOC2012'
    for c in VOC:
        for line in (v/f'ImageSets/Main/{c}_trainval.txt').read_text().splitlines():
            stem, flag = line.split()
            here = [d for n, _, d in boxes(v/f'Annotations/{stem}.xml') if n == c]
            assert int(flag) == (-1 if not here else 1 if '0' in here else 0)


def test_void_ring_spares_the_nearer_object():
    o = np.zeros((9, 12), np.uint8); o[2:6, 2:7] = 1; o[4:8, 5:10] = 2
    ring = void_ring(o)
    assert not (ring & (o == 2)).any() and ring[3, 4:7].any() and ring[1, 2] and not ring[0].any()


def test_colours_alone_do_not_find_the_pet(root):
    "A histogram of colours, learnt from the true masks, stays below 0.6 IoU: the task cannot be solved by a threshold."
    p = root/'pets/oxford-iiit-pet'; count, score = np.ones((2, 512)), np.zeros(2)
    load = lambda s: (np.array(Image.open(p/f'images/{s}.jpg')), np.array(Image.open(p/f'annotations/trimaps/{s}.png')))
    bins = lambda im: (im // 32).astype(int) @ [64, 8, 1]
    names = {s: [l.split()[0] for l in (p/f'annotations/{s}.txt').read_text().splitlines()] for s in ('trainval', 'test')}
    for im, t in map(load, names['trainval']):
        for k in (1, 2): count[k - 1] += np.bincount(bins(im)[t == k], minlength=512)
    for im, t in map(load, names['test']):
        pred, v = (count[0] > .5 * count[1])[bins(im)], t != 3
        score += (pred & (t == 1)).sum(), ((pred | (t == 1)) & v).sum()
    assert .15 < score[0] / score[1] < .6


def test_sample_is_reused_and_never_overwrites(tmp_path, monkeypatch):
    root = sample(tmp_path/'s', profile='smoke')
    assert {p.name for p in root.iterdir()} == {'pets', 'voc', 'background', 'sample.json'} and (root/'voc/VOC2012').is_dir()
    before = digests(root)
    monkeypatch.setattr('wsss_nb.data.sample._render_all', lambda *a, **k: pytest.fail('rendered again'))
    assert sample(tmp_path/'s', profile='smoke') == root and digests(root) == before
    with pytest.raises(InputError, match='something other'): sample(tmp_path/'s', profile='smoke', seed=1)
    (tmp_path/'mine').mkdir(); (tmp_path/'mine/thesis.txt').write_text('all of it')
    with pytest.raises(InputError, match='thesis|something other'): sample(tmp_path/'mine', profile='smoke')
    with pytest.raises(ValueError, match='no profile'): sample(profile='huge')


def test_a_broken_render_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(*a, **k): raise RuntimeError('power cut')
    monkeypatch.setattr('wsss_nb.data.sample.render_voc', broken)
    with pytest.raises(RuntimeError): sample(tmp_path/'s', profile='smoke')
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_want_the_same_sample(tmp_path, monkeypatch):
    import wsss_nb.data.sample as module
    real = module._render_all
    def both(tmp, **kwargs):
        real(tmp, **kwargs)
        monkeypatch.setattr(module, '_render_all', real); sample(tmp_path/'s', profile='smoke')     # another process finishes while we render
    monkeypatch.setattr(module, '_render_all', both)
    root = sample(tmp_path/'s', profile='smoke')
    assert (root/'sample.json').is_file() and [p.name for p in tmp_path.iterdir()] == ['s']


def test_default_place_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv('WSSS_DATA', str(tmp_path)); monkeypatch.setenv('WSSS_PROFILE', 'smoke')
    root = sample()
    assert root.parent == tmp_path and root.name.startswith('sample-') and len(list((root/'pets/images').iterdir())) == 18
