"COCO: against pycocotools and the recorded table of classes; boxes, crowds, masks, what a view may see, and files that lie."
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from pycocotools import mask as rle
import drawn
from drawn import packed
from wsss_nb.data.coco import (COCO_ARCHIVES, CocoImage, CocoObject, class_numbers, coco, coco_mask, coco_masks, download_coco, grey_images, outline_of,
                               read_instances, run_lengths, voc_numbers)
from wsss_nb.data.folder import folder, read_coco
from wsss_nb.data.items import VOID, InputError
from wsss_nb.data.voc import VOC_CLASSES

GOLDEN = Path(__file__).parent/'golden'
# The published eighty: ids and names as instances_val2017.json has them.
PUBLISHED = dict(zip([*range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83), *range(84, 91)], (
    'person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,'
    'giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,'
    'wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,'
    'laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush').split(',')))
W, H = 60, 40
rectangle = partial(drawn.rectangle, (H, W))


def note(id, image, category, seg, box, crowd=0):
    return dict(id=id, image_id=image, category_id=category, segmentation=seg, bbox=box, iscrowd=crowd, area=box[2] * box[3])


def val_objects():
    runs = [int(n) for n in run_lengths(packed(rectangle(40, 0, 60, 40))['counts'])]
    return [note(1, 11, 18, [[5, 5, 25, 5, 25, 25, 5, 25]], [5, 5, 20, 20]), note(2, 11, 17, packed(rectangle(10, 10, 15, 15)), [10, 10, 5, 5]),
            note(3, 11, 1, {'size': [H, W], 'counts': runs}, [40, 0, 20, 40], 1), note(4, 12, 51, [[30.5, 3, 50.25, 9, 33, 30]], [30.5, 3, 19.75, 27]),
            note(5, 12, 1, [[-3, -2, 9, -2, 9, 12.5, -3, 12.5], [20, 20, 28, 20, 24, 33]], [-3, -2, 31, 35]), note(6, 12, 3, [], [7, 7, 0, 9])]


def write(path, splits, layout='{}2017', json_name='instances_{}2017', categories=PUBLISHED):
    "A COCO folder: split → (images as (id, file name), annotations)."
    (path/'annotations').mkdir(parents=True)
    for s, (images, annotations) in splits.items():
        d = path/layout.format(s)
        d.mkdir(parents=True)
        for k, (_, name) in enumerate(images): Image.new('RGB', (W, H), (40 * k, 90, 200)).save(d/name)
        content = dict(images=[dict(id=i, file_name=n, width=W, height=H) for i, n in images], annotations=annotations,
                       categories=[dict(id=k, name=v) for k, v in sorted(categories.items(), reverse=True)])
        (path/f'annotations/{json_name.format(s)}.json').write_text(json.dumps(content))
    return path


SPLITS = {'train': ([(1, '000000000001.jpg')], [note(1, 1, 90, [[1, 1, 9, 1, 9, 9]], [1, 1, 8, 8])]),
          'val': ([(11, '000000000011.jpg'), (12, '000000000012.jpg'), (13, '000000000013.jpg')], val_objects())}


@pytest.fixture(scope='module')
def published(tmp_path_factory): return write(tmp_path_factory.mktemp('coco')/'COCO', SPLITS)


@pytest.fixture
def spoil(tmp_path):
    "Function that changes val's JSON and returns the folder."
    def change(f):
        path = tmp_path/'COCO'
        if not path.exists(): write(path, SPLITS)
        p = path/'annotations/instances_val2017.json'
        d = json.loads(p.read_text())
        d = f(d) or d
        p.write_text(d if isinstance(d, str) else json.dumps(d))
        return path
    return change


# --- classes

def test_the_published_ids_become_1_to_80():
    names, number = class_numbers(dict(sorted(PUBLISHED.items())))
    assert len(PUBLISHED) == 80 and sorted(number.values()) == [*range(1, 81)] and number[1] == 1 and number[13] == 12 and number[90] == 80
    assert names[number[72] - 1] == 'tv' and all(names[n - 1] == PUBLISHED[k] for k, n in number.items())


