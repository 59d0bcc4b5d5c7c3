"The loaders against torchvision, pycocotools and the original's own arrays; pairing, scaling and bad input."
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from torchvision.datasets import OxfordIIITPet, VOCSegmentation
from wsss_nb.data.blocks import Augment, mask_dls, resize, tags_dls
from wsss_nb.data.folder import folder
from wsss_nb.data.items import UNLABELLED, VOID, Dataset, InputError, Item, resize_mask
from wsss_nb.data.pets import held_out, pet_truth, pets, read_box_xml, read_trimap
from wsss_nb.data.sample import sample
from wsss_nb.data.voc import VOC_CLASSES, read_splits, voc

GOLDEN = Path(__file__).parent/'golden'
CATS = ['Abyssinian', 'Bengal', 'Birman', 'Bombay', 'British_Shorthair', 'Egyptian_Mau', 'Maine_Coon', 'Persian', 'Ragdoll', 'Russian_Blue', 'Siamese', 'Sphynx']
DOGS = ['american_bulldog', 'american_pit_bull_terrier', 'basset_hound', 'beagle', 'boxer', 'chihuahua', 'english_cocker_spaniel', 'english_setter',
        'german_shorthaired', 'great_pyrenees', 'havanese', 'japanese_chin', 'keeshond', 'leonberger', 'miniature_pinscher', 'newfoundland', 'pomeranian',
        'pug', 'saint_bernard', 'samoyed', 'scottish_terrier', 'shiba_inu', 'staffordshire_bull_terrier', 'wheaten_terrier', 'yorkshire_terrier']


@pytest.fixture(scope='module')
def root(): return sample(profile='smoke')


@pytest.fixture
def spoilt(root, tmp_path): return shutil.copytree(root, tmp_path/'sample')


def xml_text(objects, size=(60, 40)):
    "A VOC annotation: objects are (name, xmin, ymin, xmax, ymax), counted from 1."
    boxes = ''.join(f'<object><name>{n}</name><difficult>1</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>' for n, a, b, c, d in objects)
    return f'<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{boxes}</annotation>'


# --- pets

@pytest.mark.parametrize('split', ['trainval', 'test'])
def test_pets_equal_torchvision(root, tmp_path, split):
    (tmp_path/'oxford-iiit-pet').symlink_to(root/'pets')
    theirs = OxfordIIITPet(tmp_path, split, ('category', 'binary-category', 'segmentation'))
    breeds, species = pets(root/'pets'), pets(root/'pets', 2)
    view, masks = breeds.view('tags', split), breeds.view('masks', split)
    assert view.ids == [p.stem for p in theirs._images]
    if split == 'trainval': assert [c.replace('_', ' ').lower() for c in breeds.classes] == [c.lower() for c in theirs.classes]   # every breed is there
    for i, (image, (breed, kind, trimap)) in enumerate(theirs):
        assert view[i].tags == (breed + 1,) and species.view('tags', split)[i].tags == (kind + 1,)
        t = np.array(trimap)
        assert np.array_equal(masks.read_mask(masks[i]), np.select([t == 1, t == 2], [1, 0], VOID))


def test_pairing_survives_any_listing_order(root, monkeypatch):
    plain = pets(root/'pets').items
    listing = Path.iterdir
    monkeypatch.setattr(Path, 'iterdir', lambda self: iter(sorted(listing(self), key=lambda p: hash(p.name[::-1]))))
    shuffled = pets(root/'pets').items
    assert shuffled == plain
    assert all(i.image.stem == i.id and i.mask.stem == i.id for i in shuffled)


def test_hidden_and_unlisted_files_are_not_items(spoilt):
    n, p = len(pets(spoilt/'pets')), spoilt/'pets'
    trimap = next((p/'annotations/trimaps').glob('*.png'))
    (trimap.parent/f'._{trimap.name}').write_bytes(b'\0\5')
    shutil.copy(next((p/'images').glob('*.jpg')), p/'images/unlisted_1.jpg')
    assert len(pets(p)) == n


def test_original_arrays():
    g = np.load(GOLDEN/'pets_data.npz')
    assert np.array_equal(resize_mask(g['trimap'], (224, 224)) - 1, g['target_mask'])   # nearest, never bilinear
    assert np.array_equal(resize(g['trimap'], 224) - 1, g['target_mask'])
    order = sorted(CATS + DOGS, key=str.lower)                                           # the published breed ids
    assert [order.index(c) for c in sorted(CATS, key=str.lower)] == g['cat_ids'].tolist()


