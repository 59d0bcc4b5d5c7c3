"Label maps from tags and boxes against plain formulations; stores that are resumed; maps and boxes that do not fit."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsss_nb.data.items import UNLABELLED, Box, Dataset, Item
from wsss_nb.data.store import LabelStore, Maps, MapStore
from wsss_nb.refine.weak_labels import box_labels, tag_labels, write_box_labels, write_tag_labels

tidy = settings(deadline=None, max_examples=30)
H, W, C = 11, 14, 4


def maps_of(rng, keys, size=(H, W)): return Maps(keys, rng.random((len(keys), *size), np.float32))


@tidy
@given(st.integers(0, 10**6), st.integers(0, 3), st.floats(0, 1), st.floats(1, 30))
def test_tags_pixel_by_pixel(seed, n, least, alpha):
    rng = np.random.default_rng(seed)
    m = maps_of(rng, np.sort(rng.choice(np.arange(1, C + 1), n, replace=False)))
    labels = tag_labels(m, range(C + 1), (H, W), alpha, least)
    for y, x in np.ndindex(H, W):
        scores = {0: (1 - max(m.values[:, y, x], default=0)) ** alpha} | dict(zip(m.keys, m.values[:, y, x]))
        best = max(scores, key=scores.get)
        if abs(scores[best] - least) > 1e-5 and sorted(scores.values())[-2:][0] < scores[best] - 1e-5 or len(scores) == 1:
            assert labels[y, x] == (best if scores[best] >= least else UNLABELLED)
    assert labels.dtype == np.uint8


def test_the_published_threshold_leaves_nothing_open():
    m = Maps([1], np.linspace(0, 1, 100001, dtype=np.float32)[None, None])
    assert not (tag_labels(m, (0, 1), (1, 100001), 6, .2219) == UNLABELLED).any()
    assert (tag_labels(m, (0, 1), (1, 100001), 6, .222) == UNLABELLED).any()


def test_tags_share_a_segment_and_size_is_the_images():
    m = Maps([5, 9, 12], np.stack([np.full((2, 3), v, np.float32) for v in (.9, .4, .8)]))
    labels = tag_labels(m, (0, *[1] * 10, 0, 0), (8, 9), least=.85)     # 12 stands for no segment
    assert labels.shape == (8, 9) and {*labels.flat} == {1}
    assert {*tag_labels(Maps([9], m.values[1:2]), (0, *[1] * 12), (8, 9), least=.85).flat} == {UNLABELLED}
    assert not tag_labels(Maps([], np.zeros((0, 2, 3))), (0, 1), (8, 9)).any()


def plain_boxes(m, boxes, least, from_least):
    "Each box on its own, the best claim of each pixel."
    best, labels = np.zeros((H, W)), np.zeros((H, W), int)
    for b in boxes: labels[b.ymin:b.ymax, b.xmin:b.xmax] = UNLABELLED
    for b in sorted(boxes, key=lambda b: b.label):
        a = m.values[list(m.keys).index(b.label), b.ymin:b.ymax, b.xmin:b.xmax].astype(float)
        if from_least: a = a - a.min()
        a = a / (a.max() + 1e-12)
        window = slice(b.ymin, b.ymax), slice(b.xmin, b.xmax)
        wins = (a >= least) & (a > best[window])
        labels[window][wins] = b.label
        best[window] = np.maximum(best[window], a)
    return labels


@tidy
@given(st.integers(0, 10**6), st.integers(0, 5), st.floats(.05, 1), st.booleans())
def test_boxes_one_by_one(seed, n, least, from_least):
    rng = np.random.default_rng(seed)
    m, boxes = maps_of(rng, range(1, C + 1)), []
    for _ in range(n):
        (x0, x1), (y0, y1) = (sorted(rng.choice(k + 1, 2, replace=False).tolist()) for k in (W, H))
        boxes.append(Box(int(rng.integers(1, C + 1)), x0, y0, x1, y1))
    labels = box_labels(m, boxes, (H, W), C, least, from_least)
    inside = np.zeros((H, W), bool)
    for b in boxes: inside[b.ymin:b.ymax, b.xmin:b.xmax] = True
    assert not labels[~inside].any() and (labels[inside] != 0).all()
    # the greatest value of a box is 1 in float32 and, for two boxes, may be reached twice: such ties may go either way
    assert (labels != plain_boxes(m, boxes, least, from_least)).mean() <= .02