def test_voc_pairs_are_the_recorded_ones():
    golden = {int(k): v for k, (_, v) in json.loads((GOLDEN/'bana_coco_to_voc.json').read_text()).items() if v}
    names, number = class_numbers(PUBLISHED, 'voc')
    assert number == golden and names == VOC_CLASSES and sorted(number.values()) == [*range(1, 21)]
    dense, of = class_numbers(PUBLISHED)
    voc_of = voc_numbers(dense)
    assert len(voc_of) == 81 and {k: voc_of[n] for k, n in of.items() if voc_of[n]} == golden


def test_classes_by_name(published):
    data = coco(published, ('dog', 'cat'))
    assert data.classes == ('dog', 'cat') and data['000000000011'].tags == (1, 2) and data.category_of == {1: 18, 2: 17}
    with pytest.raises(InputError, match="Did you mean 'dog'"): coco(published, ('dgo',))
    with pytest.raises(ValueError, match='neither'): coco(published, 'pascal')
    with pytest.raises(InputError, match="VOC's classes"): class_numbers({1: 'zebra'}, 'voc')


# --- boxes and tags

def test_boxes_and_tags(published):
    data = coco(published)
    a, b, c = (data[i] for i in data.split('val'))
    numbers = class_numbers(dict(sorted(PUBLISHED.items())))[1]
    assert [(x.label, x.xmin, x.ymin, x.xmax, x.ymax, x.difficult) for x in a.boxes] == [(numbers[18], 5, 5, 25, 25, False), (numbers[17], 10, 10, 15, 15, False)]
    assert a.tags == (numbers[1], numbers[17], numbers[18])         # the crowd is a tag, not a box
    assert [(x.label, x.xmin, x.ymin, x.xmax, x.ymax) for x in b.boxes] == [(numbers[51], 30.5, 3, 50.25, 30), (numbers[1], 0, 0, 28, 33)]      # cut; the empty one is none
    assert (c.tags, c.boxes) == ((), ())
    assert data.report['crowds'] == 1 and data.report['of no class'] == 1 and data.splits['train'] == ['000000000001']
    crowd = coco(published, crowds=True)[a.id].boxes[-1]
    assert (crowd.label, crowd.xmin, crowd.xmax, crowd.difficult) == (1, 40, 60, True)


def test_other_categories_are_left_out(published):
    data = coco(published, 'voc')
    assert [b.label for b in data['000000000012'].boxes] == [15] and data['000000000012'].tags[0] == 7 and data['000000000001'].tags == ()


