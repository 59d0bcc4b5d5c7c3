"Contour regions: numbers without gaps, borders at edges, basins against a plain flooding, region maps from files that may lie."
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_gradient_magnitude
from skimage.color import rgb2lab
from skimage.measure import label as components
from skimage.segmentation import felzenszwalb

from wsss_nb.data.items import Dataset, InputError, Item
from wsss_nb.refine.contours import CONTOURS, contour_regions, edge_watershed, read_regions, write_contours
from wsss_nb.refine.regions import RegionStore, superpixels

tidy = settings(deadline=None, max_examples=20)
H, W = 24, 36


def picture(seed, blocks=(3, 4)):
    "Patches of even colour with a little noise."
    rng = np.random.default_rng(seed)
    flat = np.kron(rng.integers(0, 256, (*blocks, 3)), np.ones((H // blocks[0], W // blocks[1], 1)))
    return np.clip(flat + rng.normal(0, 2, (H, W, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize('method', ['felzenszwalb', 'watershed', 'slic', 'quick'])
def test_numbers_without_gaps_and_the_same_each_time(method):
    image = picture(0)
    r = contour_regions(image, method)
    assert r.dtype == np.int32 and r.shape == (H, W) and np.array_equal(np.unique(r), np.arange(r.max() + 1))
    assert np.array_equal(r, contour_regions(image, method))


def test_options_reach_the_methods():
    image = picture(1)
    reference = felzenszwalb(image, scale=300, sigma=.5, min_size=9)
    ours = contour_regions(image, scale=300, sigma=.5, min_size=9)
    assert len({*zip(reference.flat, ours.flat)}) == len(np.unique(reference)) == len(np.unique(ours)), 'the same regions'
    assert np.array_equal(contour_regions(image, 'slic', n_segments=12), np.unique(superpixels(image, 'slic', n_segments=12), return_inverse=True)[1].reshape(H, W))
    with pytest.raises(ValueError, match='felzenszwalb, watershed, slic, quick'): contour_regions(image, 'hed')
    with pytest.raises(TypeError, match='uint8'): contour_regions(image / 255)
    assert {*CONTOURS} == {'felzenszwalb', 'watershed'}


@tidy
@given(st.integers(0, 10**6), st.integers(16, 60), st.sampled_from(['felzenszwalb', 'watershed', 'slic', 'quick']))
def test_regions_of_a_reduced_copy(seed, longest, method):
    "They have the image's size and numbers without gaps; a copy is never larger than the image."
    image = picture(seed)
    r = contour_regions(image, method, longest)
    assert r.shape == (H, W) and np.array_equal(np.unique(r), np.arange(r.max() + 1))
    if longest >= W: assert np.array_equal(r, contour_regions(image, method))


def test_a_reduced_copy_has_fewer_regions():
    "The cut is made on a copy of the longer side asked for."
    image = np.random.default_rng(0).integers(0, 256, (96, 144, 3), np.uint8)
    small = cv2.resize(image, (48, 32), interpolation=cv2.INTER_AREA)
    assert np.array_equal(contour_regions(image, longest=48), contour_regions(small).repeat(3, 0).repeat(3, 1))
    with pytest.raises(ValueError, match='at least 16'): contour_regions(image, longest=8)


def flooded(edges, depth):
    "How many minima are at least `depth` deep: water rises, and of two lakes that meet the shallower one is lost if it is less deep."
    lakes, bottoms, parent = np.full(edges.size, -1), {}, {}
    def root(k):
        while parent[k] != k: k = parent[k]
        return k
    kept, h, w = 0, *edges.shape
    for p in np.argsort(edges, axis=None, kind='stable'):
        y, x = divmod(int(p), w)
        around = [(y + a) * w + x + b for a in (-1, 0, 1) for b in (-1, 0, 1) if (a or b) and 0 <= y + a < h and 0 <= x + b < w]
        near = sorted({root(lakes[q]) for q in around if lakes[q] >= 0}, key=bottoms.__getitem__)
        if not near: parent[p], bottoms[p], lakes[p] = p, edges.flat[p], p; continue
        lakes[p] = near[0]
        for k in near[1:]:
            kept += edges.flat[p] - bottoms[k] > depth
            parent[k] = near[0]
    return kept + 1


@tidy
@given(st.integers(0, 10**6), st.sampled_from([.3, 1., 3., 10.]))
def test_basins_are_those_of_a_flooding(seed, depth):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (9, 11, 3), np.uint8)
    edges = np.linalg.norm([gaussian_gradient_magnitude(c, 1.) for c in np.moveaxis(rgb2lab(image), 2, 0)], axis=0)
    labels = edge_watershed(image, depth)
    n = len(np.unique(labels))
    assert n == (flooded(edges, depth) if np.ptp(edges) > depth else 1)
    assert components(labels + 1, connectivity=1).max() == n, 'each is connected'
    assert n >= len(np.unique(edge_watershed(image, 2 * depth)))


def test_an_even_image_is_one_region():
    for method in ('felzenszwalb', 'watershed'): assert not contour_regions(np.full((H, W, 3), 77, np.uint8), method).any()


@pytest.mark.parametrize('method', ['felzenszwalb', 'watershed'])
def test_edges_are_borders(method):
    image = np.full((H, W, 3), 40, np.uint8)
    image[6:18, 10:26] = 220, 180, 30
    r = contour_regions(image, method, **({'min_size': 5} if method == 'felzenszwalb' else {}))
    assert len({r[0, 0], r[12, 18]}) == 2 and len(np.unique(r[8:16, 12:24])) == 1 and r[0, 0] == r[-1, -1]


# Files

@tidy
@given(st.integers(0, 10**6), st.sampled_from([np.uint8, np.uint16]))
def test_files_come_back(tmp_path_factory, seed, kind):
    rng = np.random.default_rng(seed)
    numbers = np.sort(rng.choice(np.iinfo(kind).max + 1, 5, replace=False))
    labels = rng.integers(0, 5, (H, W)); labels.flat[:5] = range(5)
    p = tmp_path_factory.mktemp('r')/'a.png'
    Image.fromarray(numbers[labels].astype(kind)).save(p)
    assert np.array_equal(read_regions(p, (H, W)), labels)


def test_indexed_png(tmp_path):
    im = Image.fromarray(np.arange(H * W, dtype=np.uint8).reshape(H, W) % 7, 'L')
    im.putpalette(np.arange(768).astype(np.uint8).tobytes()); im.save(tmp_path/'a.png')
    assert np.array_equal(read_regions(tmp_path/'a.png'), np.arange(H * W).reshape(H, W) % 256 % 7)


BAD = {
    'another image': (np.zeros((H, W + 1), np.uint8), f'the region map is {W + 1}×{H}, its image {W}×{H}. Make'),
    'turned': (np.zeros((W, H), np.uint8), f'{H}×{W}, its image {W}×{H}'),
    'contours of twice the size': (np.zeros((2 * H + 1, 2 * W + 1), np.uint8), 'every second row and column'),
    'colours': (np.zeros((H, W, 3), np.uint8), 'mode RGB'),
    'contours as black and white': (np.zeros((H, W), bool), 'mode 1'),
    'no PNG': (b'P5 nothing', 'not a readable region map'),
}


@pytest.mark.parametrize('case', BAD)
def test_files_that_lie(case, tmp_path):
    content, message = BAD[case]
    p = tmp_path/'a.png'
    if isinstance(content, bytes): p.write_bytes(content)
    else: Image.fromarray(content).save(p)
    with pytest.raises(InputError, match=message): read_regions(p, (H, W))
    with pytest.raises(InputError, match='no such region map'): read_regions(tmp_path/'b.png')


def test_too_many_regions(tmp_path):
    Image.fromarray(np.arange(H * W, dtype=np.uint16).reshape(H, W)).save(tmp_path/'a.png')
    assert read_regions(tmp_path/'a.png').max() == H * W - 1
    with pytest.raises(InputError, match=f'{H * W} regions are more than {H * W - 1}. Cut'): read_regions(tmp_path/'a.png', most=H * W - 1)


@pytest.fixture
def view(tmp_path):
    items = []
    for k, i in enumerate('abc'):
        Image.fromarray(picture(k)).save(tmp_path/f'{i}.png')
        items.append(Item(i, tmp_path/f'{i}.png', (1,)))
    return Dataset('own', ('x',), items, {'train': [*'abc']}).view('tags', 'train')


def test_made_and_resumed(view, tmp_path):
    store = RegionStore(tmp_path/'s')
    assert write_contours(view, store, 'watershed', workers=1, depth=1.) == []
    for k, i in enumerate('abc'): assert np.array_equal(store.load(i), contour_regions(picture(k), 'watershed', depth=1.))
    before = store.path('a').stat().st_mtime_ns
    store.path('b').unlink()
    (tmp_path/'c.png').unlink()
    store.path('c').unlink()
    (bad, problem), = write_contours(view, store, 'watershed', workers=1, depth=1.)
    assert bad == 'c' and 'no such file' in problem and store.path('a').stat().st_mtime_ns == before and len(store) == 2
    (_, problem), *_ = write_contours(view, RegionStore(tmp_path/'t'), 'slic', most=2, workers=1)
    assert 'regions are more than 2' in problem
    with pytest.raises(ValueError, match='method is one of'): write_contours(view, store, 'ucm')


def test_taken_from_files(view, tmp_path):
    files, store = tmp_path/'files', RegionStore(tmp_path/'s')
    files.mkdir()
    Image.fromarray(contour_regions(picture(0)).astype(np.uint8)).save(files/'a.png')
    Image.fromarray(np.zeros((H, W - 3), np.uint8)).save(files/'b.png')
    bad = dict(write_contours(view, store, files=files, workers=1))
    assert np.array_equal(store.load('a'), contour_regions(picture(0)))
    assert sorted(bad) == ['b', 'c'] and 'its image' in bad['b'] and 'no such region map' in bad['c']
    with pytest.raises(InputError, match='no such folder'): write_contours(view, store, files=tmp_path/'none')
