"DensePose: points and parts against the published way to draw them, the flip, data sets, annotations that lie."
import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from drawn import packed
from wsss_nb.data.densepose import MIRRORED, PART_OF, PARTS, densepose, flip_parts, part_mask, part_points, read_densepose
from wsss_nb.data.items import UNLABELLED, VOID, InputError

tidy = settings(deadline=None, max_examples=25)
W, H = 90, 70


def annotation(id, image, box, rng, n=30):
    "A person with parts in bands of random height, some hidden, and random points."
    edges = np.sort(rng.integers(0, 257, 15))
    masks = []
    for a, b in zip(edges, edges[1:]):
        m = np.zeros((256, 256), np.uint8)
        m[a:b, 40:220] = 1
        masks.append(packed(m) if m.any() else [])
    return dict(id=id, image_id=image, category_id=1, iscrowd=0, bbox=[float(v) for v in box], area=1., segmentation=[], dp_masks=masks,
                dp_I=rng.integers(1, 25, n).astype(float).tolist(), dp_x=rng.uniform(0, 256, n).tolist(), dp_y=rng.uniform(0, 256, n).tolist(), dp_U=[.5] * n, dp_V=[.5] * n)


def plain(id, image, box, **more): return dict(id=id, image_id=image, category_id=1, iscrowd=0, bbox=box, area=1., segmentation=[]) | more


def write(root, annotations, n_images=1, split='train', folder='train2014', size=(W, H)):
    (root/'annotations').mkdir(parents=True, exist_ok=True)
    (root/folder).mkdir(exist_ok=True)
    images = [dict(id=k, file_name=f'{split}{k}.jpg', width=W, height=H) for k in range(1, n_images + 1)]
    for i in images: Image.new('RGB', size).save(root/folder/i['file_name'])
    p = root/f'annotations/densepose_coco_2014_{split}.json'
    p.write_text(json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name='person')])))
    return p


def published_mask(anns, h, w):
    "As the authors' notebook draws it (boxes within the image)."
    out = np.zeros((h, w), np.uint8)
    for a in anns:
        square = np.zeros((256, 256))
        for i in range(1, 15):
            if a['dp_masks'][i - 1]: square[rle.decode(a['dp_masks'][i - 1]) > 0] = i
        x, y, bw, bh = np.round(a['bbox']).astype(int)
        small = cv2.resize(square, (int(bw), int(bh)), interpolation=cv2.INTER_NEAREST_EXACT)
        out[y:y + bh, x:x + bw] = np.where(small > 0, small, out[y:y + bh, x:x + bw])
    return out


@tidy
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_as_published(tmp_path_factory, seed, n):
    rng, root = np.random.default_rng(seed), tmp_path_factory.mktemp('dp')
    boxes = [(int(rng.integers(0, 40)), int(rng.integers(0, 30)), int(rng.integers(5, 50)), int(rng.integers(5, 40))) for _ in range(n)]
    p = write(root, [annotation(k, 1, b, rng) for k, b in enumerate(boxes, 1)])
    found = read_densepose(p)['train1']
    anns = COCO(p).loadAnns(list(range(1, n + 1)))
    assert np.array_equal(part_mask(found), published_mask(anns, H, W))
    expected = np.full((H, W), UNLABELLED)
    for a in anns:
        for i, x, y in zip(a['dp_I'], a['dp_x'], a['dp_y']):
            bx, by, bw, bh = a['bbox']
            expected[min(int(by + y * bh / 256), H - 1), min(int(bx + x * bw / 256), W - 1)] = PART_OF[int(i)]
    assert np.array_equal(part_points(found), expected)


def test_the_flip():
    assert MIRRORED[:15].tolist() == [0, 1, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 14] and np.array_equal(MIRRORED[15:], np.arange(15, 256))
    m = np.random.default_rng(0).integers(0, 256, (9, 12), np.uint8)
    flipped = flip_parts(m)
    assert np.array_equal(flip_parts(flipped), m) and flipped.dtype == np.uint8
    for (y, x), v in np.ndenumerate(m): assert flipped[y, 11 - x] == MIRRORED[v]
    for k, name in enumerate(PARTS, 1):
        side = {'left': 'right', 'right': 'left'}.get(name.split()[0])
        assert PARTS[MIRRORED[k] - 1] == (name if side is None else name.replace(name.split()[0], side, 1))


def test_a_body_at_the_edge_is_cut_not_squeezed(tmp_path):
    a = annotation(1, 1, (0, 0, 10, 10), np.random.default_rng(0), 1)
    whole = np.zeros((256, 256), np.uint8)
    whole[:, 128:] = 1
    a |= dict(bbox=[60., 10., 60., 40.], dp_masks=[packed(1 - whole), packed(whole)] + [[]] * 12)      # reaches 30 pixels beyond the right edge
    m = part_mask(read_densepose(write(tmp_path, [a]))['train1'])
    assert (m[10:50, 60:] == 1).all() and (m > 0).sum() == 40 * 30
    a['bbox'] = [-30., -5., 60., 40.]
    m = part_mask(read_densepose(write(tmp_path, [a]))['train1'])
    assert (m[:35, :30] == 2).all() and (m > 0).sum() == 35 * 30


