"Objects from label maps and their average precision: against pycocotools used by hand, and cases counted by hand."
import io
import json
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
import drawn
from drawn import packed
from wsss_nb.data.coco import coco, read_instances
from wsss_nb.data.items import Box, InputError
from wsss_nb.evaluate.instances import AP_NAMES, box_rles, instance_ap, instance_results, read_results, write_results

W, H = 160, 120
rectangle = partial(drawn.rectangle, (H, W))


def random_box(rng):
    w, h = rng.integers(4, 150), rng.integers(4, 118)
    x, y = rng.integers(0, W - w), rng.integers(0, H - h)
    return int(x), int(y), int(min(x + w, W)), int(min(y + h, H))


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    "A COCO folder of random boxes of three categories, some crowds, and shifted results with scores."
    path, rng = tmp_path_factory.mktemp('coco'), np.random.default_rng(0)
    (path/'annotations').mkdir(), (path/'val').mkdir()
    annotations, results = [], []
    for n in range(1, 13):
        Image.new('RGB', (W, H)).save(path/f'val/{n:03}.png')
        for _ in range(rng.integers(0, 5)):
            x0, y0, x1, y1 = random_box(rng)
            c, m = int(rng.choice([3, 7, 40])), rectangle(x0, y0, x1, y1)
            annotations.append(dict(id=len(annotations) + 1, image_id=n, category_id=c, iscrowd=int(rng.random() < .2), area=float(m.sum()) * .9, bbox=[x0, y0, x1 - x0, y1 - y0],
                                    segmentation=packed(m) if len(annotations) % 2 else [[x0, y0, x1, y0, x1, y1, x0, y1]]))
            for _ in range(rng.integers(0, 3)):
                dx, dy = rng.integers(-6, 7, 2)
                m = np.roll(m, (dy, dx), (0, 1)) if rng.random() < .8 else rectangle(*random_box(rng))
                results.append(dict(image_id=n, category_id=c if rng.random() < .9 else 7, segmentation=packed(m), score=float(rng.random())))
    d = dict(images=[dict(id=n, file_name=f'{n:03}.png', width=W, height=H) for n in range(1, 13)], annotations=annotations,
             categories=[dict(id=k, name=v) for k, v in ((3, 'car'), (7, 'train'), (40, 'ball'), (41, 'never'))])
    (path/'annotations/instances_val.json').write_text(json.dumps(d))
    return path, results


def by_hand(path, results, **params):
    with redirect_stdout(io.StringIO()):
        gt = COCO(str(path/'annotations/instances_val.json'))
        e = COCOeval(gt, gt.loadRes(json.loads(json.dumps(results))), 'segm')
        for k, v in params.items(): setattr(e.params, k, v)
        e.evaluate(), e.accumulate(), e.summarize()
    return e


def values(e): return [v if v >= 0 else np.nan for v in e.stats[:6]]


def equal(ours, e): return np.array_equal([*ours.values.values()], values(e), equal_nan=True)


def test_ap_is_that_of_pycocotools(scenes):
    path, results = scenes
    ours, theirs = instance_ap(results, path/'annotations/instances_val.json'), by_hand(path, results)
    assert len(results) > 20 and 0 < ours.values['AP'] < 1
    assert [*ours.values] == [*AP_NAMES] and equal(ours, theirs)
    for k, c in enumerate(theirs.params.catIds):
        p = theirs.eval['precision'][:, :, k, 0, -1]
        name = theirs.cocoGt.cats[c]['name']
        assert np.isnan(ours.classes[name]) if name == 'never' else ours.classes[name] == p[p > -1].mean()
    assert ours.images == 12 and ours.results == len(results) and ours.per_class()['class'].tolist() == sorted((k for k in ours.classes if k != 'never'), key=lambda k: -ours.classes[k])


def test_a_part_of_images_and_categories(scenes):
    path, results = scenes
    f = read_instances(path/'annotations/instances_val.json')
    ours = instance_ap(results, f, categories=[7, 40], ids=['001', '002', '005', '009'])
    assert equal(ours, by_hand(path, results, imgIds=[1, 2, 5, 9], catIds=[7, 40]))
    assert ours.images == 4 and [*ours.classes] == ['train', 'ball']
    with pytest.raises(InputError, match='nobody'): instance_ap(results, f, ids=['nobody'])


def test_equal_scores_have_one_order(scenes):
    path, results = scenes
    tied = [r | {'score': 1.} for r in results]
    first = instance_ap(tied, path/'annotations/instances_val.json').values
    for seed in range(4):
        assert instance_ap([tied[k] for k in np.random.default_rng(seed).permutation(len(tied))], path/'annotations/instances_val.json').values == first
    reverse = by_hand(path, tied[::-1]).stats[0], by_hand(path, tied).stats[0]
    assert reverse[0] != reverse[1]       # which is why they are sorted


