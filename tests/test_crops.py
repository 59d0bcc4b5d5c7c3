"Scaling, cropping and mirroring at a photo's own shape, against the arrays of SPML's release; labels that have a side."
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImage, TensorMask
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsss_nb.data.blocks import Augment, swap_sides
from wsss_nb.data.crops import FILL, ScaleCrop, mirror, place_crop, pyramid, rescale
from wsss_nb.data.densepose import MIRRORED, flip_parts
from wsss_nb.data.items import UNLABELLED, VOID, Dataset, Item, resize_mask
from wsss_nb.segment.spml import spml_dls

GOLDEN = Path(__file__).parent/'golden'
tidy = settings(deadline=None, max_examples=25)
MEAN = .485, .456, .406


@pytest.fixture(scope='module')
def g():
    with np.load(GOLDEN/'spml_transforms.npz', allow_pickle=False) as z: return {k: z[k] for k in z}


def maps_of(lab): return lab.transpose(2, 0, 1)


# The original's arrays

def test_resize_as_recorded(g):
    image, maps = rescale(g['img'], maps_of(g['lab']), .75, original=True)
    assert np.array_equal(image, g['resize075_img']) and np.array_equal(maps, maps_of(g['resize075_lab']))
    np.random.seed(20)
    image, maps = rescale(g['img'], maps_of(g['lab']), .5 + np.random.random_sample(), original=True)
    assert np.array_equal(image, g['rr_img']) and np.array_equal(maps, maps_of(g['rr_lab']))
    assert np.array_equal(rescale(g['img'], factor=64 / max(g['img'].shape), original=True)[0], g['interp64'])


@pytest.mark.parametrize('k', range(3))
def test_crops_as_recorded(g, k):
    "S19: two draws, rows first; padding below and to the right, the mean for the photo, 255 for both maps."
    np.random.seed(10 + k)
    at = np.random.random_sample(2)
    image, maps = place_crop(g['img'], maps_of(g['lab']), g[f'crop{k}_img'].shape[:2], at, MEAN, original=True)
    assert np.array_equal(image, g[f'crop{k}_img']) and np.array_equal(maps, maps_of(g[f'crop{k}_lab']))


def test_pyramid_as_recorded(g):
    got = pyramid(g['img'], maps_of(g['lab']), (.5, 1.), original=True)
    assert len(got) == 4
    for k, (image, maps, mirrored) in enumerate(got):
        assert np.array_equal(image.transpose(2, 0, 1), g[f'pyr{k}_img']) and np.array_equal(maps[0], g[f'pyr{k}_sem']) and mirrored == g[f'pyr{k}_flip']
    assert [m for *_, m in pyramid(g['img'], None, (1.,), flip=False)] == [False]


# What is done instead

def numbered(h, w):
    "A photo and a map of which each pixel is known: rows in red, columns in green and in the map."
    y, x = np.mgrid[:h, :w].astype(np.uint8)
    return np.stack([y, x, y], 2), np.stack([x, y])


def test_every_place_is_drawn():
    "S19: the release never cuts the last window, nor puts a small photo anywhere but into the corner."
    seen = {o: set() for o in (False, True)}
    for (h, w) in ((6, 9), (3, 2)):
        image, maps = numbered(h, w)
        for u in np.linspace(0, 1, 60, endpoint=False):
            for o in seen:
                out = place_crop(image, maps, (4, 4), (u, u), original=o)[1]
                where = np.argwhere(out[0] != VOID)[0] - out[::-1][:, out[0] != VOID][:, 0]
                seen[o].add((h, *where.tolist()))
    assert {-y for h, y, _ in seen[False] if h == 6} == {0, 1, 2} and {-x for h, _, x in seen[False] if h == 6} == set(range(6))
    assert {(y, x) for h, y, x in seen[False] if h == 3} == {(y, x) for y in (0, 1) for x in (0, 1, 2) if abs(y / 1 - x / 2) <= .51}
    assert {-y for h, y, _ in seen[True] if h == 6} == {0, 1} and {-x for h, _, x in seen[True] if h == 6} == set(range(5))
    assert {(y, x) for h, y, x in seen[True] if h == 3} == {(0, 0)}


@tidy
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.booleans())
def test_a_crop_is_the_photo_and_padding(h, w, ch, cw, u, v, original):
    "Photo and maps stay together; whatever of the photo fits is there, the rest is padding."
    image, maps = numbered(h, w)
    x, m = place_crop(image, maps, (ch, cw), (u, v), original=original)
    void = m[0] == VOID
    assert x.shape == (ch, cw, 3) and m.shape == (2, ch, cw) and (~void).sum() == min(h, ch) * min(w, cw)
    assert np.array_equal(void, m[1] == VOID) and (x[void] == FILL).all()
    assert np.array_equal(x[~void][:, 1], m[0][~void]) and np.array_equal(x[~void][:, 0], m[1][~void])
    ys, xs = np.nonzero(~void)
    assert (np.diff(m[0][ys.min():ys.max() + 1, xs.min():xs.max() + 1].astype(int), axis=1) == 1).all()
    one = place_crop(image, maps[0], (ch, cw), (u, v), original=original)[1]
    assert np.array_equal(one, m[0])


