"What a report scores, what it refuses, and what it says about the rest."
import numpy as np, pytest, torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex, MulticlassJaccardIndex
from wsss_nb.data.items import Dataset, InputError, Item, write_mask
from wsss_nb.data.store import LabelStore
from wsss_nb.evaluate.metrics import BORDERS, apply_border
from wsss_nb.evaluate.report import evaluate_folders, evaluate_predictions, heat, overlay, overlay_colours, picture_sheet


def made(path, n_classes=1, n=8, without=2, seed=0):
    "A data set of noise with every size different, and predictions half right."
    rng, items, preds = np.random.default_rng(seed), [], {}
    for i in range(n):
        t = rng.integers(0, n_classes + 1, (20 + i, 25), dtype=np.uint8)
        preds[f'im_{i}'] = np.where(rng.random(t.shape) < .6, t, rng.integers(0, n_classes + 1, t.shape)).astype(np.uint8)
        t[rng.random(t.shape) < .1] = 255
        write_mask(path / 'truth' / f'im_{i}.png', t)
        items.append(Item(f'im_{i}', path / f'im_{i}.jpg', (1 + i % 2,), mask=path / 'truth' / f'im_{i}.png' if i < n - without else None))
    names = ('pet',) if n_classes == 1 else tuple(f'class{k}' for k in range(1, n_classes + 1))
    tags = ('beagle', 'pug') if n_classes == 1 else names
    return Dataset('made', tags, items, {'test': [o.id for o in items]}, names, (0, 1, 1) if n_classes == 1 else None), preds


@pytest.mark.parametrize('policy', BORDERS)
def test_scores_are_those_of_torchmetrics(tmp_path, policy):
    data, preds = made(tmp_path)
    r = evaluate_predictions(preds, data, 'test')
    t = [torch.from_numpy(apply_border(data.read_truth(data[i]), policy).astype(int)) for i in r.ids]
    p = [torch.from_numpy(preds[i].astype(int)) for i in r.ids]
    for metric, mean, pooled in ((BinaryJaccardIndex(ignore_index=255), 'iou', 'dataset_iou'), (BinaryF1Score(ignore_index=255), 'dice', 'dataset_dice')):
        s = r.scores[policy]
        assert s[mean].value == pytest.approx(np.mean([metric(a, b).item() for a, b in zip(p, t)]), abs=1e-6)
        assert s[pooled].value == pytest.approx(metric(torch.cat([x.ravel() for x in p]), torch.cat([x.ravel() for x in t])).item(), abs=1e-6)
        assert s[mean].low <= s[mean].value <= s[mean].high

def test_several_classes(tmp_path):
    data, preds = made(tmp_path, n_classes=4)
    r = evaluate_predictions(preds, data, 'test')
    t = torch.cat([torch.from_numpy(data.read_truth(data[i]).astype(int)).ravel() for i in r.ids])
    p = torch.cat([torch.from_numpy(preds[i].astype(int)).ravel() for i in r.ids])
    assert r.borders == ('ignored', 'background')                        # whose border would 'foreground' be?
    assert r.row()['mIoU'].value == pytest.approx(MulticlassJaccardIndex(5, ignore_index=255)(p, t).item(), abs=1e-6)
    assert list(r.class_iou().index) == ['background', 'class1', 'class2', 'class3', 'class4'] and 'miou' in r.frame
    with pytest.raises(ValueError, match='single class'): evaluate_predictions(preds, data, 'test', borders=('foreground',))

def test_unscored_images_are_reported_and_order_does_not_matter(tmp_path):
    data, preds = made(tmp_path)
    r = evaluate_predictions(preds, data, 'test')
    assert r.unscored == ['im_6', 'im_7'] and len(r) == 6
    assert '6 of 8 images scored' in str(r) and '2 without a truth mask' in str(r)
    again = evaluate_predictions(dict(reversed(preds.items())), data, 'test')
    assert again.table().equals(r.table()) and again.frame.equals(r.frame)
    assert r.by_tag().images.to_dict() == {'beagle': 3, 'pug': 3}

def test_a_prediction_is_not_needed_where_there_is_no_truth(tmp_path):
    data, preds = made(tmp_path)
    assert len(evaluate_predictions({k: preds[k] for k in list(preds)[:6]}, data, 'test')) == 6
    with pytest.raises(InputError, match='no prediction for 1 of 6.*im_4'): evaluate_predictions({k: m for k, m in preds.items() if k != 'im_4'}, data, 'test')

