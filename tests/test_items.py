"Images and masks are read right, whatever the file's mode; views keep what they must not show."
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageOps

from wsss_nb.data.items import (ALLOWED, IMAGE_SUFFIXES, UNLABELLED, VOID, Box, Dataset, InputError, Item, atomic, images_in, read_image,
                                read_mask, resize_mask, voc_palette, write_mask)
from wsss_nb.data.store import LabelStore, Maps, MapStore


@pytest.fixture
def photo():
    "A smooth picture with a different colour in each corner, wider than high."
    y, x = np.mgrid[:24, :36]
    return np.stack([x * 7, y * 10, 255 - x * 5], -1).astype(np.uint8)


# --- every kind of image, against Pillow's or OpenCV's own reading ---

@pytest.mark.parametrize('suffix', IMAGE_SUFFIXES)
def test_every_suffix(tmp_path, photo, suffix):
    f = tmp_path / f'x{suffix}'
    Image.fromarray(photo).save(f)
    got = read_image(f)
    assert got.dtype == np.uint8 and got.shape == photo.shape and got.flags['C_CONTIGUOUS'] and got.flags['WRITEABLE']
    np.testing.assert_array_equal(got, np.asarray(Image.open(f).convert('RGB')))
    if suffix in ('.png', '.bmp', '.tif', '.tiff'): np.testing.assert_array_equal(got, photo)


def test_suffix_does_not_decide(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / 'x.jpg', format='PNG')
    np.testing.assert_array_equal(read_image(tmp_path / 'x.jpg'), photo)


@pytest.mark.parametrize('mode', ['P', 'L', '1'])
def test_palette_grey_and_bilevel(tmp_path, photo, mode):
    im = Image.fromarray(photo).convert(mode)
    im.save(tmp_path / 'x.png')
    np.testing.assert_array_equal(read_image(tmp_path / 'x.png'), np.asarray(im.convert('RGB')))