@tidy
@given(st.integers(8, 60), st.integers(8, 60), st.floats(.3, 2.))
def test_labels_lie_where_the_photo_does(h, w, factor):
    "Half a pixel of the source is the most by which nearest and bilinear differ; the release adds a shift."
    y, x = np.mgrid[:h, :w]
    image = np.stack([x, y, y], 2).astype(np.float32)
    seen, maps = rescale(image, np.stack([x, y]).astype(np.int16), factor)
    assert seen.shape[:2] == (max(round(h * factor), 1), max(round(w * factor), 1)) and maps.dtype == np.int16
    for k in range(2): assert np.abs(seen[..., k] - maps[k]).max() <= .501
    wide, shifted = rescale(image, x.astype(np.int16), .25, original=True)
    assert (wide[..., 0] - shifted).mean() > 1


def test_one_size_and_the_mean_shape():
    "Factors between their limits; width and height by the same."
    torch.manual_seed(0)
    y, x = np.mgrid[:120, :200]
    disc = ((x - 100)**2 + (y - 60)**2 < 30**2).astype(np.uint8)
    item = TensorImage(torch.from_numpy(np.stack([disc * 200] * 3))), TensorMask(torch.from_numpy(disc))
    sides = []
    for _ in range(60):
        a, m = ScaleCrop(320, (.5, 1.5))(item, split_idx=0)
        assert a.shape == (3, 320, 320) and m.shape == (320, 320) and type(a) is TensorImage and type(m) is TensorMask
        ys, xs = (m == 1).nonzero().T
        sides.append((float(ys.max() - ys.min() + 1), float(xs.max() - xs.min() + 1)))
    sides = np.array(sides)
    assert np.abs(sides[:, 0] - sides[:, 1]).max() <= 2
    assert 29 <= sides.min() <= 36 and 82 <= sides.max() <= 90


def test_held_out_photos_are_whole_and_the_same():
    image, maps = numbered(20, 30)
    item = TensorImage(torch.from_numpy(image).permute(2, 0, 1)), TensorMask(torch.from_numpy(maps)), torch.tensor(3)
    for idx in (1, None):
        a, b = (ScaleCrop(15, flip=1.)(item, split_idx=idx) for _ in range(2))
        assert all(torch.equal(p, q) for p, q in zip(a, b)) and a[2] == 3
        assert np.array_equal(a[1][0, 3:13].numpy(), resize_mask(maps[0], (10, 15))) and (a[1][0, :3] == VOID).all() and (a[1][0, 13:] == VOID).all()


# Labels that have a side

def scene(seed=0, h=11, w=14):
    r = np.random.default_rng(seed)
    label = r.choice([*range(15), 20, UNLABELLED, VOID], (h, w)).astype(np.int16)
    return r.integers(0, 256, (h, w, 3), np.uint8), np.stack([label, r.integers(0, 900, (h, w)).astype(np.int16)])


@tidy
@given(st.integers(0, 10**6))
def test_mirrored_labels_are_swapped_regions_only_turned(seed):
    "S13, and twice is the identity."
    image, maps = scene(seed)
    turned = mirror(image, maps, {0: MIRRORED})
    assert np.array_equal(turned[0], image[:, ::-1]) and np.array_equal(turned[1][0], flip_parts(maps[0].astype(np.uint8))) and np.array_equal(turned[1][1], maps[1, :, ::-1])
    assert turned[1].dtype == np.int16
    assert all(np.array_equal(a, b) for a, b in zip(mirror(*turned, {0: MIRRORED}), (image, maps)))
    assert np.array_equal(mirror(image, maps)[1], maps[..., ::-1])


@pytest.mark.parametrize('way', [Augment((1., 1.), 1., 0., 0., sides={0: MIRRORED}), ScaleCrop(14, (1., 1.), 1., sides={0: MIRRORED})], ids=['Augment', 'ScaleCrop'])
@pytest.mark.parametrize('stacked', [True, False])
def test_transforms_swap_sides(way, stacked):
    image, maps = scene(h=14)
    maps = maps if stacked else maps[0]
    item = TensorImage(torch.from_numpy(image).permute(2, 0, 1)), TensorMask(torch.from_numpy(maps)), torch.tensor([1., 0.]), torch.tensor(7)
    one = way(item, split_idx=0)
    assert np.array_equal(one[0].permute(1, 2, 0).numpy(), image[:, ::-1]) and np.array_equal(one[1].numpy(), mirror(image, maps, {0: MIRRORED})[1])
    assert type(one[1]) is TensorMask and one[1].dtype == torch.int16 and one[2] is item[2] and one[3] is item[3]
    two = way(one, split_idx=0)
    assert np.array_equal(two[1].numpy(), maps) and torch.equal(two[0], item[0])


