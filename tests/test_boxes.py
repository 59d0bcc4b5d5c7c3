"Boxes against the originals' arrays; transforms that keep image, boxes and mask together; annotations that lie."
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.torch_core import to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsss_nb.data.boxes import (BoxAugment, BoxBatch, background_mask, box_array, box_batch, boxes_dls, clip_boxes, joint_crop,
                                joint_flip, joint_scale, original_boxes, usable_boxes)
from wsss_nb.data.folder import folder
from wsss_nb.data.items import Box, Dataset, InputError, Item
from wsss_nb.data.sample import sample
from wsss_nb.data.voc import VOC_CLASSES, voc
from wsss_nb.localize.training import seed_everything

GOLDEN = Path(__file__).parent/'golden'
tidy = settings(deadline=None, max_examples=20)


def golden(name):
    with np.load(GOLDEN/f'bana_{name}.npz', allow_pickle=False) as z: return {k: z[k] for k in z}


@pytest.fixture(scope='module')
def view(): return voc(sample(profile='smoke')/'voc/VOC2012').view('boxes', 'train')


# The originals' arrays

@pytest.fixture(scope='module')
def recorded(): return golden('transforms')


@pytest.mark.parametrize('k', range(3))
def test_clipping_as_recorded(recorded, k):
    assert np.array_equal(clip_boxes(recorded['boxes'], recorded[f'clip_arg{k}'], original=True), recorded[f'clip{k}'])
    x0, y0, x1, y1 = recorded[f'clip_arg{k}']
    ours = clip_boxes(recorded['boxes'], (x0, y0, x1, y1))
    assert (ours[:, 2] <= x1 - x0).all() and (ours[:, 3] <= y1 - y0).all(), 'nothing lies outside the crop'
    assert np.array_equal(ours[:, :2], recorded[f'clip{k}'][:, :2]) and np.array_equal(ours, np.minimum(recorded[f'clip{k}'], [x1 - x0, y1 - y0] * 2 + [99]))


def test_flip_as_recorded(recorded):
    for ours, theirs in zip(joint_flip(recorded['img'], recorded['boxes'], recorded['mask']), ('img', 'boxes', 'mask')):
        assert np.array_equal(ours, recorded[f'flip_{theirs}'])


@pytest.mark.parametrize('k', range(3))
def test_crop_as_recorded(recorded, k):
    random.seed(21 + k)
    ours = joint_crop(recorded['img'], recorded['boxes'], recorded['mask'].astype(np.uint8), recorded[f'crop{k}_size'], (random.random(), random.random()), original=True)
    for a, b in zip(ours, ('img', 'boxes', 'mask')): assert np.array_equal(a, recorded[f'crop{k}_{b}']), b


def test_crop_of_labels_as_recorded(recorded):
    random.seed(41)
    at = random.random(), random.random()
    im, _, mask = joint_crop(recorded['img'], recorded['boxes'], recorded['mask'].astype(np.uint8), (97, 97), at, mask_fill=255, original=True)
    assert np.array_equal(im, recorded['mcrop_img'])
    assert np.array_equal(mask, recorded['mcrop_mask'])


def test_scale_as_recorded(recorded):
    random.seed(31)
    im, boxes, mask = joint_scale(recorded['img'], recorded['boxes'], recorded['mask'], random.uniform(.5, 1.5), original=True)
    assert np.allclose(im, recorded['scale_img'], atol=1e-4)
    assert np.allclose(boxes, recorded['scale_boxes'], rtol=1e-6) and np.array_equal(mask, recorded['scale_mask'])


@pytest.fixture
def xml(tmp_path):
    (tmp_path/'a.xml').write_text(str(golden('voc_boxes')['xml']))
    return tmp_path/'a.xml'


def test_boxes_and_background_as_recorded(xml):
    g = golden('voc_boxes')
    assert np.allclose(original_boxes(xml), g['bboxes'])
    assert np.array_equal(background_mask(original_boxes(xml, parts=True), (60, 80)), g['bg_mask'].astype(bool))
    Image.new('RGB', (80, 60)).save(xml.with_name('a.png'))
    ours = usable_boxes(folder(xml.parent, boxes=xml.parent, classes=VOC_CLASSES).view('boxes', 'all'), 20)['a']
    assert np.allclose(ours, g['bboxes'] - [1, 1, 0, 0, 0]), 'VOC counts from 1'


# Transforms

floats = st.floats(0, 60, width=32)
some_boxes = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 20)), max_size=6)


def array(rows): return np.array([(x, y, x + w, y + h, c) for x, y, w, h, c in rows], np.float32).reshape(-1, 5)


@tidy
@given(st.lists(st.tuples(floats, floats, floats, floats), max_size=5))
def test_background_is_where_no_box_touches(rows):
    boxes = np.array(rows, np.float32).reshape(-1, 4)
    mask = background_mask(boxes, (20, 30))
    for y in range(0, 20, 3):
        for x in range(0, 30, 3):
            overlap = [min(x1, x + 1) - max(x0, x) for x0, y0, x1, y1 in boxes if x0 < x1 and y0 < y1 and min(y1, y + 1) - max(y0, y) > 2e-3 and x1 - x0 > 3e-3 and y1 - y0 > 3e-3]
            if any(o > 2e-3 for o in overlap): assert not mask[y, x]
            touching = [1 for x0, y0, x1, y1 in boxes if x0 < x + 1 and x1 > x and y0 < y + 1 and y1 > y]
            if not touching: assert mask[y, x]