def test_original_splits_leak_and_ours_do_not(root):
    g = np.load(GOLDEN/'pets_data.npz')
    test, train = set(g['test_of_maps'].tolist()), set(g['train_of_classifier'].tolist())
    assert (len(test & train), len(test)) == (1192, 1470)       # images trained on and then measured on
    data = pets(root/'pets', 38, root/'background', background_test=.5)
    assert not set(data.splits['trainval']) & set(data.splits['test'])


def test_real_breed_order_from_lists(tmp_path):
    order = sorted(CATS + DOGS, key=str.lower)
    (tmp_path/'annotations').mkdir(); (tmp_path/'images').mkdir()
    for split, number in (('trainval', 1), ('test', 2)):
        (tmp_path/f'annotations/{split}.txt').write_text('\n'.join(f'{b}_{number} {k} {1 if b in CATS else 2} 1' for k, b in enumerate(order, 1)))
        for b in order: Image.new('RGB', (4, 3)).save(tmp_path/f'images/{b}_{number}.jpg')
    data, species = pets(tmp_path), pets(tmp_path, 'species')
    assert data.classes == tuple(order) and len(data.classes) == 37 and data.segment_of == (0, *[1] * 37)
    assert [t - 1 for t, b in enumerate(data.classes, 1) if species[f'{b}_1'].tags == (1,)] == np.load(GOLDEN/'pets_data.npz')['cat_ids'].tolist()


def test_background_is_background_and_uint8(root):
    data = pets(root/'pets', 3, root/'background')
    item = data.items[-1]
    truth = data.read_truth(item)
    assert item.tags == () and truth.dtype == np.uint8 and not truth.any()
    dls = tags_dls(data.view('tags', 'trainval'), size=16, bs=4)
    assert list(dls.vocab) == ['cat', 'dog', 'background']
    assert {int(y) for item, (_, y) in zip(dls.train_ds.items, dls.train_ds) if item.tags == ()} == {2}