@pytest.mark.parametrize('mode', ['CMYK', 'YCbCr', 'LAB'])
def test_other_colour_spaces(tmp_path, photo, mode):
    f = tmp_path / 'x.tif'
    if mode == 'LAB':
        from PIL import ImageCms
        Image.fromarray(photo)
        im = ImageCms.profileToProfile(Image.fromarray(photo), ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'), outputMode='LAB')
    else: im = Image.fromarray(photo).convert(mode)
    im.save(f)
    got = read_image(f)
    assert got.shape == photo.shape
    if mode != 'LAB': np.testing.assert_array_equal(got, np.asarray(Image.open(f).convert('RGB')))
    assert np.abs(got.astype(int) - photo).mean() < 8   # the picture that was meant


def test_cmyk_jpeg(tmp_path, photo):
    "JPEGs from printing programs; read by Pillow's conversion, and the colours are those of the photo, not inverted."
    Image.fromarray(photo).convert('CMYK').save(tmp_path / 'x.jpg', quality=95)
    got = read_image(tmp_path / 'x.jpg')
    np.testing.assert_array_equal(got, np.asarray(Image.open(tmp_path / 'x.jpg').convert('RGB')))
    assert np.abs(got.astype(int) - photo).mean() < 8


def test_alpha_on_white(tmp_path, photo):
    alpha = np.zeros(photo.shape[:2], np.uint8)
    alpha[:, 12:24], alpha[:, 24:] = 128, 255
    Image.fromarray(np.dstack([photo, alpha])).save(tmp_path / 'x.png')
    got = read_image(tmp_path / 'x.png').astype(int)
    want = photo * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    assert np.abs(got - want).max() <= 1
    assert (got[:, :12] == 255).all()


def test_grey_with_alpha_and_transparent_palette(tmp_path):
    grey = np.full((4, 6), 100, np.uint8)
    alpha = np.zeros((4, 6), np.uint8)
    alpha[:, 3:] = 255
    Image.fromarray(np.dstack([grey, alpha]), 'LA').save(tmp_path / 'la.png')
    np.testing.assert_array_equal(read_image(tmp_path / 'la.png')[0, :, 0], [255] * 3 + [100] * 3)
    p = Image.fromarray((alpha > 0).astype(np.uint8), 'P')
    p.putpalette([10, 20, 30, 200, 100, 50])
    p.save(tmp_path / 'p.png', transparency=0)
    got = read_image(tmp_path / 'p.png')
    assert (got[:, :3] == 255).all() and (got[:, 3:] == (200, 100, 50)).all()


def test_sixteen_bit_grey(tmp_path):
    "Scaled to 8 bits, not clipped as Pillow's own conversion does."
    deep = np.linspace(0, 65535, 24 * 36).reshape(24, 36).astype(np.uint16)
    cv2.imwrite(str(tmp_path / 'x.png'), deep)
    cv2.imwrite(str(tmp_path / 'x.tif'), deep)
    for f in ('x.png', 'x.tif'):
        got = read_image(tmp_path / f)
        assert got.shape == (24, 36, 3)
        assert np.abs(got[..., 0].astype(float) - deep / 257).max() <= 1


def test_sixteen_bit_colour(tmp_path, photo):
    cv2.imwrite(str(tmp_path / 'x.png'), photo[..., ::-1].astype(np.uint16) * 257)
    assert np.abs(read_image(tmp_path / 'x.png').astype(int) - photo).max() <= 1


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_rotation(tmp_path, photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    f = tmp_path / 'x.png'
    Image.fromarray(photo).save(f, exif=exif)
    got = read_image(f)
    np.testing.assert_array_equal(got, np.asarray(ImageOps.exif_transpose(Image.open(f))))
    assert got.shape[:2] == ((24, 36) if orientation <= 4 else (36, 24))
    Image.fromarray(photo).save(tmp_path / 'x.jpg', exif=exif, quality=95)
    # OpenCV turns JPEGs upright by itself
    assert np.abs(read_image(tmp_path / 'x.jpg').astype(int) - cv2.imread(str(tmp_path / 'x.jpg'))[..., ::-1]).mean() < 3


def test_first_frame_of_an_animation(tmp_path, photo):
    other = Image.fromarray(255 - photo)
    Image.fromarray(photo).save(tmp_path / 'x.webp', save_all=True, append_images=[other], lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / 'x.webp'), photo)


# --- masks ---

@settings(max_examples=40, deadline=None)
@given(mask=arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20))))
def test_mask_comes_back(tmp_path_factory, mask):
    f = tmp_path_factory.mktemp('m') / 'x.png'
    write_mask(f, mask)
    np.testing.assert_array_equal(read_mask(f), mask)
    im = Image.open(f)
    assert im.mode == 'P'
    np.testing.assert_array_equal(np.asarray(im.convert('RGB')), voc_palette()[mask])   # opens in colour in any viewer


def test_voc_colours():
    "From the VOC development kit: background, aeroplane, bicycle, cat, person, tv, void."
    p = voc_palette()
    assert p.shape == (256, 3) and p.dtype == np.uint8
    for i, c in {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}.items():
        assert tuple(p[i]) == c
    assert len({tuple(c) for c in p}) == 256


def test_masks_in_grey_bilevel_and_few_colours(tmp_path):
    m = np.uint8([[0, 1, 2, 255], [3, 0, 254, 1]])
    Image.fromarray(m).save(tmp_path / 'grey.png')
    np.testing.assert_array_equal(read_mask(tmp_path / 'grey.png', n_classes=3, size=(2, 4)), m)
    Image.fromarray(m == 1).save(tmp_path / 'one.png')
    np.testing.assert_array_equal(read_mask(tmp_path / 'one.png'), m == 1)
    few = Image.fromarray(m.clip(0, 3), 'P')
    few.putpalette([0, 0, 0, 9, 9, 9, 8, 8, 8, 7, 7, 7])
    few.save(tmp_path / 'few.png', bits=2)
    np.testing.assert_array_equal(read_mask(tmp_path / 'few.png'), m.clip(0, 3))
    few.save(tmp_path / 'clear.png', transparency=0)     # a transparent background is still class 0
    np.testing.assert_array_equal(read_mask(tmp_path / 'clear.png'), m.clip(0, 3))
    cv2.imwrite(str(tmp_path / 'deep.png'), m.astype(np.uint16))
    np.testing.assert_array_equal(read_mask(tmp_path / 'deep.png'), m)