def test_boxes_follow_the_photo(published, tmp_path):
    shutil.copytree(published, tmp_path/'c')
    Image.new('RGB', (W // 2, H // 2)).save(tmp_path/'c/val2017/000000000011.jpg')
    data = coco(tmp_path/'c')
    assert [(b.xmin, b.xmax) for b in data['000000000011'].boxes] == [(2.5, 12.5), (5, 7.5)]
    assert np.array_equal(data.read_truth(data['000000000011'])[2, :20], coco(published).read_truth(coco(published)['000000000011'])[5, 1:40:2])


@pytest.mark.parametrize('layout, name', [('{}2017', 'instances_{}2017'), ('images/{}', 'instances_{}'), ('{}', 'instances_{}'), ('images/{}2017', 'instances_{}2017')])
def test_layouts(tmp_path, layout, name):
    data = coco(write(tmp_path/'c', SPLITS, layout, name), splits=('val', 'train'))
    assert {k: len(v) for k, v in data.splits.items()} == {'train': 1, 'val': 3} and data['000000000001'].image.is_file()


# --- masks

def by_pycocotools(published, image, number, others=0):
    "Void things first, then from large to small, each mask by COCO.annToMask."
    from pycocotools.coco import COCO
    api = COCO(str(published/'annotations/instances_val2017.json'))
    anns = [(a, api.annToMask(a)) for a in api.loadAnns(api.getAnnIds(imgIds=image)) if a['segmentation']]
    value = lambda a: VOID if a['iscrowd'] and a['category_id'] in number else number.get(a['category_id'], others)
    m = np.zeros((H, W), np.uint8)
    for a, b in sorted(anns, key=lambda ab: (value(ab[0]) != VOID, -int(ab[1].sum()))):
        if value(a): m[b == 1] = value(a)
    return m


@pytest.mark.parametrize('classes', ['coco', 'voc'])
@pytest.mark.parametrize('others', [0, VOID])
def test_masks_equal_pycocotools(published, classes, others, capsys):
    data, (_, number) = coco(published, classes, others=others), class_numbers(dict(sorted(PUBLISHED.items())), classes)
    d = json.loads((published/'annotations/instances_val2017.json').read_text())
    for n in (11, 12):
        ours, theirs = data.read_truth(data[f'{n:012}']), by_pycocotools(published, n, number, others)
        if n == 12: ours[7:16, 7], theirs[7:16, 7] = 0, 0      # the object without outline
        assert np.array_equal(ours, theirs), [a['id'] for a in d['annotations'] if a['image_id'] == n]
    assert not data.read_truth(data['000000000013']).any()


def test_what_a_mask_shows(published):
    m = coco(published, 'voc').read_truth(coco(published, 'voc')['000000000011'])
    assert m[12, 12] == 8 and m[20, 20] == 12 and m[20, 50] == VOID and m[0, 0] == 0      # the cat lies on the dog; a crowd is void
    assert coco(published, 'voc', crowds=True).read_truth(coco(published, 'voc')['000000000011'])[20, 50] == 15


def test_an_object_without_outline_is_void():
    m = coco_mask(CocoImage('a', 1, (W, H), [CocoObject(1, 3, (5., 6., 9., 100.), False, None, None)]), {3: 2})
    assert (m == VOID).sum() == 4 * (H - 6) and set(np.unique(m)) == {0, VOID}


def test_views_see_no_masks(published, tmp_path):
    "Nor do they need the file any more."
    shutil.copytree(published, tmp_path/'c')
    data = coco(tmp_path/'c')
    shutil.rmtree(tmp_path/'c/annotations')
    for supervision in ('tags', 'boxes', 'points', 'scribbles'):
        view = data.view(supervision, 'val')
        assert all(o.mask is None for o in view) and (view[0].boxes is None) == (supervision != 'boxes')
        with pytest.raises(PermissionError): view.read_mask(view[0])
        with pytest.raises(PermissionError): data.read_truth(view[0])
    assert data.view('masks', 'val').read_mask(data.view('masks', 'val')[0]).any()


def test_masks_as_files(published, tmp_path):
    data, out = coco(published, 'voc'), tmp_path/'masks'
    assert coco_masks(data, out, workers=1) == [] and sorted(p.stem for p in out.iterdir()) == sorted(i.id for i in data.items)
    stamp = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    os.remove(out/'000000000011.png')
    assert coco_masks(data, out, workers=1) == [] and all(p.stat().st_mtime_ns == t for p, t in stamp.items() if p.stem != '000000000011')
    again = coco(published, 'voc', masks=out)
    for i in data.items: assert np.array_equal(again.read_truth(again[i.id]), data.read_truth(i))
    with pytest.raises(ValueError, match='mask files already'): coco_masks(again, out)


# --- run lengths

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.floats(0, 1))
def test_run_lengths_are_those_of_pycocotools(h, w, seed, share):
    m = (np.random.default_rng(seed).random((h, w)) < share).astype(np.uint8)
    runs = run_lengths(packed(m)['counts'])
    assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs).reshape(w, h).T, m)
    assert outline_of({'size': [h, w], 'counts': runs.tolist()}, (w, h)) == {**packed(m), 'counts': packed(m)['counts'].encode()}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_run_lengths_never_reach_pycocotools(data):
    "Whatever passes the check decodes; whatever does not is a ValueError."
    whole = packed((np.random.default_rng(data.draw(st.integers(0, 99))).random((9, 7)) < .5))['counts']
    s = list(whole)
    for _ in range(data.draw(st.integers(1, 3))): s[data.draw(st.integers(0, len(s) - 1))] = chr(data.draw(st.integers(40, 120)))
    seg = {'size': [9, 7], 'counts': ''.join(s)[:data.draw(st.integers(0, len(s)))]}
    try: code = outline_of(seg, (7, 9))
    except ValueError: return
    assert rle.decode(code).shape == (9, 7)


