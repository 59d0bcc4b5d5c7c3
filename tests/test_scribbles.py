"Scribbles and points: files as published, widening and shortening against plain formulations, a simulated hand, whole data sets."
import json
import os
from copy import copy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import distance_transform_edt
from skimage.measure import label as components
from skimage.morphology import dilation, disk

from wsss_nb.data.items import UNLABELLED, VOID, Dataset, InputError, Item, read_mask, write_mask
from wsss_nb.data.pets import pets
from wsss_nb.data.sample import sample, stream
from wsss_nb.data.scribbles import dilate, hand_stroke, pieces, shorten, shrink_labels, simulated_strokes, stroke_positions, with_labels, write_labels
from wsss_nb.data.voc import draw_scribbles, read_strokes, voc

tidy = settings(deadline=None, max_examples=25)
H, W = 20, 30


@pytest.fixture(scope='module')
def data(): return voc(sample(profile='smoke')/'voc/VOC2012')


def label_maps(rng, n=5, classes=4, size=(H, W)):
    "A few labelled spots and lines, some void."
    m = np.full(size, UNLABELLED, np.uint8)
    for _ in range(n):
        y, x, k = rng.integers(size[0]), rng.integers(size[1]), rng.integers(1, 12)
        m[y, x:x + k] = rng.choice([*range(classes), VOID])
    return m


# The published files

def xml(strokes, size=(H, W)):
    body = ''.join(f'<polygon><tag>{n}</tag>' + ''.join(f'<point><X>{x}</X><Y>{y}</Y></point>' for x, y in p) + '</polygon>' for n, p in strokes)
    return f'<annotation><filename>a.jpg</filename><size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>{body}</annotation>'


def test_the_three_formats_agree(tmp_path):
    strokes = [('person', 15, [(2, 3), (12, 3), (25, 17)]), ('background', 0, [(1, 18), (9, 15)]), ('tvmonitor', 20, [(28, 1)])]
    (tmp_path/'a.xml').write_text(xml([(n, p) for n, _, p in strokes]))
    (tmp_path/'a_scribble.txt').write_text('\n'.join(','.join(map(str, [k, *np.ravel(p)])) for _, k, p in strokes) + ',\n')
    listed = read_strokes(tmp_path/'a_scribble.txt', (H, W), 20)
    assert np.array_equal(read_strokes(tmp_path/'a.xml', (H, W), 20), listed)
    assert sorted(np.unique(listed)) == [0, 15, 20, UNLABELLED]
    Image.fromarray(np.where(listed == UNLABELLED, 255, listed).astype(np.uint8)).save(tmp_path/'a.png')     # as others write it
    assert np.array_equal(read_strokes(tmp_path/'a.png', (H, W), 20), listed)
    column = listed[:, 7]       # a level stroke is three pixels wide
    assert (column == 15).sum() == 3 and column[3] == 15 and (listed == 20).sum() == 1
    assert (draw_scribbles(tmp_path/'a.xml', (H, W), width=5)[:, 7] == 15).sum() == 5


BAD = {
    'unknown class': ('a.xml', xml([('persom', [(2, 2), (5, 5)])]), "unknown class 'persom'. Did you mean 'person'"),
    'no class': ('a.xml', xml([('person', [(2, 2)])]).replace('<tag>person</tag>', ''), 'not a readable scribble annotation'),
    'another size': ('a.xml', xml([('person', [(2, 2)])], (H, W + 1)), f'for an image of {W + 1}×{H}, this is {W}×{H}'),
    'cut short': ('a.xml', xml([('person', [(2, 2)])])[:-9], 'not a readable scribble annotation'),
    'no points': ('a.xml', xml([('person', [])]), 'stroke 1 has no point in the image'),
    'infinite': ('a.xml', xml([('person', [('inf', 2)])]), 'not a readable scribble annotation'),
    'never inside': ('a.txt', f'1,2,2,5,5\n1,{W},3,{W + 5},3', 'stroke 2 has no point in the image'),
    'far outside': ('a.txt', '1,2,2,5,5000', 'or one far outside'),
    'infinite in a list': ('a.txt', '1,2,2,inf,5', 'line 1 is not a stroke'),
    'half a point': ('a.txt', '1,2,2,5', 'line 1 is not a stroke'),
    'unlabelled as class': ('a.txt', '254,2,2,5,5', 'line 1 is not a stroke'),
    'no such number': ('a.txt', '1,2,2,5,5\n21,9,9,12,12', r'numbers \[21\] stand for no class'),
    'no text': ('a.txt', b'\xff\xfe\x00\x80', 'not a readable list'),
    'no such number in PNG': ('a.png', np.full((H, W), 77, np.uint8), r'numbers \[77\] stand for no class'),
    'PNG of another size': ('a.png', np.full((H, W - 2), 254, np.uint8), f'the mask is {W - 2}×{H}, its image {W}×{H}'),
    'a colour picture': ('a.png', np.zeros((H, W, 3), np.uint8), 'one channel'),
}