def test_mask_of_another_size(tmp_path):
    write_mask(tmp_path / 'x.png', np.zeros((4, 6), np.uint8))
    assert read_mask(tmp_path / 'x.png', size=(4, 6)).shape == (4, 6)
    with pytest.raises(InputError, match=r'x\.png.*6×4.*4×6'): read_mask(tmp_path / 'x.png', size=(6, 4))


def test_mask_values_out_of_range(tmp_path):
    write_mask(tmp_path / 'x.png', np.uint8([[0, 1, 21, UNLABELLED, VOID]]))
    assert read_mask(tmp_path / 'x.png', n_classes=21).shape == (1, 5)
    with pytest.raises(InputError, match=r'x\.png.*\[21\].*0 to 20'): read_mask(tmp_path / 'x.png', n_classes=20)
    cv2.imwrite(str(tmp_path / 'deep.png'), np.uint16([[0, 300]]))
    with pytest.raises(InputError, match=r'deep\.png'): read_mask(tmp_path / 'deep.png')


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA', 'CMYK'])
def test_mask_in_colours_is_refused(tmp_path, mode):
    f = tmp_path / ('x.tif' if mode == 'CMYK' else 'x.png')
    Image.new(mode, (4, 4)).save(f)
    with pytest.raises(InputError, match='indexed or grey'): read_mask(f)


@pytest.mark.parametrize('mask', [np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 300), np.full((2, 2), -1), np.full((2, 2), .5)])
def test_write_mask_does_not_change_numbers_in_silence(tmp_path, mask):
    "A mask that is not H×W of whole numbers 0..255 is an error, not a wrapped or rounded file."
    with pytest.raises((ValueError, TypeError)): write_mask(tmp_path / 'x.png', mask)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=30, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 15), st.integers(1, 15))), st.integers(1, 30), st.integers(1, 30))
def test_resize_mask_invents_no_number(mask, h, w):
    out = resize_mask(mask, (h, w))
    assert out.shape == (h, w) and out.dtype == np.uint8 and set(np.unique(out)) <= set(np.unique(mask))
    np.testing.assert_array_equal(resize_mask(mask, mask.shape), mask)
    np.testing.assert_array_equal(resize_mask(np.kron(mask, np.ones((3, 3), np.uint8)), mask.shape), mask)


# --- folders of images ---

def test_images_in_sorted_by_name(tmp_path, photo):
    for n in ('b.PNG', 'a.jpg', 'ü.png', '10.bmp', '2.webp'): Image.fromarray(photo).save(tmp_path / n, format='PNG')
    for n in ('notes.txt', '.hidden.png', '._a.jpg', 'tags.csv'): (tmp_path / n).write_text('x')
    assert [p.name for p in images_in(tmp_path)] == sorted(['b.PNG', 'a.jpg', 'ü.png', '10.bmp', '2.webp'])


def test_a_folder_named_like_an_image_is_none(tmp_path, photo):
    (tmp_path / 'album.png').mkdir()
    Image.fromarray(photo).save(tmp_path / 'a.png')
    assert [p.name for p in images_in(tmp_path)] == ['a.png']


# --- views ---

def a_dataset():
    box = Box(1, 0, 0, 2, 2)
    items = [Item(i, Path(f'{i}.jpg'), (1,), (box,), Path(f'p/{i}.png'), Path(f's/{i}.png'), Path(f'm/{i}.png')) for i in 'abc']
    return Dataset('d', ['cat'], items, dict(train=['c', 'a'], test=['b']))


@pytest.mark.parametrize('supervision', ALLOWED)
def test_view_shows_only_what_it_may(supervision):
    view = a_dataset().view(supervision, 'train')
    assert view.ids == ['c', 'a'] and len(view) == 2 and view[0].id == 'c' and view['a'].id == 'a' and view[-1].id == 'a'
    shown = dict(tags=set(), boxes={'boxes'}, points={'points'}, scribbles={'scribbles'}, masks={'mask'})[supervision]
    for item in view:
        assert item.tags == (1,) and item.image.name == f'{item.id}.jpg'
        assert {n for n in ('boxes', 'points', 'scribbles', 'mask') if getattr(item, n) is not None} == shown