# --- files that lie

@pytest.mark.parametrize('change, says', [
    (dict(bbox=[1, 2, -3, 4]), 'ends before it begins'), (dict(bbox=[1, 2, 3]), 'not four numbers'), (dict(bbox='abcd'), 'not four numbers'),
    (dict(bbox=[1, 2, '3', 4]), 'not four numbers'), (dict(bbox=[1, 2, float('nan'), 4]), 'not four numbers'), (dict(bbox=[1, 2, float('inf'), 4]), 'not four numbers'),
    (dict(bbox=[True, 2, 3, 4]), 'not four numbers'), (dict(bbox=[10**400, 2, 3, 4]), 'not four numbers'), (dict(bbox=None), 'not four numbers'),
    (dict(bbox=[61, 2, 3, 4]), 'outside the image of 60×40'), (dict(bbox=[1, -9, 3, 4]), 'outside the image'),
    (dict(category_id=12), 'none of the categories'), (dict(category_id='1'), 'none of the categories'), (dict(category_id=[1]), 'none of the categories'),
    (dict(category_id=True), 'none of the categories'), (dict(image_id=99), 'none of the images'), (dict(image_id=[11]), 'none of the images'),
    (dict(iscrowd='yes'), 'not 0 or 1'), (dict(area=-1), 'no area'), (dict(area='big'), 'no area'),
    (dict(segmentation=5), 'neither polygons nor run lengths'), (dict(segmentation=[5]), 'not a list x, y'), (dict(segmentation=[[1, 2, 3]]), 'not a list x, y'),
    (dict(segmentation=[[1, 2, 3, None, 5, 6]]), 'not a list x, y'), (dict(segmentation=[['1', '2', '3', '4', '5', '6']]), 'not a list x, y'),
    (dict(segmentation=[[[1, 2], [3]]]), ''), (dict(segmentation=[[0, 0, 1e30, 0, 5, 5]]), 'far outside'), (dict(segmentation=[[0, 0, float('nan'), 0, 5, 5]]), 'far outside'),
    (dict(segmentation={'size': [10**9, 10**9], 'counts': '0'}), 'the image has'), (dict(segmentation={'size': [H, W], 'counts': 'ooo'}), 'damaged'),
    (dict(segmentation={'size': [H, W], 'counts': '0'}), 'do not add up'), (dict(segmentation={'size': [H, W], 'counts': [-1, 2401]}), 'do not add up'),
    (dict(segmentation={'size': [H, W], 'counts': [9]}), 'do not add up'), (dict(segmentation={'size': [H, W], 'counts': [2**62] * 4}), 'do not add up'),
    (dict(segmentation={'size': [H, W], 'counts': None}), 'do not add up'), (dict(segmentation={'size': [H, W], 'counts': '9é'}), ''), (dict(segmentation={'counts': '0'}), 'the image has')])
def test_a_bad_annotation_is_named(spoil, change, says):
    path = spoil(lambda d: d['annotations'][1].update(change))
    with pytest.raises(InputError) as e: coco(path)
    assert 'instances_val2017.json, annotation 2' in str(e.value) and says in str(e.value)
    data = coco(path, skip_bad=True)
    gone = [] if 'image_id' in change else ['000000000011']
    assert sorted(i.id for i in data.items) == sorted({'000000000001', '000000000011', '000000000012', '000000000013'} - {*gone})
    assert 'annotation 2' in data.report['skipped'][gone[0] if gone else '']