def test_it_is_quiet(scenes, capsys):
    instance_ap(scenes[1], scenes[0]/'annotations/instances_val.json')
    assert capsys.readouterr().out == ''


def test_nothing_found_and_nothing_to_find(scenes, tmp_path):
    path, results = scenes
    f = read_instances(path/'annotations/instances_val.json')
    assert instance_ap([], f).values == dict.fromkeys(AP_NAMES, 0)
    assert all(np.isnan(v) for v in instance_ap(results, f, categories=[41]).values.values())
    assert 'AP nan' in repr(instance_ap([], f, categories=[41]))


# --- by hand

def one_image(tmp_path, objects, first=1):
    "An instances JSON of one image; objects as (mask, crowd)."
    notes = [dict(id=first + n, image_id=5, category_id=1, bbox=[0, 0, 9, 9], iscrowd=c, area=float(m.sum()), segmentation=packed(m)) for n, (m, c) in enumerate(objects)]
    p = tmp_path/'t.json'
    p.write_text(json.dumps(dict(images=[dict(id=5, file_name='a.jpg', width=W, height=H)], annotations=notes, categories=[dict(id=1, name='thing')])))
    return p


def found(*masks, scores=None): return [dict(image_id=5, category_id=1, segmentation=packed(m), score=s) for m, s in zip(masks, scores or [1.] * len(masks))]


def test_counted_by_hand(tmp_path):
    p = one_image(tmp_path, [(rectangle(0, 0, 10, 10), 0), (rectangle(50, 0, 90, 40), 0)])
    good, third = rectangle(0, 0, 10, 10), rectangle(50, 0, 90, 32)       # IoU 1 and .8
    both = instance_ap(found(good, third), p).values
    # up to .80 (its own threshold included) both are hits: precision 1 up to recall 1. Above: the larger comes first and misses: 1/2 up to recall 1/2.
    assert both['AP50'] == both['AP75'] == pytest.approx(1) and both['AP'] == pytest.approx((7 * 1 + 3 * .5 * 51 / 101) / 10)
    assert both['APS'] == pytest.approx(1) and both['APM'] == pytest.approx(.7) and np.isnan(both['APL'])
    assert instance_ap(found(good, third, scores=[1., .5]), p).values['AP'] == pytest.approx((7 * 1 + 3 * 51 / 101) / 10)      # a ranking helps
    assert instance_ap(found(third, third, good, scores=[1., .9, .8]), p).values['AP50'] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)      # found twice is once wrong


def test_crowds_cost_nothing(tmp_path):
    p = one_image(tmp_path, [(rectangle(0, 0, 10, 10), 0), (rectangle(50, 0, 150, 100), 1)])
    inside, half_out, outside = rectangle(60, 10, 80, 30), rectangle(40, 0, 56, 20), rectangle(0, 60, 20, 80)
    assert instance_ap(found(inside, rectangle(0, 0, 10, 10)), p).values['AP'] == pytest.approx(1)
    assert instance_ap(found(outside, rectangle(0, 0, 10, 10)), p).values['AP'] == pytest.approx(.5)
    assert instance_ap(found(half_out, rectangle(0, 0, 10, 10)), p).values['AP'] == pytest.approx(.5)    # three eighths of it lie in the crowd
    assert instance_ap([], p).objects == 1


def test_an_annotation_of_id_0_counts(tmp_path):
    p = one_image(tmp_path, [(rectangle(0, 0, 10, 10), 0)], first=0)
    right = found(rectangle(0, 0, 10, 10))
    assert instance_ap(right, p).values['AP'] == pytest.approx(1)
    (tmp_path/'annotations').mkdir(), p.rename(tmp_path/'annotations/instances_val.json')
    assert by_hand(tmp_path, right).stats[0] == 0       # pycocotools reads 0 as no match


# --- objects from label maps

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_an_object_is_its_class_within_its_box(seed):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 30, 2)
    label = rng.choice([0, 1, 2, 255], (h, w)).astype(np.uint8)
    boxes = [Box(int(rng.integers(1, 4)), *np.sort(rng.uniform(-3, w + 3, 2))[[0]], *np.sort(rng.uniform(-3, h + 3, 2))[[0]], *rng.uniform(0, [w + 3, h + 3])) for _ in range(5)]
    for b, code in zip(boxes, box_rles(label, boxes), strict=True):
        expected = np.array([[label[y, x] == b.label and b.xmin <= x + .5 < b.xmax and b.ymin <= y + .5 < b.ymax for x in range(w)] for y in range(h)])
        assert not expected.any() if code is None else np.array_equal(rle.decode(code), expected)


def scene_labels(data):
    "Label maps of filled boxes."
    out = {}
    for i in data.view('boxes', 'val'):
        out[i.id] = np.zeros((H, W), np.uint8)
        for b in i.boxes: out[i.id][int(b.ymin):int(b.ymax), int(b.xmin):int(b.xmax)] = b.label
    return out