@pytest.mark.parametrize('way', [Augment((1., 1.), 0., 0., 0., sides={0: MIRRORED}), ScaleCrop(14, (1., 1.), 0., sides={0: MIRRORED})], ids=['Augment', 'ScaleCrop'])
def test_no_mirror_image_no_swap(way):
    image, maps = scene(h=14)
    out = way((TensorImage(torch.from_numpy(image).permute(2, 0, 1)), TensorMask(torch.from_numpy(maps))), split_idx=0)
    assert np.array_equal(out[1].numpy(), maps)


def test_several_label_maps():
    "Two label maps of one photo: each has its table, as a tensor or an array."
    _, maps = scene()
    maps[1] = maps[1] % 15
    both = swap_sides(maps, {0: MIRRORED, 1: MIRRORED})
    assert np.array_equal(both, MIRRORED[maps]) and np.array_equal(swap_sides(torch.from_numpy(maps), {1: MIRRORED}).numpy(), [maps[0], MIRRORED[maps[1]]])


def test_tables_that_do_not_fit():
    image, maps = scene()
    for bad in (np.roll(np.arange(256), 1), np.arange(15), np.zeros(256, int), np.arange(256) + 1):
        for way in (Augment, ScaleCrop):
            with pytest.raises(ValueError, match='in pairs'): way(sides={0: bad})
    with pytest.raises(ValueError, match='map 1 has numbers .* is it a map of regions'): mirror(image, maps, {1: MIRRORED})
    for k in (2, -1):
        with pytest.raises(ValueError, match='there is no map'): mirror(image, maps, {k: MIRRORED})
    with pytest.raises(ValueError, match='there is no map'): mirror(image, maps[0], {1: MIRRORED})


def test_settings_that_do_not_fit():
    for kwargs in (dict(scale=(0, 1)), dict(scale=(1.5, .5)), dict(size=0)):
        with pytest.raises(ValueError, match='above 0'): ScaleCrop(**kwargs)
    item = TensorImage(torch.zeros(3, 4, 4, dtype=torch.uint8)), TensorMask(torch.zeros(4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match='stack them'): ScaleCrop(8)((*item, item[1]), split_idx=0)
    assert ScaleCrop(8)(item[:1], split_idx=0)[0].shape == (3, 8, 8)


# In SPML's batches

@pytest.fixture(scope='module')
def view(tmp_path_factory):
    folder, rng, items = tmp_path_factory.mktemp('photos'), np.random.default_rng(0), []
    for i, (h, w) in enumerate([(30, 44), (52, 36), (20, 20), (40, 64)]):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(folder/f'p{i}.png')
        items.append(Item(f'p{i}', folder/f'p{i}.png', tags=(1 + i % 2,)))
    return Dataset('odd', ['left', 'right'], items, {'train': [o.id for o in items]}).view('scribbles', 'train')


def read_label(item):
    w, h = Image.open(item.image).size
    m = np.full((h, w), UNLABELLED, np.uint8)
    m[:, :w // 3], m[:, -(w // 3):] = 1, 2
    return m


def read_region(item): return cv2.resize(np.array([[0, 900]], np.int16), read_label(item).shape[::-1], interpolation=cv2.INTER_NEAREST)


def test_batches_of_spml_without_squashing(view):
    "Photos of four sizes in one batch; left is left in a mirror image as well, padding is void and 0 to the network."
    swap = np.arange(256)
    swap[[1, 2]] = 2, 1
    torch.manual_seed(0)
    dls = spml_dls(view, read_label, read_region, None, 4, (MEAN, (.2,) * 3), ScaleCrop(32, (.4, .8), fill=tuple(255 * m for m in MEAN), sides={0: swap}))
    for _ in range(4):
        x, maps, tags, number = dls.train.one_batch()
        assert x.shape == (4, 3, 32, 32) and maps.shape == (4, 2, 32, 32) and maps.dtype == torch.int64 and tags.shape == (4, 2)
        assert set(maps[:, 0].unique().tolist()) <= {1, 2, UNLABELLED, VOID} and set(maps[:, 1].unique().tolist()) <= {0, 900, VOID}
        assert (maps[:, 0] == VOID).any() and x.movedim(1, 3)[maps[:, 0] == VOID].abs().max() < .02
        for m in maps:
            one, two = ((m[0] == k).nonzero()[:, 1].float() for k in (1, 2))
            if len(one) and len(two): assert one.mean() < two.mean()
            if len(one) and len(two) and (m[1] == 900).any() and (m[1] == 0).any(): assert {0, 900} <= set(m[1].unique().tolist())
    plain = spml_dls(view, read_label, read_region, None, 4, augment=ScaleCrop(32, (.4, .8), flip=1.))
    m = plain.train.one_batch()[1][0]
    assert (m[0] == 1).nonzero()[:, 1].float().mean() > (m[0] == 2).nonzero()[:, 1].float().mean()


def test_same_seed_same_batch(view):
    def batch():
        torch.manual_seed(3)
        dls = spml_dls(view, read_label, read_region, None, 4, augment=ScaleCrop(24), valid=.25)
        return [*dls.train.new(shuffle=False, drop_last=False).one_batch(), *dls.valid.one_batch()]
    assert all(torch.equal(a, b) for a, b in zip(batch(), batch()))