@pytest.mark.parametrize('change, says', [
    (lambda d: '{"images": [', 'not a COCO detection file'), (lambda d: '[' * 200000, 'not a COCO detection file'), (lambda d: '[]', 'not a COCO detection file'),
    (lambda d: '{"a": ' + '9' * 5000 + '}', 'not a COCO detection file'), (lambda d: '\0', 'not a COCO detection file'),
    (lambda d: d.pop('annotations') and None, 'not a COCO detection file'), (lambda d: d.update(images={}), 'not a COCO detection file'), (lambda d: d.update(annotations=[1]), 'not a COCO detection file'),
    (lambda d: d['categories'][0].pop('id') and None, 'no id or no name'), (lambda d: d['categories'][0].update(name=3), 'no id or no name'),
    (lambda d: d['categories'][0].update(id=1), 'one id or one name'), (lambda d: d['categories'][0].update(name='person'), 'one id or one name'),
    (lambda d: d['categories'][0].update(name='unicorn'), 'its categories are not those of'),
    (lambda d: d['images'][0].update(id=12), 'has the id of another'), (lambda d: d['images'][0].update(id='11'), 'no whole number'),
    (lambda d: d['images'][0].update(file_name=d['images'][1]['file_name']), 'has the file name of another'), (lambda d: d['images'][0].update(file_name=None), 'no file_name'),
    (lambda d: d['images'][0].update(width=0), 'has the size'), (lambda d: d['images'][0].update(height=10**9), 'has the size'), (lambda d: d['images'][0].update(height='40'), 'has the size'),
    (lambda d: d['images'][0].update(height=float('nan')), 'has the size'), (lambda d: d['annotations'][0].update(id=2), 'annotation 2: has no id of its own'),
    (lambda d: d['annotations'][0].update(id=[1]), 'no id of its own')])
def test_a_bad_frame_is_named(spoil, change, says):
    with pytest.raises(InputError, match='instances_val2017.json') as e: coco(spoil(change))
    assert says in str(e.value)


def test_all_faults_at_once(spoil):
    def change(d):
        for a in d['annotations'][:4]: a['bbox'] = [9, 9, -1, 1]
    path = spoil(change)
    with pytest.raises(InputError, match='4 problems') as e: coco(path)
    assert all(f'annotation {n}: ' in str(e.value) for n in range(1, 5))
    with pytest.raises(InputError, match='annotation 1: ') as e: read_instances(path/'annotations/instances_val2017.json')
    assert 'annotation 2' not in str(e.value)


def test_a_name_that_leaves_the_folder_opens_nothing(spoil):
    path = spoil(lambda d: d['images'][0].update(file_name='../../../etc/passwd'))
    with pytest.raises(InputError, match='listed images are missing, such as passwd'): coco(path)


def test_an_endless_outline_is_not_drawn(spoil):
    "Forty thousand corners from edge to edge would take pycocotools gigabytes on a large image."
    def change(d):
        d['images'][0].update(width=2000, height=2000)
        d['annotations'][0]['segmentation'] = [[v for n in range(4000) for v in (0, n % 2000, 1999, n % 2000)]]
        d['annotations'] = d['annotations'][:1]
    data = coco(spoil(change))
    with pytest.raises(InputError, match='annotation 1: its outline is too long'): data.read_truth(data['000000000011'])
    bad = coco_masks(data, data.files['val'].path.parent/'masks', workers=1)
    assert [i for i, _ in bad] == ['000000000011']      # the others are written


def test_small_polygons_have_no_area(spoil):
    "pycocotools takes four numbers for a box; here they are two corners."
    data = coco(spoil(lambda d: d['annotations'][0].update(segmentation=[[5, 5, 20, 20], [6, 6, 9, 6, 9, 9, 6, 9], []])))
    assert (data.read_truth(data['000000000011'])[:, :30] == class_numbers(dict(sorted(PUBLISHED.items())))[1][18]).sum() == 9


def test_missing_parts(published, tmp_path):
    path = tmp_path/'c'
    shutil.copytree(published, path)
    os.remove(path/'val2017/000000000012.jpg')
    with pytest.raises(InputError, match='1 of 3 listed images are missing, such as 000000000012'): coco(path)
    assert coco(path, skip_bad=True).report['missing'] == ['000000000012']
    (path/'val2017/000000000011.jpg').write_text('no image')
    assert [*coco(path, skip_bad=True).report['skipped']] == ['000000000011']
    shutil.rmtree(path/'train2017')
    with pytest.warns(UserWarning, match='images of train are not there'): assert [*coco(path, skip_bad=True).splits] == ['val']
    with pytest.raises(InputError, match='train2017: no such folder of images'): coco(path, splits=('train',))
    with pytest.raises(InputError, match="no file of the split 'test'"): coco(path, splits=('test',))
    for p in (tmp_path, tmp_path/'nowhere'):
        with pytest.raises(InputError, match='annotations_trainval2017.zip'): coco(p)