def test_store_and_mapping_agree(tmp_path):
    data, preds = made(tmp_path)
    store = LabelStore(tmp_path / 'store')
    for k, m in preds.items(): store.save(k, m)
    assert evaluate_predictions(store, data, 'test').table().equals(evaluate_predictions(preds, data, 'test').table())
    store.path('im_2').unlink()
    with pytest.raises(InputError, match='im_2'): evaluate_predictions(store, data, 'test')

def test_bad_predictions_name_the_image(tmp_path):
    data, preds = made(tmp_path)
    for bad in (preds['im_3'][:-1], preds['im_3'] * 9, preds['im_3'].astype(float)):
        with pytest.raises(InputError, match='im_3'): evaluate_predictions(preds | {'im_3': bad}, data, 'test')
    with pytest.raises(ValueError, match="no split 'val'"): evaluate_predictions(preds, data, 'val')

def test_void_in_predictions_is_counted_and_said(tmp_path):
    data, preds = made(tmp_path)
    m = preds['im_0'].copy(); m[:2] = 255
    r = evaluate_predictions(preds | {'im_0': m}, data, 'test')
    assert r.void_pixels == 50 and '50 predicted void pixels' in str(r)
    assert r.table().equals(evaluate_predictions(preds | {'im_0': np.where(m == 255, 0, m)}, data, 'test').table())
    with pytest.raises(InputError, match='im_0'): evaluate_predictions(preds | {'im_0': m}, data, 'test', void_as=None)

def test_nothing_to_score(tmp_path):
    data, preds = made(tmp_path, without=8)
    with pytest.raises(InputError, match='no image'): evaluate_predictions(preds, data, 'test')


# ---- folders ------------------------------------------------------------------------------------------------------------

def folders(path, n_classes=1):
    data, preds = made(path, n_classes, without=0)
    for k, m in preds.items(): write_mask(path / 'masks' / f'{k}.png', m)
    return data, preds, path / 'masks', path / 'truth'

@pytest.mark.parametrize('n', [1, 4])
def test_folders_are_scored_like_predictions(tmp_path, n):
    data, preds, masks, truth = folders(tmp_path, n)
    assert evaluate_folders(masks, truth).table().equals(evaluate_predictions(preds, data, 'test').table())
    assert np.isnan(evaluate_folders(masks, truth, n_classes=n + 3).class_iou().iloc[-1])

def test_unpaired_files_are_named(tmp_path):
    *_, masks, truth = folders(tmp_path)
    (truth / 'im_5.png').unlink(); (masks / 'im_2.png').unlink()
    r = evaluate_folders(masks, truth)
    assert sorted(p.name for p in r.unpaired) == ['im_2.png', 'im_5.png'] and len(r) == 6
    assert 'im_2.png' in str(r) and 'im_5.png' in str(r)

def test_folder_faults_name_both_files(tmp_path):
    *_, masks, truth = folders(tmp_path)
    write_mask(masks / 'im_1.png', np.zeros((9, 9), np.uint8))
    with pytest.raises(InputError) as e: evaluate_folders(masks, truth)
    assert str(masks / 'im_1.png') in str(e.value) and str(truth / 'im_1.png') in str(e.value) and '9×9' in str(e.value)
    write_mask(masks / 'im_1.png', np.full((21, 25), 7, np.uint8))
    with pytest.raises(InputError, match=r'im_1\.png.*\[7\]'): evaluate_folders(masks, truth, n_classes=2)
    (masks / 'im_1.png').write_bytes(b'not a picture')
    with pytest.raises(InputError, match='im_1.png'): evaluate_folders(masks, truth)
    Image.fromarray(np.zeros((21, 25, 3), np.uint8)).save(masks / 'im_1.png')
    with pytest.raises(InputError, match='im_1.png'): evaluate_folders(masks, truth)

def test_white_masks_are_recognised(tmp_path):
    *_, masks, _ = folders(tmp_path)
    write_mask(tmp_path / 'white' / 'im_0.png', np.repeat(np.uint8([[0], [255]]), [10, 10], 0).repeat(25, 1))
    with pytest.raises(InputError, match='255 means void'): evaluate_folders(masks, tmp_path / 'white')


# ---- pictures -----------------------------------------------------------------------------------------------------------

