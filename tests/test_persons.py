"Rendered persons: the same files from any number of processes, read as DensePose-COCO is read, sides that stay right in a mirror."
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from wsss_nb.data.densepose import MIRRORED, PARTS, densepose, part_points, read_densepose
from wsss_nb.data.items import VOID, InputError, read_mask
from wsss_nb.data.persons import NUMBER, Person, draw_person, person_picture, persons, placed_parts, random_body, render_persons, skeleton, spread_points
from wsss_nb.data.sample import Picture, Scene, stream

SIDED = [n for n in PARTS if n.startswith('left')]


@pytest.fixture(scope='module')
def root(tmp_path_factory): return render_persons(tmp_path_factory.mktemp('coco'), 16, 4, size=96, workers=1)


def digests(folder): return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def truth(persons):
    out = np.zeros(persons[0].parts.shape, np.uint8)
    for p in persons: out[p.parts > 0] = p.parts[p.parts > 0] if p.marked else VOID
    return out


def body(front=True):
    "Somebody whose arms hang down and whose legs do not cross."
    return replace(random_body(stream(0, 'body')), front=front, sits=False, arms=((15, 10), (15, 10)), legs=((10, 8), (10, 8)))


def seen_parts(figure): return np.where(figure.sprite.levels[0][0][..., 3] > .5, figure.parts, 0)


def middle(parts, name): return np.nonzero(parts == NUMBER[name])[1].mean()


def test_two_processes_write_the_same_files(root, tmp_path):
    assert digests(render_persons(tmp_path/'two', 16, 4, size=96, workers=2)) == digests(root)


def test_another_seed_makes_other_pictures(root, tmp_path):
    other = digests(render_persons(tmp_path/'other', 4, 0, size=96, seed=1, workers=1)/'train2014')
    assert len(other) == 4 and not set(other.values()) & set(digests(root/'train2014').values())


def test_the_part_masks_read_back_are_those_drawn(root, tmp_path):
    ds = densepose(root, tmp_path/'labels', background=True, workers=1)
    assert [len(ds.split(s)) for s in ('train', 'minival')] == [16, 4]
    for i in [*ds.split('train'), *ds.split('minival')]:
        _, persons = person_picture(stream(0, i), 96)
        want, points = truth(persons), read_mask(ds[i].points)
        np.testing.assert_array_equal(read_mask(ds[i].mask), want)
        known = (points > 0) & (points < 15)
        assert known.any() and (points[known] == want[known])[want[known] != VOID].all() and (want[points == 0] == 0).all()


def test_pycocotools_reads_the_file(root):
    coco = COCO(root/'annotations/densepose_coco_2014_train.json')
    content = json.loads((root/'annotations/densepose_coco_2014_train.json').read_text())
    assert len(coco.getImgIds()) == 16
    for a in content['annotations']:
        x, y, w, h = map(int, a['bbox'])
        m = coco.annToMask(a)
        assert m.sum() == a['area'] and m[y:y + h, x:x + w].sum() == a['area']
        if 'dp_masks' in a:
            assert len(a['dp_masks']) == 14 and len(a['dp_I']) == len(a['dp_x']) == len(a['dp_y']) and {*a['dp_I']} <= {*range(1, 25)}


def test_some_persons_are_not_marked():
    found = [p for i in range(40) for p in person_picture(stream(0, f'{i}'), 96)[1]]
    assert 1 <= sum(not p.marked for p in found) < len(found) / 2


def test_points_are_spread_over_all_parts_seen(root):
    for image in read_densepose(root/'annotations/densepose_coco_2014_train.json').values():
        parts = part_points(image)
        assert {p.points[:, 2].tolist().count(k) for p in image.poses for k in range(1, 15)} <= {*range(15)}
        assert set(np.unique(parts)) - {254} == {k for p in image.poses for k, m in enumerate(p.masks, 1) if m}
    region = np.zeros((20, 30), bool); region[3:17, 5:25] = True
    p = spread_points(region, 6)
    assert len({*map(tuple, p)}) == 6 and min(np.hypot(*(a - b)) for i, a in enumerate(p) for b in p[:i]) > 4


@pytest.mark.parametrize('front', (True, False))
def test_sides_follow_the_view(front):
    "Who faces you has the left hand at your right; who turns the back, at your left."
    parts = seen_parts(draw_person(body(front), stream(0, 'look')))
    for left in SIDED: assert (middle(parts, left) > middle(parts, left.replace('left', 'right'))) == front, left


def test_a_mirrored_figure_swaps_its_sides():
    "Placed mirrored, a person who faces the viewer still has the left hand at the viewer's right."
    figure = draw_person(body(), stream(0, 'look'))
    for flip in (False, True):
        pic = Picture(Scene(np.full((120, 120, 3), .5, np.float32), .3, 'indoor'), stream(0, 'check'))
        n, parts = pic.put(figure.sprite, 100, 60, 112, flip=flip), placed_parts(pic, figure, 100, 60, 112, flip=flip)
        parts = np.where(pic.label == n, parts, 0)
        for left in SIDED: assert middle(parts, left) > middle(parts, left.replace('left', 'right')), (flip, left)


def test_the_part_map_lies_where_the_sprite_lies():
    "Every part is where its joints are put, in any size."
    b = body()
    figure, joints = draw_person(b, stream(0, 'look')), skeleton(b)
    hand = joints['arm', 1][3] / 100
    x0, y0, x1, y1 = figure.sprite.box
    for size in (150, 90, 40):
        pic = Picture(Scene(np.full((160, 160, 3), .5, np.float32), .3, 'indoor'), stream(0, 'check'))
        pic.put(figure.sprite, size, 80, 155); parts = placed_parts(pic, figure, size, 80, 155)
        k = size / max(x1 - x0, y1 - y0)
        want = 80 + (hand[0] - (x0 + x1) / 2) * k, 155 + (hand[1] - y1) * k
        ys, xs = np.nonzero((parts == NUMBER['left hand']) & (pic.label == 1))
        assert abs(xs.mean() - want[0]) < 2.5 and abs(ys.mean() - want[1]) < 2.5, size


def test_the_table_of_sides_undoes_itself():
    np.testing.assert_array_equal(MIRRORED[MIRRORED], np.arange(256))
    assert all(MIRRORED[NUMBER[n]] == NUMBER[n.replace('left', 'right')] for n in SIDED)


def test_made_once(tmp_path):
    made = persons(tmp_path/'made', 'smoke', workers=1)
    time = (made/'sample.json').stat().st_mtime_ns
    assert persons(tmp_path/'made', 'smoke') == made and (made/'sample.json').stat().st_mtime_ns == time


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path/'mine.txt').write_text('mine')
    with pytest.raises(InputError, match='something other'): persons(tmp_path, 'smoke')
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']
    with pytest.raises(ValueError, match='no profile'): persons(profile='huge')


def test_nobody_hidden_is_a_person():
    "A person of whom almost nothing is seen is not listed; each picture has somebody marked."
    for i in range(10):
        _, found = person_picture(stream(3, f'{i}'), 96)
        assert any(p.marked for p in found) and all(isinstance(p, Person) and (p.parts > 0).mean() > .004 for p in found)
        boxes = [cv2.boundingRect((p.parts > 0).astype(np.uint8)) for p in found]
        assert all(w > 2 and h > 2 for _, _, w, h in boxes)