def test_an_image_of_two_splits_is_kept_for_val(tmp_path):
    both = {'train': (SPLITS['train'][0] + [(11, '000000000011.jpg')], SPLITS['train'][1]), 'val': SPLITS['val']}
    with pytest.warns(UserWarning, match='1 images are in another split too, such as 000000000011'): data = coco(write(tmp_path/'c', both))
    assert data.splits['train'] == ['000000000001'] and len(data['000000000011'].boxes) == 2


def test_grey_photographs_are_named(published, tmp_path):
    shutil.copytree(published, tmp_path/'c')
    p = tmp_path/'c/val2017/000000000012.jpg'
    Image.open(p).convert('L').save(p)
    assert grey_images(coco(tmp_path/'c').items) == ['000000000012']


def test_ten_thousand_boxes_in_an_image(spoil):
    path = spoil(lambda d: d.update(annotations=[note(n, 12, 1, [], [n % 50, n % 30, 5, 5]) for n in range(1, 10001)]))
    assert len(coco(path)['000000000012'].boxes) == 10000


# --- one's own folder reads the same files

def test_own_folder_names_file_and_annotation(published, tmp_path, spoil):
    path = spoil(lambda d: d['annotations'][0].update(bbox=[5, 5, -1, 3]))
    with pytest.raises(InputError, match='instances_val2017.json, annotation 1: the box .* ends before'): folder(path/'val2017', boxes=path/'annotations/instances_val2017.json')
    data = folder(path/'val2017', boxes=path/'annotations/instances_val2017.json', skip_bad=True)
    assert '000000000011' in data.report['skipped'] and len(data) == 2
    names, boxes = read_coco(published/'annotations/instances_val2017.json')
    assert names == [PUBLISHED[k] for k in sorted(PUBLISHED)] and boxes['000000000012'] == ((W, H), [(PUBLISHED[51], 30.5, 3, 50.25, 30, False), ('person', -3, -2, 28, 33, False)])


def test_offline_says_what_to_fetch(tmp_path, monkeypatch):
    import urllib.request
    def refuse(*args, **kwargs): raise OSError('network is unreachable')
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    with pytest.raises(InputError) as e: download_coco(tmp_path/'new')
    url, md5 = COCO_ARCHIVES['annotations']
    assert all(s in str(e.value) for s in (url, md5, 'network is unreachable', str(tmp_path/'new/annotations_trainval2017.zip')))


def test_the_command_says_what_is_there(spoil, capsys):
    from wsss_nb.study.cli import main
    path = spoil(lambda d: None)
    assert main(['data', 'coco', str(path)]) == 0 and 'splits train 1, val 3' in (said := capsys.readouterr().out) and '5 boxes, 1 crowds, 0 images missing' in said
    os.remove(path/'val2017/000000000013.jpg')
    spoil(lambda d: d['annotations'][0].update(bbox=[5, 5, -1, 3]))
    assert main(['data', 'coco', str(path)]) == 1
    said = capsys.readouterr()
    assert '1 images missing' in said.out and 'annotation 1: the box' in said.err


@pytest.mark.skipif('WSSS_COCO' not in os.environ, reason='WSSS_COCO names no folder with COCO')
def test_a_real_folder(capsys):
    from pycocotools.coco import COCO
    data = coco(os.environ['WSSS_COCO'], splits=('val',))
    assert len(data.classes) == 80 and data.report['missing'] == []
    api = COCO(str(data.files['val'].path))
    for i in data.items[:50]:
        theirs = np.zeros(data.read_truth(i).shape, bool)
        for a in api.loadAnns(api.getAnnIds(imgIds=data.files['val'].images[i.id].number)): theirs |= api.annToMask(a) == 1
        assert np.array_equal(data.read_truth(i) > 0, theirs)