def test_results_carry_the_numbers_of_the_file(scenes, tmp_path):
    data = coco(scenes[0])
    labels = scene_labels(data)
    results = instance_results(labels, data, 'val')
    raw = {(a['image_id'], a['category_id']) for a in json.loads(data.files['val'].path.read_text())['annotations'] if not a['iscrowd']}
    assert {(r['image_id'], r['category_id']) for r in results} <= raw and len(results) <= data.report['boxes'] and {r['score'] for r in results} == {1.}
    write_results(tmp_path/'r.json', results)
    assert json.loads((tmp_path/'r.json').read_text()) == results and [*tmp_path.iterdir()] == [tmp_path/'r.json']
    ranked = sorted(results, key=lambda r: -int(rle.area(r['segmentation'])))
    assert equal(instance_ap(tmp_path/'r.json', data.files['val']), by_hand(scenes[0], ranked))
    crowded = coco(scenes[0], crowds=True)
    assert instance_results(labels, crowded, 'val') == results      # crowds give no result
    assert instance_ap(results, data.files['val']).values['AP50'] > .5


def test_labels_that_do_not_fit(scenes):
    data = coco(scenes[0])
    labels = scene_labels(data)
    with pytest.raises(InputError, match='no label map of 003'): instance_results({k: v for k, v in labels.items() if k != '003'}, data, 'val')
    with pytest.raises(InputError, match='003.png: its label map is 9×9, the image in instances_val.json 160×120'): instance_results(labels | {'003': np.zeros((9, 9), np.uint8)}, data, 'val')


# --- files that lie

@pytest.mark.parametrize('change, says', [
    (dict(image_id=99), 'image_id is none'), (dict(image_id='1'), 'image_id is none'), (dict(image_id=[1]), 'image_id is none'), (dict(category_id=99), 'category_id is none'),
    (dict(category_id={}), 'category_id is none'), (dict(score=None), 'score'), (dict(score=float('nan')), 'score'), (dict(score='1'), 'score'), (dict(score=True), 'score'),
    (dict(segmentation=None), 'no run-length code'), (dict(segmentation=[[1, 2, 3, 4, 5, 6]]), 'no run-length code'), (dict(segmentation={}), 'the image has'),
    (dict(segmentation={'size': [H, W], 'counts': 'o'}), 'damaged'), (dict(segmentation={'size': [H, W + 1], 'counts': '0'}), 'the image has'),
    (dict(segmentation={'size': [H, W], 'counts': [5]}), 'do not add up'), (dict(segmentation={'size': [H, W], 'counts': b'\xff'}), '')])
def test_a_bad_result_is_named(scenes, tmp_path, change, says):
    path, results = scenes
    bad = [*results[:3], results[3] | change, *results[4:]]
    with pytest.raises(InputError, match='result 4: ') as e: instance_ap(bad, path/'annotations/instances_val.json')
    assert says in str(e.value)


@pytest.mark.parametrize('text', ['{', '[' * 200000, '{"a": 1}', '[1]', '"x"', 'null'])
def test_no_results_at_all(scenes, tmp_path, text):
    (tmp_path/'r.json').write_text(text)
    truth = read_instances(scenes[0]/'annotations/instances_val.json')
    with pytest.raises(InputError, match='r.json'): read_results(tmp_path/'r.json', truth)
    with pytest.raises(InputError, match='cannot be read'): read_results(Path(tmp_path/'absent.json'), truth)


def test_an_object_without_outline_is_named(tmp_path):
    p = one_image(tmp_path, [(rectangle(0, 0, 10, 10), 0)])
    p.write_text(p.read_text().replace('"segmentation": {', '"other": {'))
    with pytest.raises(InputError, match='annotation 1: has no outline'): instance_ap([], p)


def test_more_objects_than_a_byte_counts(tmp_path):
    "pycocotools cannot measure 256 results at once with NumPy 2."
    size, n = (40, 40), 300
    truth = dict(images=[dict(id=k, file_name=f'{k}.png', width=40, height=40) for k in range(1, 4)], categories=[dict(id=1, name='dot')], annotations=[])
    results = []
    for k in range(n):
        m = np.zeros(size, np.uint8, order='F')
        y, x = divmod(k // 3, 10)
        m[4 * y:4 * y + 2, 4 * x:4 * x + 3] = 1
        code = rle.encode(m)
        truth['annotations'].append(dict(id=k + 1, image_id=k % 3 + 1, category_id=1, area=6, iscrowd=0, bbox=[4 * x, 4 * y, 3, 2], segmentation=dict(size=list(size), counts=code['counts'].decode())))
        results.append(dict(image_id=k % 3 + 1, category_id=1, segmentation=dict(size=list(size), counts=code['counts'].decode()), score=1.))
    (tmp_path/'instances_val.json').write_text(json.dumps(truth))
    assert instance_ap(results, read_instances(tmp_path/'instances_val.json')).values['AP'] == pytest.approx(1)