@pytest.mark.parametrize('case', BAD)
def test_files_that_lie(case, tmp_path):
    name, content, message = BAD[case]
    if isinstance(content, np.ndarray): Image.fromarray(content).save(tmp_path/name)
    else: (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as e: read_strokes(tmp_path/name, (H, W), 20)
    assert name in str(e.value)


def test_no_label_is_a_map_without_labels_and_a_missing_file_is_none(tmp_path):
    (tmp_path/'a.txt').write_text('\n\n')
    assert (read_strokes(tmp_path/'a.txt', (H, W), 20) == UNLABELLED).all()
    with pytest.raises(InputError, match='No such file'): read_strokes(tmp_path/'b.txt', (H, W))
    with pytest.raises(ValueError, match='need the size'): read_strokes(tmp_path/'a.txt')


def test_voc_finds_all_three(data, tmp_path):
    a, b, c, d = data.splits['train'][:4]
    for name in (f'{a}.xml', f'{b}_scribble.txt', f'{c}.png', f'{a}.txt', f'{c}.xml'): (tmp_path/name).touch()
    found = voc(data[a].image.parent.parent, scribbles=tmp_path)
    assert [found[i].scribbles and found[i].scribbles.name for i in (a, b, c, d)] == [f'{a}.txt', f'{b}_scribble.txt', f'{c}.png', None]


@pytest.mark.skipif('WSSS_SCRIBBLES' not in os.environ, reason='WSSS_SCRIBBLES names no folder with ScribbleSup lists and their PNG')
def test_real_scribbles():
    folder = Path(os.environ['WSSS_SCRIBBLES'])
    lists = sorted(folder.glob('*_scribble.txt'))
    for p in lists:
        m = read_strokes(p.with_name(p.name.replace('_scribble.txt', '.png')), n_classes=20)
        assert np.array_equal(read_strokes(p, m.shape, 20), m)
        assert .005 < (m < UNLABELLED).mean() < .1
        short = shorten(m, .3, stream(0, p.stem))
        assert .2 < (short < UNLABELLED).sum() / (m < UNLABELLED).sum() < .4
    assert lists


# Wider and shorter

@tidy
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 2, 3.5, 6]))
def test_dilation_is_that_of_a_disc(seed, radius):
    m = label_maps(np.random.default_rng(seed))
    out, known = dilate(m, radius), m < UNLABELLED
    assert np.array_equal(out[known], m[known]) and np.array_equal(out == VOID, m == VOID)
    reached = dilation(known, disk(int(radius)) if radius == int(radius) else disk(4) & (np.hypot(*np.mgrid[-4:5, -4:5]) <= radius))
    assert np.array_equal(out < UNLABELLED, reached & (m != VOID))
    away = np.stack([distance_transform_edt(m != k) if (m == k).any() else np.full(m.shape, np.inf) for k in range(4)])
    new = (out < UNLABELLED) & ~known
    assert np.array_equal(np.take_along_axis(away, np.where(new, out, 0)[None].astype(int), 0)[0][new], away.min(0)[new]), 'the nearest label'