def test_head_boxes_follow_the_image_size(spoilt):
    before = {i.id: i.boxes for i in pets(spoilt/'pets').items}
    for p in (spoilt/'pets/images').glob('*.jpg'):
        with Image.open(p) as im: im.resize((im.width * 2, im.height // 2)).save(p)
    for item in pets(spoilt/'pets').items:
        for a, b in zip(item.boxes or (), before[item.id] or ()):
            assert np.allclose([a.xmin, a.xmax], [2 * b.xmin, 2 * b.xmax]) and np.allclose([a.ymin, a.ymax], [b.ymin / 2, b.ymax / 2], atol=.5)
            assert a.label == item.tags[0]


def test_some_trimaps_may_be_missing(spoilt):
    gone = sorted((spoilt/'pets/annotations/trimaps').glob('*.png'))[::2]
    for p in gone: p.unlink()
    data = pets(spoilt/'pets')
    assert {i.id for i in data.items if i.mask is None} == {p.stem for p in gone}
    assert all(i.mask is not None for s in data.splits for i in data.view('masks', s).with_masks())


@pytest.mark.parametrize('spoil, says', [
    (lambda p: (p/'annotations/trainval.txt').unlink(), ('trainval.txt', 'Unpack annotations.tar.gz')),
    (lambda p: shutil.rmtree(p/'images'), ('images', 'listed images are missing', 'Unpack images.tar.gz')),
    (lambda p: (p/'annotations/test.txt').write_text('beagle_1\n'), ('test.txt', "'beagle_1'", 'A line is')),
    (lambda p: shutil.copy(p/'annotations/trainval.txt', p/'annotations/test.txt'), ('listed twice',)),
    (lambda p: next((p/'annotations/xmls').glob('*.xml')).write_text('<annotation>'), ('.xml', 'not a readable VOC annotation'))])
def test_missing_parts_of_pets_are_named(spoilt, spoil, says):
    spoil(spoilt/'pets')
    with pytest.raises(InputError) as e: pets(spoilt/'pets')
    assert all(s in str(e.value) for s in says)


def test_trimap_of_another_size_or_code(spoilt):
    data = pets(spoilt/'pets')
    one, two = data.items[:2]
    Image.fromarray(np.ones((5, 7), np.uint8)).save(one.mask)
    with pytest.raises(InputError, match='the mask is 7×5'): pet_truth(one)
    with Image.open(two.mask) as im: Image.fromarray(np.zeros_like(np.array(im))).save(two.mask)
    with pytest.raises(InputError, match='numbers 1 to 3'): read_trimap(two.mask)


def test_download_offline_says_how_to_go_on(tmp_path, monkeypatch):
    import fastai.data.external as external
    from wsss_nb.data.pets import download_pets
    def offline(*args, **kwargs): raise OSError('network is unreachable')
    monkeypatch.setattr(external, 'untar_data', offline)
    with pytest.raises(InputError) as e: download_pets(tmp_path)
    assert external.URLs.PETS in str(e.value) and 'unpack it so that' in str(e.value) and str(tmp_path) in str(e.value)


# --- VOC

@pytest.mark.parametrize('split', ['train', 'val', 'trainval'])
def test_voc_equals_torchvision(root, tmp_path, split):
    (tmp_path/'VOCdevkit').mkdir(); (tmp_path/'VOCdevkit/VOC2012').symlink_to(root/'voc/VOC2012')
    theirs = VOCSegmentation(tmp_path, '2012', split)
    masks = voc(tmp_path).view('masks', split)
    assert masks.ids == [Path(p).stem for p in theirs.images]
    for i, (image, mask) in enumerate(theirs):
        m = masks.read_mask(masks[i])
        assert m.shape == image.size[::-1] and np.array_equal(m, np.array(mask))


def test_voc_boxes_are_half_open_from_zero_and_difficult_counts(spoilt):
    p = spoilt/'voc/VOC2012'
    id = read_splits(p)['train'][0]
    with Image.open(p/f'JPEGImages/{id}.jpg') as im: size = im.size
    (p/f'Annotations/{id}.xml').write_text(xml_text([('person', 1, 1, 3, 2), ('cat', 2, 2, size[0], size[1])], size))
    item = voc(p)[id]
    assert item.tags == (VOC_CLASSES.index('cat') + 1, VOC_CLASSES.index('person') + 1) == (8, 15)
    a, b = item.boxes
    assert (a.xmin, a.ymin, a.xmax, a.ymax) == (0, 0, 3, 2) and (b.xmin, b.ymin, b.xmax, b.ymax) == (1, 1, *size) and a.difficult
    (p/f'Annotations/{id}.xml').unlink()
    assert voc(p)[id].tags is None


def test_voc_unknown_name_is_corrected(spoilt):
    p = spoilt/'voc/VOC2012'
    xml = p/f"Annotations/{read_splits(p)['train'][0]}.xml"
    xml.write_text(xml_text([('motorbikes', 1, 1, 3, 2)]))
    with pytest.raises(InputError, match="unknown class 'motorbikes'. Did you mean 'motorbike'"): voc(p)


def test_voc_lists_that_share_an_image(spoilt):
    p = spoilt/'voc/VOC2012'
    shared = read_splits(p)['val'][0]
    with open(p/'ImageSets/Segmentation/train.txt', 'a') as f: f.write(f'{shared}\n')
    with pytest.warns(UserWarning, match=shared): splits = read_splits(p)
    assert shared not in splits['train'] and shared in splits['val']


# --- a folder of one's own

@pytest.fixture
def own(tmp_path):
    (tmp_path/'photos').mkdir()
    for n, s in enumerate('abcdef'): Image.new('RGB', (60, 40), (40 * n, 90, 120)).save(tmp_path/f'photos/{s}.jpg')
    (tmp_path/'tags.csv').write_text('image,tags\n' + '\n'.join(f'{s}.jpg,{t}' for s, t in zip('abcdef', ['cat', 'dog', 'cat dog', '', 'dog', 'cat'])))
    return tmp_path


def test_own_folder(own):
    data = folder(own/'photos', own/'tags.csv', valid_fraction=1/3)
    assert data.classes == ('cat', 'dog') and not data.single_label
    assert [i.tags for i in data.items] == [(1,), (2,), (1, 2), (), (2,), (1,)]
    assert len(data.splits['valid']) == 2 and sorted(data.splits['valid'] + data.splits['train']) == data.splits['all']
    assert data.report['photos per class'] == {'cat': 3, 'dog': 3} and data.report['of no class'] == 1
    assert folder(own/'photos', own/'tags.csv', classes=('dog', 'cat'))['a'].tags == (2,)


def test_every_fault_is_told_at_once(own):
    (own/'tags.csv').write_text('image,tags\na.jpg,caat\nb,dog\nc,cat\nd,cat\nzebra.jpg,dog\n')      # e and f are missing
    (own/'photos/e.jpg').write_text('no image'); shutil.copy(own/'photos/b.jpg', own/'photos/b.jpeg')
    (own/'masks').mkdir()
    for s, m in {'c': np.ones((4, 6)), 'd': np.full((40, 60), 9), 'f': np.array([[0, 255]]).repeat(40, 0).repeat(30, 1)}.items():
        Image.fromarray(m.astype(np.uint8)).save(own/f'masks/{s}.png')
    with pytest.raises(InputError) as e: folder(own/'photos', own/'tags.csv', masks=own/'masks', classes=('cat', 'dog'))
    says = str(e.value)
    for s in ("Did you mean 'cat'", "no photo named 'zebra.jpg'", 'e.jpg: not a readable image', 'f.jpg: has no tags', 'has the same stem as b.jpeg',
              'c.png: the mask is 6×4', 'd.png: numbers [9] stand for no class', 'f.png: holds only 0 and 255'): assert s in says, s
    with pytest.raises(InputError): folder(own/'photos', own/'tags.csv', masks=own/'masks', classes=('cat', 'dog'), skip_bad=True)  # none is left


def test_bad_ones_can_be_left_out(own):
    (own/'photos/e.jpg').write_bytes((own/'photos/a.jpg').read_bytes()[:300])
    data = folder(own/'photos', own/'tags.csv', decode=True, skip_bad=True)
    assert [i.id for i in data.items] == list('abcdf') and 'e.jpg' in data.report['skipped']['e']


@pytest.mark.parametrize('text, says', [('', 'is empty'), ('image,tags\na\n', 'no second column'), (b'image,tags\na,\xe9\xff\n', 'not a text in UTF-8')])
def test_broken_csv(own, text, says):
    (own/'tags.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=says): folder(own/'photos', own/'tags.csv')


def test_own_boxes_as_xml(own):
    (own/'xml').mkdir()
    for s in 'ab': (own/f'xml/{s}.xml').write_text(xml_text([('cat', 1, 1, 60, 20)], (120, 40)))   # drawn on a photo twice as wide
    data = folder(own/'photos', boxes=own/'xml')
    box, = data['a'].boxes
    assert (box.xmin, box.ymin, box.xmax, box.ymax) == (0, 0, 30, 20) and data['a'].tags == (1,) and data['c'].tags is None
    assert read_box_xml(own/'xml/a.xml')[0] == (120, 40)


def test_coco_json_equals_pycocotools(own, capsys):
    from pycocotools.coco import COCO
    rng = np.random.default_rng(0)
    boxes = [dict(id=n, image_id=int(rng.integers(6)), category_id=int(rng.choice([3, 7, 90])), iscrowd=int(rng.integers(2)), area=1,
                  bbox=[float(v) for v in (*rng.integers(0, 20, 2), *rng.integers(1, 20, 2))]) for n in range(1, 20)]
    d = dict(images=[dict(id=n, file_name=f'somewhere/{s}.jpg', width=60, height=40) for n, s in enumerate('abcdef')], annotations=boxes,
             categories=[dict(id=90, name='zebra'), dict(id=3, name='car'), dict(id=7, name='train')])
    (own/'c.json').write_text(json.dumps(d))
    data, coco = folder(own/'photos', boxes=own/'c.json'), COCO(str(own/'c.json'))
    assert list(data.classes) == [c['name'] for c in coco.loadCats(sorted(coco.getCatIds()))] == ['car', 'train', 'zebra']
    ids = {c['name']: c['id'] for c in coco.dataset['categories']}
    for n, s in enumerate('abcdef'):
        theirs = [(a['category_id'], *a['bbox'], bool(a['iscrowd'])) for a in coco.loadAnns(coco.getAnnIds(imgIds=n))]
        ours = [(ids[data.classes[b.label - 1]], b.xmin, b.ymin, b.xmax - b.xmin, b.ymax - b.ymin, b.difficult) for b in data[s].boxes]
        assert sorted(ours) == sorted(theirs)
    (own/'c.json').write_text('{"images": []}')
    with pytest.raises(InputError, match='not a COCO detection file'): folder(own/'photos', boxes=own/'c.json')


# --- batches

@settings(max_examples=40, deadline=None)
@example(20, (20, 20), 1.25)
@given(st.integers(0, 10**6), st.tuples(st.integers(20, 90), st.integers(20, 90)), st.floats(.3, 1.3))
def test_image_and_mask_get_one_geometry(seed, size, least):
    from fastai.torch_core import TensorImage, TensorMask
    h, w = size
    y, x = np.mgrid[:h, :w]
    drawn = (((x - w * .4) / (w * .3))**2 + ((y - h * .55) / (h * .3))**2 < 1).astype(np.uint8)
    torch.manual_seed(seed)
    image, mask = Augment(scale=(least, 1.3), brightness=0, contrast=0)((TensorImage(torch.from_numpy(np.stack([drawn * 255] * 3))), TensorMask(torch.from_numpy(drawn))), split_idx=0)
    image, mask = image[0].numpy(), mask.numpy()
    k = np.ones((2 * int(np.ceil(1 / least)) + 1,) * 2)       # linear and nearest may differ by one pixel of the source
    inside, outside = cv2.erode(mask, k) > 0, cv2.dilate(mask, k) == 0
    rim = slice(len(k) // 2, -(len(k) // 2))     # at the frame that one pixel may lie outside the picture
    inside, outside, seen = inside[rim, rim], outside[rim, rim], image[rim, rim]
    assert (seen[inside] > 127).all() and (seen[outside] <= 127).all() and set(np.unique(mask)) <= {0, 1}


def test_flip_is_exact():
    from fastai.torch_core import TensorImage, TensorMask
    a = np.random.default_rng(0).integers(0, 255, (3, 20, 31), np.uint8)
    x, y = Augment(scale=(1, 1), flip=1, brightness=0, contrast=0)((TensorImage(torch.from_numpy(a)), TensorMask(torch.from_numpy(a[0]))), split_idx=0)
    assert np.array_equal(x.numpy(), a[..., ::-1]) and np.array_equal(y.numpy(), a[0, :, ::-1])


def test_masks_keep_their_numbers(root):
    data = pets(root/'pets')
    view = data.view('masks', 'trainval')
    for augment in (True, False):
        dls = mask_dls(view, view.read_mask, data.segment_classes, size=50, bs=4, augment=augment)
        for _, y in dls.train: assert set(y.unique().tolist()) <= {0, 1, VOID} and y.dtype == torch.int64
    dls = mask_dls(view, lambda i: np.where(view.read_mask(i) == VOID, UNLABELLED, view.read_mask(i)), data.segment_classes, size=50, bs=4, augment=False)
    assert VOID in dls.one_batch()[1].unique().tolist()


def test_class_index_is_the_tag_whatever_the_names(root):
    for classes in (2, 37):
        dls = tags_dls(pets(root/'pets', classes).view('tags', 'trainval'), size=16, bs=4)
        assert [int(y) + 1 for _, y in dls.train_ds] == [i.tags[0] for i in dls.train_ds.items]
    view = voc(root/'voc/VOC2012').view('tags', 'train')
    for item, (_, y) in zip(view, tags_dls(view, size=16, bs=4).train_ds): assert tuple(int(k) + 1 for k in y.nonzero()) == item.tags


def test_hostile_formats_reach_a_batch(tmp_path):
    a = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    rgb, exif = Image.fromarray(a), Image.Exif()
    exif[0x112] = 6                                                        # turn by 90 degrees
    for name, im, kw in (('palette.png', rgb.convert('P'), {}), ('rgba.png', rgb.convert('RGBA'), {}), ('grey.png', rgb.convert('L'), {}),
                         ('cmyk.jpg', rgb.convert('CMYK'), {}), ('turned.jpg', rgb, {'exif': exif}), ('deep.png', Image.fromarray(a[..., 0].astype(np.uint16) * 257), {})): im.save(tmp_path/name, **kw)
    items = [Item(p.stem, p, (1,)) for p in sorted(tmp_path.iterdir())]
    data = Dataset('odd', ('thing', 'other'), items, {'all': [i.id for i in items]}, single_label=True)
    x, y = tags_dls(data.view('tags', 'all'), size=24, bs=8).one_batch()
    assert x.shape == (6, 3, 24, 24) and torch.isfinite(x).all()
    turned = data['turned']
    view = data.view('tags', 'all').keep(lambda i: i.id == 'turned')
    assert mask_dls(view, lambda i: np.zeros((40, 30), np.uint8), ('thing', 'other'), size=24).one_batch()[1].shape == (1, 24, 24)   # upright: 40 high
    with pytest.raises(InputError, match='its label map is 40×30'): mask_dls(view, lambda i: np.zeros((30, 40), np.uint8), ('thing', 'other'), size=24).train_ds[0]
    assert turned.tags == (1,)


@given(st.lists(st.text('abc123', min_size=1), unique=True, min_size=1), st.floats(0, 1))
def test_held_out_does_not_look_at_the_order(ids, share):
    a = {ids[i] for i in held_out(ids, share)}
    assert a == {ids[::-1][i] for i in held_out(ids[::-1], share)} and len(a) == round(share * len(ids))