def test_overlay_keeps_the_background_and_tells_classes_apart():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8), np.zeros((30, 40), np.uint8)
    mask[5:15, 5:15], mask[5:15, 20:30], mask[20:25] = 1, 2, 255
    out = overlay(image, mask)
    np.testing.assert_array_equal(out[mask == 0], image[mask == 0])
    np.testing.assert_array_equal(out[5, 5:15], np.broadcast_to(overlay_colours()[1], (10, 3)))    # the contour
    c = overlay_colours()[:22].astype(int)
    assert min(np.abs(a - b).sum() for i, a in enumerate(c) for b in c[:i]) > 40

def test_heat_takes_any_size_and_range():
    image = np.full((30, 40, 3), 128, np.uint8)
    assert heat(image, np.ones((3, 4), np.float32)).shape == image.shape
    np.testing.assert_array_equal(heat(image, np.full((30, 40), 7.)), heat(image, np.ones((30, 40))))
    assert heat(image, np.ones((3, 4))).mean() > heat(image, np.zeros((3, 4))).mean()

def test_sheet_has_the_size_of_its_tiles(tmp_path):
    rng = np.random.default_rng(0)
    def row(h, w): return {'image': rng.integers(0, 256, (h, w, 3), dtype=np.uint8), 'activation map': rng.random((7, 9), np.float32),
                           'pseudo mask': None, 'truth': rng.integers(0, 3, (h, w), dtype=np.uint8), 'label': 'one', 'notes': {'truth': 'IoU 1'}}
    path = tmp_path / 'new' / 'sheet.png'
    picture_sheet([row(60, 80), row(90, 60)], path, width=100, classes=('background', 'cat', 'dog'))
    with Image.open(path) as im: assert im.size[0] == 22 + 5 * 105 and abs(im.size[1] - (24 + 75 + 150 + 10 + 20)) <= 1
    first = path.read_bytes()
    rng = np.random.default_rng(0)
    picture_sheet([row(60, 80), row(90, 60)], path, width=100, classes=('background', 'cat', 'dog'))
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == ['sheet.png']

def test_long_headings_are_broken_and_stay_over_their_tiles():
    "Each heading is no wider than its column, by matplotlib's own measure."
    image, names = np.zeros((40, 40, 3), np.uint8), ('SILOP, through the labels', 'network on round 3: 4 scales, dense CRF', 'truth')
    fig = picture_sheet([{'image': image, **dict.fromkeys(names, np.ones((40, 40), np.uint8))}], None, names, 104)
    titles = [ax.title for ax in fig.axes]
    boxes = [t.get_window_extent(FigureCanvasAgg(fig).get_renderer()) for t in titles]
    assert max(b.width for b in boxes) < 104 + 5 and max(b.y1 for b in boxes) <= fig.get_size_inches()[1] * fig.dpi
    assert titles[0].get_text().count('\n') == 1 and titles[2].get_text() == 'truth'

@pytest.mark.parametrize('n', (2, 30))
def test_a_legend_of_many_classes_stays_inside_its_sheet(n):
    names = ['background', *(f'a rather long name {k}' for k in range(1, n + 1))]
    mask = np.arange(40 * 40, dtype=np.uint8).reshape(40, 40) % (n + 1)
    fig = picture_sheet([{'image': np.zeros((40, 40, 3), np.uint8), 'mask': mask}], None, ('image', 'mask'), 150, classes=names)
    draw = FigureCanvasAgg(fig).get_renderer()
    W, H = fig.get_size_inches() * fig.dpi
    boxes = [t.get_window_extent(draw) for t in fig.texts]
    assert {t.get_text() for t in fig.texts} == {'■', *names[1:]} and all(b.x0 >= 0 and b.x1 <= W + 1 and b.y0 >= -1 for b in boxes)
    assert max(b.y1 for b in boxes) < min(ax.get_position().y0 for ax in fig.axes) * H + 2 and (len({round(b.y0) for b, t in zip(boxes, fig.texts) if t.get_text() == '■'}) > 1) == (n > 2)


def test_spread_runs_from_worst_to_best(tmp_path):
    data, preds = made(tmp_path)
    r = evaluate_predictions(preds, data, 'test')
    ids = r.spread(3)
    assert ids[0] == r.frame.iou.idxmin() and ids[-1] == r.frame.iou.idxmax() and r.frame.iou[ids].is_monotonic_increasing