@tidy
@given(st.integers(0, 10**6), st.lists(st.floats(0, 1), min_size=2, max_size=4))
def test_shorter_is_a_part_of_longer(seed, shares):
    m = label_maps(np.random.default_rng(seed))
    cut = [shorten(m, s, np.random.default_rng(seed)) for s in sorted(shares)]
    n = components(np.where(m == VOID, UNLABELLED, m).astype(int), background=UNLABELLED, connectivity=2)
    for c in cut:
        assert np.array_equal(c[c < UNLABELLED], m[c < UNLABELLED]) and np.array_equal(c == VOID, m == VOID)
        assert {*n[c < UNLABELLED]} == {*range(1, n.max() + 1)}, 'something of every stroke'
    for less, more in zip(cut, cut[1:]): assert not ((less < UNLABELLED) & (more == UNLABELLED)).any()
    assert np.array_equal(shorten(m, 1, np.random.default_rng(seed)), m)
    assert (shorten(m, 0, np.random.default_rng(seed)) < UNLABELLED).sum() == n.max()


def test_share_is_a_share_of_the_length():
    m = np.full((9, 210), UNLABELLED, np.uint8)
    m[3:6, 5:205] = 4
    for share in (.3, .5, .8):
        columns = np.flatnonzero((shorten(m, share, np.random.default_rng(3)) == 4).any(0))
        assert abs(len(columns) - 200 * share) <= 2 and np.diff(columns).max() == 1
    with pytest.raises(ValueError, match='part of a stroke'): shorten(m, 1.2, None)


def test_positions_along_a_bend():
    bent = np.zeros((30, 40), bool)
    bent[4, 3:33], bent[4:24, 32] = True, True
    t = stroke_positions(bent)
    way = [(4, x) for x in range(3, 33)] + [(y, 32) for y in range(5, 24)]
    along = np.array([t[p] for p in way])
    along = along if along[0] == 0 else 1 - along
    assert along[0] == 0 and along[-1] == 1 and (np.diff(along) > 0).all()
    one = np.zeros((3, 3), bool)
    one[1, 1] = True
    assert stroke_positions(one)[1, 1] == 0


# A simulated hand

@pytest.mark.parametrize('kind', ['scribbles', 'points'])
def test_a_hand_tells_the_truth_and_forgets_no_class(data, kind):
    for o in data.view('masks', 'train'):
        truth = read_mask(o.mask)
        m = simulated_strokes(truth, stream(0, o.id), kind)
        on, found = m < UNLABELLED, pieces(truth)
        assert np.array_equal(m[on], truth[on]) and VOID not in m and {*m[on]} == {*truth.flat} - {VOID}
        for c, window, region in found: assert on[window][region].any(), c
        strokes = components(m.astype(int), background=UNLABELLED, connectivity=2).max()
        assert strokes <= len(found)        # one connected stroke in each piece
        if kind == 'points': assert on.sum() == len(found)
        once = simulated_strokes(truth, stream(0, o.id), kind, per='class')
        assert {*once[once < UNLABELLED]} == {*m[on]}
        if kind == 'points': assert (once < UNLABELLED).sum() == len({*truth.flat} - {VOID})


@tidy
@given(st.integers(0, 10**6))
def test_pieces_are_the_components(seed):
    rng = np.random.default_rng(seed)
    m = np.kron(rng.choice([0, 1, 2, UNLABELLED, VOID], (4, 6)), np.ones((5, 5))).astype(np.uint8)
    if (m >= UNLABELLED).all(): return
    every = pieces(m, 0)
    painted = np.full(m.shape, VOID, np.uint8)
    for c, window, region in every: painted[window][region] = c
    assert np.array_equal(painted, np.where(m >= UNLABELLED, VOID, m))
    large = pieces(m, .2)
    assert {c for c, *_ in large} == {c for c, *_ in every}
    assert len(pieces(m, per='class')) == len({c for c, *_ in every})
    for c, _, region in large: assert region.sum() in (max(r.sum() for k, _, r in every if k == c), *[r.sum() for k, _, r in every if r.sum() >= .2 * m.size])