@pytest.mark.parametrize('supervision', sorted(set(ALLOWED) - {'masks'}))
def test_view_has_no_way_to_the_truth(supervision):
    dataset = a_dataset()
    view = dataset.view(supervision, 'train')
    for item in list(view) + dataset.items:
        with pytest.raises(PermissionError): view.read_mask(item)
    # nothing reachable from the view leads to the data set or to a mask path
    seen, todo = set(), [view]
    while todo:
        x = todo.pop()
        if id(x) in seen: continue
        seen.add(id(x))
        assert not isinstance(x, Dataset) and not (isinstance(x, Path) and x.parent.name == 'm'), x
        if isinstance(x, dict): todo += x.values()
        elif isinstance(x, (list, tuple)): todo += x
        elif hasattr(x, '__dict__') and not isinstance(x, type): todo += vars(x).values()


def test_unknown_id_or_index_of_a_view():
    "Not a StopIteration, which would end a generator in silence."
    view = a_dataset().view('tags', 'train')
    with pytest.raises((KeyError, InputError)): view['b']
    with pytest.raises(IndexError): view[2]


def test_data_sets_that_contradict_themselves():
    a, b = Item('a', Path('a.jpg')), Item('b', Path('b.jpg'))
    with pytest.raises(ValueError, match='different ids'): Dataset('d', ['cat'], [a, a], {})
    with pytest.raises(ValueError, match="'z'"): Dataset('d', ['cat'], [a, b], {'train': ['z']})
    with pytest.raises(ValueError, match='segment_of'): Dataset('d', ['cat'], [a], {}, segment_of=(0, 1, 2))
    with pytest.raises(ValueError, match='no split'): Dataset('d', ['cat'], [a], {}).view('tags', 'train')
    with pytest.raises(ValueError, match='supervision'): Dataset('d', ['cat'], [a], {'t': []}).view('everything', 't')


# --- stores ---

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6), st.data())
def test_maps_come_back(tmp_path_factory, k, h, w, data):
    store = MapStore(tmp_path_factory.mktemp('s'))
    values = data.draw(arrays(np.float32, (k, h, w), elements=st.floats(0, 1, width=32)))
    keys = np.array(data.draw(st.permutations(range(1, 9))))[:k]
    store.save('x', Maps(keys, values))
    got = store.load('x')
    assert got.keys.dtype == np.int64 and got.values.dtype == np.float32
    np.testing.assert_array_equal(got.keys, keys)
    np.testing.assert_allclose(got.values, values, atol=5e-4)


@pytest.mark.parametrize('name', ['a', 'with space', 'ümlaut', '猫の写真', '🐈', 'a.b.c', 'a.png', "it's", '100%', 'x' * 200, '猫' * 80, '-rf'])
def test_names_people_give(tmp_path, name):
    maps, labels = MapStore(tmp_path / 'maps'), LabelStore(tmp_path / 'labels')
    mask = np.uint8([[0, 1], [255, 2]])
    assert name not in maps and name not in labels
    maps.save(name, Maps([1], np.ones((1, 2, 2))))
    labels.save(name, mask)
    assert name in maps and name in labels and maps.ids() == labels.ids() == [name]
    np.testing.assert_array_equal(labels.load(name), mask)
    assert maps.load(name).keys == [1]


def test_atomic_leaves_the_old_file_when_the_new_one_fails(tmp_path):
    f = tmp_path / 'x.txt'
    f.write_text('old')
    with pytest.raises(RuntimeError):
        with atomic(f) as tmp:
            tmp.write_text('half')
            assert tmp.parent == f.parent and tmp.suffix == f.suffix and tmp != f
            raise RuntimeError
    assert f.read_text() == 'old' and list(tmp_path.iterdir()) == [f]
    with atomic(f) as tmp: tmp.write_text('new')
    assert f.read_text() == 'new' and list(tmp_path.iterdir()) == [f]