@tidy
@given(some_boxes, st.integers(8, 70), st.integers(8, 70), st.floats(0, .999), st.floats(0, .999), st.booleans())
def test_boxes_stay_on_what_they_bound(rows, h, w, u, v, flip):
    boxes = np.minimum(array(rows), np.float32([50, 40, 50, 40, 20]))
    white = np.repeat(~background_mask(boxes, (40, 50))[..., None], 3, 2).astype(np.uint8)
    scene = joint_crop(white, boxes, white[..., 0], (h, w), (u, v), fill=(0, 0, 0))
    image, moved, mask = joint_flip(*scene) if flip else scene
    assert image.shape == (h, w, 3) and mask.shape == (h, w)
    assert np.array_equal(image[..., 0], mask)
    assert np.array_equal(mask == 0, background_mask(moved, (h, w)))


def test_every_position_of_a_crop_is_drawn():
    image = np.arange(10, dtype=np.uint8)[None, :, None].repeat(10, 0).repeat(3, 2)
    none = np.zeros((0, 5), np.float32)
    first = {joint_crop(image, none, None, (8, 8), (u, 0))[0][0, 0, 0] for u in (0, .34, .67, .999999)}
    theirs = {joint_crop(image, none, None, (8, 8), (u, 0), original=True)[0][0, 0, 0] for u in (0, .34, .67, .999999)}
    assert (first, theirs) == ({0, 1, 2}, {0, 1})


@tidy
@given(st.floats(.3, 2.))
def test_scaled_boxes_are_those_of_the_scaled_image(factor):
    boxes = np.float32([[0, 0, 37, 23, 1]])     # the whole image stays the whole image
    image, moved, mask = joint_scale(np.zeros((23, 37, 3), np.uint8), boxes, np.ones((23, 37), bool), factor)
    assert np.allclose(moved[0, :4], [0, 0, *image.shape[1::-1]]) and mask.dtype == bool and mask.shape == image.shape[:2]


def test_padding_is_not_background():
    torch.manual_seed(0)
    for _ in range(5):
        image, boxes, real = BoxAugment(scale=(.5, .6))(np.full((64, 64, 3), 90, np.uint8), array([(10, 10, 20, 20, 1)]), np.ones((64, 64), bool))
        assert real.sum() < 45**2 and len(boxes) == 1
        assert (image[~real] == (123, 117, 104)).all(), 'padding has its own colour, untouched by the others'


# Bad input

@pytest.fixture
def photo(tmp_path):
    Image.new('RGB', (50, 40)).save(tmp_path/'p.jpg')
    return Item('p', tmp_path/'p.jpg', (1,), boxes=(Box(1, 2, 3, 20, 30),))


BAD = {'reversed': Box(1, 20, 3, 2, 30), 'empty': Box(1, 20, 3, 20, 30), 'outside': Box(1, 60, 3, 70, 30), 'before': Box(1, -9, 3, 0, 30),
       'class': Box(21, 2, 3, 20, 30), 'class 0': Box(0, 2, 3, 20, 30), 'nan': Box(1, float('nan'), 3, 20, 30), 'endless': Box(1, 2, 3, float('inf'), 30)}


@pytest.mark.parametrize('bad', BAD)
def test_a_bad_box_is_named(photo, bad):
    spoilt = replace(photo, boxes=(*photo.boxes, BAD[bad]))
    with pytest.raises(InputError, match=r'p\.jpg: box 2 of 2 ') as e: usable_boxes([spoilt], 20)
    assert 'Correct' in str(e.value)
    with pytest.warns(UserWarning, match='1 boxes cannot be used.*box 2 of 2'): found = usable_boxes([spoilt], 20, skip_bad=True)
    assert np.array_equal(found['p'], [[2, 3, 20, 30, 1]])


def test_all_bad_boxes_are_told_at_once(photo):
    with pytest.raises(InputError, match=f'{len(BAD)} problems'): usable_boxes([replace(photo, boxes=tuple(BAD.values()))], 20)


def test_a_box_over_the_edge_is_cut(photo):
    found = usable_boxes([replace(photo, boxes=(Box(1, -5, -5, 500, 500),))], 20)['p']
    assert np.array_equal(found, [[0, 0, 50, 40, 1]])


def test_unknown_boxes_are_not_no_boxes(photo):
    with pytest.raises(InputError, match='nobody has drawn'): usable_boxes([replace(photo, boxes=None)], 20)
    assert usable_boxes([replace(photo, boxes=None, tags=())], 20)['p'].shape == (0, 5)
    assert usable_boxes([replace(photo, boxes=())], 20)['p'].shape == (0, 5)