def test_boxes_that_do_not_fit():
    m = maps_of(np.random.default_rng(0), [1, 2])
    for boxes, message in (([Box(3, 0, 0, 5, 5)], 'class 3 has a box and no map'), ([Box(5, 0, 0, 5, 5)], 'has class 5; classes are 1 to 4'),
                           ([Box(1, 50, 0, 60, 5)], 'no pixel'), ([Box(1, 5, 5, 2, 2)], 'no pixel')):
        with pytest.raises(ValueError, match=message): box_labels(m, boxes, (H, W), C)
    for least in (0, -1, 1.5):
        with pytest.raises(ValueError, match='above 0'): box_labels(m, [], (H, W), C, least)
    with pytest.raises(ValueError, match='between 0 and 1'): tag_labels(m, range(5), (H, W), least=1.5)
    broken = Maps([1], np.full((1, 2, 2), np.nan))
    with pytest.raises(ValueError, match='NaN'): tag_labels(broken, range(5), (H, W))
    with pytest.raises(ValueError, match='NaN'): box_labels(broken, [], (H, W), C)
    flat = Maps([1], np.zeros((1, H, W)))
    assert {*box_labels(flat, [Box(1, 0, 0, W, H)], (H, W), C).flat} == {UNLABELLED}      # nothing was seen: open, not background


@pytest.fixture
def folder(tmp_path):
    "Three images of a class that stands for segment 2, one of them without boxes; maps of all."
    rng, store = np.random.default_rng(0), MapStore(tmp_path/'maps')
    for i in 'abc':
        Image.new('RGB', (W, H)).save(tmp_path/f'{i}.png')
        store.save(i, maps_of(rng, [3], (4, 5)))
    items = [Item(i, tmp_path/f'{i}.png', (3,), b) for i, b in zip('abc', [(Box(3, 2, 1, 9, 8),), (), None])]
    return Dataset('own', 'wxyz', items, {'train': [*'abc']}, segment_classes=('p', 'q'), segment_of=(0, 1, 1, 2, 0)), store


def test_stores(folder, tmp_path):
    data, maps = folder
    boxes, tags = LabelStore(tmp_path/'boxes'), LabelStore(tmp_path/'tags')
    bad = write_box_labels(data.view('boxes', 'train'), maps, boxes, 1)
    assert [(i, 'boxes are unknown' in e) for i, e in bad] == [('c', True)]
    a = boxes.load('a')
    assert {*a.flat} == {0, 2, UNLABELLED} and (a[1:8, 2:9] != 0).all() and not np.delete(a, range(1, 8), 0).any() and not boxes.load('b').any()
    assert np.array_equal(a == 2, box_labels(maps.load('a'), data['a'].boxes, (H, W), C) == 3)
    assert write_tag_labels(data.view('tags', 'train'), maps, tags, 1, least=.5) == []
    assert np.array_equal(tags.load('c'), tag_labels(maps.load('c'), data.segment_of, (H, W), least=.5)) and {*tags.load('c').flat} <= {0, 2, UNLABELLED}


def test_what_is_there_is_kept_and_what_fails_is_named(folder, tmp_path):
    data, maps = folder
    store, view = LabelStore(tmp_path/'l'), data.view('tags', 'train')
    store.save('a', np.full((H, W), 7))
    maps.path('b').write_bytes(b'PK no')
    maps.path('c').unlink()
    bad = dict(write_tag_labels(view, maps, store, 1))
    assert store.load('a').min() == 7 and 'not a readable map file' in bad['b'] and 'no maps of this image' in bad['c']
    maps.save('b', Maps([3], np.zeros((1, 2, 2))))
    assert list(dict(write_tag_labels(view, maps, store, 1))) == ['c'] and not store.load('b').any()


def test_wrong_questions_are_refused_before_any_work(folder, tmp_path):
    data, maps = folder
    store = LabelStore(tmp_path/'l')
    with pytest.raises(ValueError, match='need a view for boxes, not for tags'): write_box_labels(data.view('tags', 'train'), maps, store, 1)
    with pytest.raises(ValueError, match='least is 2'): write_tag_labels(data.view('tags', 'train'), maps, store, 1, least=2)
    with pytest.raises(ValueError, match='least is 0'): write_box_labels(data.view('boxes', 'train'), maps, store, 1, least=0)
    assert len(store) == 0