def test_a_stroke_keeps_to_the_middle():
    region = np.zeros((41, 121), bool)
    region[10:31, 5:115] = True
    for seed in range(5):
        path = hand_stroke(region, np.random.default_rng(seed))
        assert region[tuple(path.T)].all() and np.abs(np.diff(path, axis=0)).max() == 1
        assert np.ptp(path[:, 1]) > 40 and np.abs(path[:, 0] - 20).mean() < 6


def test_thin_and_tiny_regions():
    for region in (np.ones((1, 1), bool), np.ones((1, 9), bool), np.eye(2, dtype=bool)[:1], np.ones((2, 2), bool)):
        assert len(hand_stroke(region, np.random.default_rng(0))) >= 1
    assert (simulated_strokes(np.full((5, 5), VOID, np.uint8), stream(0, 'a')) == UNLABELLED).all()
    assert pieces(np.full((5, 5), UNLABELLED, np.uint8)) == []


# Whole data sets

def small(data, n=3):
    new = copy(data)
    new.splits = {'train': data.splits['train'][:n]}
    return new


def test_simulated_labels_say_so_and_stand_alone(data, tmp_path):
    new = write_labels(small(data), tmp_path/'s', 'scribbles', 'masks', workers=1)
    assert 'simulated scribbles' in new.name and new.simulated and json.loads((tmp_path/'s/labels.json').read_text())['simulated']
    item, = new.view('scribbles', 'train').keep(lambda o: o.id == new.splits['train'][0])
    assert (item.mask, item.boxes, item.points) == (None, None, None) and item.scribbles.parent == tmp_path/'s'
    truth, m = data.read_truth(data[item.id]), read_strokes(item.scribbles, n_classes=20)
    assert 0 < (m < UNLABELLED).mean() < .2 and (m == truth)[(m < UNLABELLED) & (truth != VOID)].mean() > .9
    other = data.splits['val'][0]
    assert new[other].scribbles is None and data[other].scribbles is not None


def test_order_and_names_decide_nothing_but_themselves(data, tmp_path):
    a, b = small(data), small(data)
    b.splits = {'train': a.splits['train'][::-1]}
    for d, n in ((a, 'a'), (b, 'b')): write_labels(d, tmp_path/n, 'points', 'masks', seed=5, workers=1)
    for p in (tmp_path/'a').glob('*.png'): assert p.read_bytes() == (tmp_path/'b'/p.name).read_bytes()
    write_labels(a, tmp_path/'c', 'points', 'masks', seed=6, workers=1)
    assert any(p.read_bytes() != (tmp_path/'c'/p.name).read_bytes() for p in (tmp_path/'a').glob('*.png'))


def test_shares_of_real_and_simulated_scribbles_are_nested(data, tmp_path):
    for source in ('scribbles', 'masks'):
        made = [write_labels(small(data), tmp_path/f'{source}{s}', source=source, share=s, workers=1) for s in (1, .5, .3)]
        for i in made[0].splits['train']:
            on = [read_strokes(d[i].scribbles) < UNLABELLED for d in made]
            for more, less in zip(on, on[1:]): assert less.any() and not (less & ~more).any() and less.sum() < more.sum()
    full = write_labels(small(data), tmp_path/'scribbles1', share=1, workers=1)
    for i in full.splits['train']: assert np.array_equal(read_strokes(full[i].scribbles), read_strokes(data[i].scribbles))


def test_points_of_scribbles_are_spots(data, tmp_path):
    spots = write_labels(small(data), tmp_path, 'points', 'scribbles', radius=0, workers=1)
    for i in spots.splits['train']:
        own = read_strokes(data[i].scribbles)
        m, n = read_strokes(spots[i].points), components(own.astype(int), background=UNLABELLED, connectivity=2).max()
        assert (m < UNLABELLED).sum() == n and np.array_equal(m[m < UNLABELLED], own[m < UNLABELLED])
    assert not spots.simulated and spots.name == data.name