XML = '<annotation><size><width>50</width><height>40</height></size>{}</annotation>'
OBJECT = '<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>'
BOMB = '<!DOCTYPE a [<!ENTITY e0 "lol">' + ''.join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10)) + ']><annotation>&e9;</annotation>'
FILES = {'cut': XML.format(OBJECT.format('dog', 1, 1, 9, 9))[:-20], 'bomb': BOMB, 'reversed': XML.format(OBJECT.format('dog', 9, 1, 1, 9)),
         'text': XML.format(OBJECT.format('dog', 'one', 1, 9, 9)), 'class': XML.format(OBJECT.format('drake', 1, 1, 9, 9)), 'empty': '',
         'external': '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]><annotation><object><name>&e;</name></object></annotation>'}


@pytest.mark.parametrize('kind', FILES)
def test_a_bad_annotation_is_named(photo, kind):
    (photo.image.parent/'p.xml').write_text(FILES[kind])
    with pytest.raises(InputError, match=r'p\.xml|drake'): folder(photo.image.parent, boxes=photo.image.parent, classes=('dog', 'cat'))


@pytest.mark.parametrize('sides', [('nan', 1, 9, 9), (70, 1, 90, 9)])
def test_numbers_that_the_reader_lets_through_are_found(photo, sides):
    (photo.image.parent/'p.xml').write_text(XML.format(OBJECT.format('dog', *sides)))
    with pytest.raises(InputError, match='p.jpg: box 1 of 1|p.xml'):
        boxes_dls(folder(photo.image.parent, boxes=photo.image.parent, classes=('dog', 'cat')).view('boxes', 'all'), 32, 1)


# Batches

def test_batches(view):
    dls = boxes_dls(view, 64, 4, augment=False)
    x, y = dls.one_batch()
    assert x.shape == (4, 3, 64, 64) and x.dtype == torch.float32
    assert isinstance(y, BoxBatch) and y.background.shape == (4, 64, 64) and y.background.dtype == torch.bool
    assert y.boxes.dtype == torch.float32 and y.classes.dtype == y.image.dtype == torch.int64
    assert len(y.boxes) == len(y.classes) == len(y.image) and y.image.max() < 4
    for n in range(4): assert np.array_equal(y.background[n].cpu(), background_mask(y.boxes[y.image == n].cpu().numpy(), (64, 64)))


def test_a_box_batch_moves_as_one(view):
    y = boxes_dls(view, 32, 2).one_batch()[1]
    moved = to_device(y, torch.device('meta'))
    assert isinstance(moved, BoxBatch) and {t.device.type for t in moved} == {'meta'}
    assert moved.boxes.shape == y.boxes.shape


def test_the_same_seed_gives_the_same_batches(view):
    dls, runs = boxes_dls(view, 48, 4), []
    for seed in (0, 0, 1):
        seed_everything(seed, dls)
        runs.append([(x, *y) for x, y in dls.train])
    assert all(torch.equal(a, b) for s, t in zip(*runs[:2]) for a, b in zip(s, t))
    assert not all(torch.equal(s[0], t[0]) for s, t in zip(*runs[1:]))


def test_squashed_as_the_photo_is(photo):
    data = Dataset('one', ('thing',), [photo], {'all': ['p']})
    _, y = boxes_dls(data.view('boxes', 'all'), 100, 1, augment=False).one_batch()
    assert torch.allclose(y.boxes.cpu(), torch.tensor([[4, 7.5, 40, 75]]))
    assert not y.background[0, 7:75, 4:40].any() and y.background.sum() == 100 * 100 - 68 * 36


def test_a_batch_without_boxes(photo):
    data = Dataset('one', ('thing',), [replace(photo, boxes=())], {'all': ['p']})
    _, y = boxes_dls(data.view('boxes', 'all'), 32, 1).one_batch()
    assert [len(t) for t in y] == [1, 0, 0, 0] and y.boxes.shape == (0, 4)


def test_thousands_of_boxes(photo):
    rng = np.random.default_rng(0)
    boxes = tuple(Box(1, float(x), float(y), float(x) + 3, float(y) + 3) for x, y in rng.uniform(0, 36, (4000, 2)))
    data = Dataset('one', ('thing',), [replace(photo, boxes=boxes)], {'all': ['p']})
    _, y = boxes_dls(data.view('boxes', 'all'), 64, 1).one_batch()
    assert 1000 < len(y.boxes) <= 4000 and torch.isfinite(y.boxes).all()


def test_other_views_carry_no_boxes():
    ds = voc(sample(profile='smoke')/'voc/VOC2012')
    with pytest.raises(InputError, match='nobody has drawn'): boxes_dls(ds.view('tags', 'train'), 32, 2)


def test_a_plain_list_of_boxes():
    assert box_array([]).shape == (0, 5) and np.array_equal(box_array([Box(3, 1, 2, 4, 5)]), [[1, 2, 4, 5, 3]])


def test_normalised_as_elsewhere():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    x, _ = box_batch([(image, np.zeros((0, 5), np.float32), np.ones((8, 8), bool))], ([.4, .5, .6], [.2, .3, .4]))
    assert np.allclose(x[0].permute(1, 2, 0), (image / 255 - [.4, .5, .6]) / [.2, .3, .4], atol=1e-5)