def test_persons_without_parts(tmp_path):
    rng = np.random.default_rng(0)
    outline = np.zeros((H, W), np.uint8)
    outline[50:60, 70:80] = 1
    p = write(tmp_path, [annotation(1, 1, (5, 5, 30, 40), rng), plain(2, 1, [60, 0, 20, 20]), plain(3, 1, [70, 50, 10, 10], iscrowd=1, segmentation=packed(outline)),
                         plain(4, 2, [0, 0, 9, 9])], n_images=3)
    found = read_densepose(p)
    assert list(found) == ['train1'] and len(found['train1'].rest.objects) == 2
    m = part_mask(found['train1'])
    assert (m[:20, 60:80] == VOID).all() and (m[50:60, 70:80] == VOID).all() and (m == VOID).sum() == 500
    points, known = part_points(found['train1']), part_points(found['train1'], background=True)
    assert 0 not in points and (known[points < UNLABELLED] == points[points < UNLABELLED]).all()
    inside = np.zeros((H, W), bool)
    for x, y, w, h in ((5, 5, 30, 40), (60, 0, 20, 20), (70, 50, 10, 10)): inside[y:y + h, x:x + w] = True
    assert np.array_equal(known == 0, ~inside & (points == UNLABELLED))
    assert (part_points(found['train1'], radius=2) < UNLABELLED).sum() > 3 * (points < UNLABELLED).sum()


SPOILT = {
    'patch 25': (lambda a: a['dp_I'].__setitem__(2, 25), r'dp_I holds 25.0, patches are 1 to 24'),
    'half a patch': (lambda a: a['dp_I'].__setitem__(2, 1.5), 'dp_I holds 1.5'),
    'fewer x': (lambda a: a['dp_x'].pop(), 'three lists of as many numbers'),
    'no y': (lambda a: a.pop('dp_y'), 'three lists of as many numbers'),
    'x is not finite': (lambda a: a['dp_x'].__setitem__(0, float('nan')), 'three lists of as many numbers'),
    'outside the square': (lambda a: a['dp_y'].__setitem__(0, 300), 'outside the square'),
    'thirteen parts': (lambda a: a['dp_masks'].pop(), 'not a list of 14'),
    'polygons': (lambda a: a['dp_masks'].__setitem__(0, [[1, 2, 3, 4, 5, 6]]), 'not a list of 14'),
    'another square': (lambda a: a['dp_masks'].__setitem__(3, packed(np.ones((64, 64), np.uint8))), r'the size \[64, 64\], the image has \[256, 256\]'),
    'broken code': (lambda a: a['dp_masks'].__setitem__(3, dict(size=[256, 256], counts='zz~')), 'run lengths'),
}


@pytest.mark.parametrize('case', SPOILT)
def test_annotations_that_lie(case, tmp_path):
    change, message = SPOILT[case]
    rng = np.random.default_rng(0)
    a, b = annotation(7, 1, (5, 5, 30, 40), rng), annotation(8, 2, (5, 5, 30, 40), rng)
    change(a)
    p = write(tmp_path, [a, b], 2)
    with pytest.raises(InputError, match=message) as e: read_densepose(p)
    assert 'densepose_coco_2014_train.json, annotation 7' in str(e.value)
    with pytest.raises(InputError, match='1 problem'): densepose(tmp_path, tmp_path/'out', workers=1)
    data = densepose(tmp_path, tmp_path/'out', skip_bad=True, workers=1)
    assert [o.id for o in data.items] == ['train2'] and list(data.report['skipped']) == ['train1']


def test_a_data_set(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path, [annotation(k, k, (5, 5, 30, 40), rng) for k in (1, 2)], 2)
    write(tmp_path, [annotation(1, 1, (5, 5, 30, 40), rng, 3)], 1, 'minival', 'val2014')
    data = densepose(tmp_path, tmp_path/'out', radius=1, workers=1)
    assert data.splits == {'train': ['train1', 'train2'], 'minival': ['minival1']} or data.splits == {'minival': ['minival1'], 'train': ['train1', 'train2']}
    assert data.classes == PARTS and len(PARTS) == 14
    item = data.view('points', 'minival')[0]
    found = read_densepose(tmp_path/'annotations/densepose_coco_2014_minival.json')['minival1']
    assert item.mask is None and item.tags == tuple(np.unique(found.poses[0].points[:, 2]))
    assert np.array_equal(np.array(Image.open(item.points)), part_points(found, 1))
    masks = data.view('masks', 'minival')
    assert np.array_equal(masks.read_mask(masks[0]), part_mask(found))
    before = item.points.stat().st_mtime_ns
    (tmp_path/'out/points/train1.png').unlink()
    again = densepose(tmp_path, tmp_path/'out', radius=1, workers=1)
    assert again['minival1'].points.stat().st_mtime_ns == before and again['train1'].points.is_file()


def test_folders_that_are_not_whole(tmp_path):
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match='no such folder'): densepose(tmp_path/'x', tmp_path/'out')
    with pytest.raises(InputError, match='densepose_coco_'): densepose(tmp_path, tmp_path/'out')
    write(tmp_path, [annotation(k, k, (5, 5, 30, 40), rng) for k in (1, 2)], 2)
    (tmp_path/'train2014/train1.jpg').unlink()
    with pytest.raises(InputError, match='a listed image is missing'): densepose(tmp_path, tmp_path/'out', workers=1)
    Image.new('RGB', (W, H + 1)).save(tmp_path/'train2014/train1.jpg')
    with pytest.raises(InputError, match=f'the image is {W}×{H + 1}, the DensePose file says {W}×{H}'): densepose(tmp_path, tmp_path/'out', workers=1)
    assert [o.id for o in densepose(tmp_path, tmp_path/'out', skip_bad=True, workers=1).items] == ['train2']
    (tmp_path/'train2014').rename(tmp_path/'elsewhere')
    with pytest.raises(InputError, match='is about its images'): densepose(tmp_path, tmp_path/'out')