def test_resume_and_folders_made_otherwise(data, tmp_path):
    new = write_labels(small(data), tmp_path/'a', source='masks', workers=1)
    p, q = (new[i].scribbles for i in new.splits['train'][:2])
    before, content = p.stat().st_mtime_ns, q.read_bytes()
    q.unlink()
    write_labels(small(data), tmp_path/'a', source='masks', workers=1)
    assert p.stat().st_mtime_ns == before and q.read_bytes() == content
    with pytest.raises(InputError, match='made otherwise'): write_labels(small(data), tmp_path/'a', source='masks', seed=1, workers=1)
    write_mask(tmp_path/'b/x.png', np.zeros((2, 2), np.uint8))
    with pytest.raises(InputError, match='nothing says how'): write_labels(small(data), tmp_path/'b', workers=1)
    assert with_labels(data, tmp_path/'a', 'points')[new.splits['train'][0]].points == p
    for bad in (dict(kind='boxes'), dict(source='points'), dict(share=2), dict(source='masks', per='pixel')):
        with pytest.raises(ValueError): write_labels(small(data), tmp_path/'c', **bad, workers=1)
    assert not (tmp_path/'c').exists()


def test_images_without_any_label(tmp_path):
    for i in 'ab': Image.new('RGB', (W, H)).save(tmp_path/f'{i}.jpg')
    write_mask(tmp_path/'a.png', np.full((H, W), VOID))
    write_mask(tmp_path/'b.png', np.full((H, W), 2))
    items = [Item(i, tmp_path/f'{i}.jpg', (2,), mask=tmp_path/f'{i}.png') for i in 'ab'] + [Item('c', tmp_path/'c.jpg', (1,))]
    d = Dataset('own', ('x', 'y'), items, {'train': ['a', 'b', 'c']})
    with pytest.raises(InputError, match='a.jpg: its masks label no pixel'): write_labels(d, tmp_path/'s', source='masks', workers=1)
    new = write_labels(d, tmp_path/'s', source='masks', workers=1, skip_bad=True)
    assert [new[i].scribbles is not None for i in 'abc'] == [False, True, False] and list(new.report['without labels']) == ['a']
    with pytest.raises(InputError, match='no image of own has points'): write_labels(d, tmp_path/'t', 'points', workers=1)


def test_pets_get_segment_ids(tmp_path):
    d = pets(sample(profile='smoke')/'pets', classes=37)
    d.splits = {'trainval': [o.id for o in d.items if o.mask][:2]}
    new = write_labels(d, tmp_path, 'points', 'masks', radius=2, workers=1)
    for i in new.splits['trainval']: assert {*np.unique(read_strokes(new[i].points, n_classes=1))} == {0, 1, UNLABELLED}


def test_two_names_two_drawings(tmp_path):
    for i in 'ab': Image.new('RGB', (W, H)).save(tmp_path/f'{i}.jpg')
    write_mask(tmp_path/'m.png', np.full((H, W), 1))
    d = Dataset('own', ('x',), [Item(i, tmp_path/f'{i}.jpg', (1,), mask=tmp_path/'m.png') for i in 'ab'], {'train': ['a', 'b']})
    a, b = (read_strokes(write_labels(d, tmp_path/'p', 'points', 'masks', radius=0, workers=1)[i].points) for i in 'ab')
    assert not np.array_equal(a, b)


@tidy
@given(st.integers(0, 2**32 - 1), st.integers(4, 40), st.integers(4, 40), st.data())
def test_shrunk_labels(seed, h, w, data):
    "Against a loop over the cells; and every class that is drawn once alone in its cell is still there."
    rng = np.random.default_rng(seed)
    m = rng.choice([0, 1, 2, UNLABELLED, VOID], (h, w), p=[.02, .02, .02, .84, .1]).astype(np.uint8)
    k, l = data.draw(st.integers(1, h)), data.draw(st.integers(1, w))
    got = shrink_labels(m, (k, l))
    rows, cols = ([np.flatnonzero(np.arange(n) * s // n == i) for i in range(s)] for n, s in ((h, k), (w, l)))
    for i, r in enumerate(rows):
        for j, c in enumerate(cols):
            part = m[np.ix_(r, c)].ravel()
            known = part[part < UNLABELLED]
            want = np.bincount(known).argmax() if len(known) else VOID if (part == VOID).all() else UNLABELLED
            assert got[i, j] == want
