"The study of scenes: whole commands, no leak, the two ways of SILOP, and the scores against outside references."
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from wsss_nb.data.items import InputError
from wsss_nb.data.store import LabelStore, MapStore, Maps
from wsss_nb.evaluate.metrics import scores
from wsss_nb.refine.crf import agreement_labels
from wsss_nb.study import scenes
from wsss_nb.study.cli import main
from wsss_nb.study.runs import Run
from wsss_nb.study.tables import Table


def quiet(text): pass


@pytest.fixture(scope='module')
def first(photos, tmp_path_factory):
    "The table of SILOP on the smallest sample, by the command line."
    runs = tmp_path_factory.mktemp('runs')
    assert main(['table', 'silop', '--profile', 'smoke', '--seeds', '0', '--workers', '1', '--data', f'voc={photos}', '-o', str(runs)]) == 0
    return runs


def study_of(photos, runs, say=quiet, seeds=(0,)):
    return scenes.ScenesStudy(scenes.scenes_data(photos), runs, scenes.scenes_settings('smoke', seeds=seeds), say, 1)


# Commands

def test_table_silop(first):
    t = Table.load(first/'silop-smoke.json')
    rows = t.rows.set_index('step')
    assert list(rows.photos.str.split(',').str[0].drop_duplicates()) == ['train', 'val']
    assert rows.loc['Puzzle-CAM', 'published'].value == pytest.approx(.5153) and 'issues 4 and 12' in rows.loc['Puzzle-CAM', 'published'].source
    assert rows.loc['Puzzle-CAM + PerimeterFit', 'oracle'] >= 0
    assert (first/'silop-smoke.jpg').stat().st_size > 1000


def test_a_finished_table_is_read_from_its_runs(first, photos, capsys):
    before = (first/'silop-smoke.json').read_text()
    assert main(['table', 'silop', '--profile', 'smoke', '--seeds', '0', '--workers', '1', '--data', f'voc={photos}', '-o', str(first)]) == 0
    assert 'running' not in capsys.readouterr().out and (first/'silop-smoke.json').read_text() == before


def test_sccam_and_methods_share_the_runs(first, photos, capsys):
    options = ['--profile', 'smoke', '--workers', '1', '-o', str(first)]
    assert main(['table', 'sccam', '--seed', '0', '--data', f'voc={photos}', *options]) == 0
    said = capsys.readouterr().out
    assert 'classifier: reused' in said and 'round 1: sub-categories joined' in said
    assert main(['study', '--methods', 'puzzle,sccam,silop', '--voc', str(photos), *options]) == 0
    said = capsys.readouterr().out
    assert 'running' not in said and 'network on SC-CAM' in said
    rows = [Table.load(first/f'{n}-smoke.json').rows.set_index('step')['mIoU'] for n in ('sccam', 'puzzle-sccam-silop')]
    assert rows[0]['network on round 1'] == rows[1]['network on SC-CAM']


@pytest.mark.parametrize('arguments, says', [
    (['study', '--methods', 'gold'], 'Choose among cam, puzzle, sccam, silop'),
    (['study', '--methods', ','], 'is no method'),
    (['study', '--methods', 'silop', '--pets', 'x'], '--voc PATH'),
    (['study', '--methods', 'silop', '--voc', '/nowhere'], 'no such folder'),
    (['table', 'silop', '--data', 'pets=x'], 'NAME is one of voc'),
    (['table', 'sccam', '--data', 'voc=/nowhere'], 'no such folder'),
    (['table', 'sccam', '--profile', 'paper'], '--data voc=FOLDER'),
    (['table', 'pets-1', '--profile', 'paper'], 'smoke, sample or full'),
])
def test_bad_arguments(arguments, says, capsys, tmp_path):
    assert main([*arguments, '-o', str(tmp_path)]) == 1
    assert says in capsys.readouterr().err


def test_masks_of_val_are_needed(photos, tmp_path):
    shutil.copytree(photos, tmp_path/'VOC2012')
    for i in (photos/'ImageSets/Segmentation/val.txt').read_text().split(): (tmp_path/'VOC2012/SegmentationClass'/f'{i}.png').unlink()
    with pytest.raises(InputError, match='no photo of val has a mask'): study_of(tmp_path/'VOC2012', tmp_path/'runs')


# No leak, and the same result every time

def test_no_mask_is_needed_and_nothing_is_random(first, photos, tmp_path):
    "Without any mask on the disk, and in another folder of runs: the same pseudo masks, bit for bit."
    shutil.copytree(photos, tmp_path/'VOC2012')
    shutil.rmtree(tmp_path/'VOC2012/SegmentationClass')
    s = scenes.scenes_settings('smoke')
    views = [scenes.tagged(scenes.scenes_data(p).view('tags', 'train')) for p in (photos, tmp_path/'VOC2012')]
    for job, options in ((scenes.silop_masks, dict(through='walk')), (scenes.sccam_masks, {})):
        here, there = (LabelStore(job(root, v, s, quiet, 1, **options)['pseudo']/'masks') for root, v in zip((first, tmp_path/'runs'), views))
        for i in views[0].ids: assert (here.load(i) == there.load(i)).all()


# SILOP

def test_the_two_ways(first, photos):
    "Edges and their labels are shared; the walk starts from the old maps, or from the combined ones."
    study = study_of(photos, first)
    by = {t: scenes.silop_masks(first, study.train, study.s, quiet, 1, t) for t in ('labels', 'walk')}
    for k in ('maps', 'fit', 'confident', 'edges'): assert by['labels'][k].hash == by['walk'][k].hash
    assert by['labels']['walk'].config['maps'] == by['labels']['maps'].hash
    assert by['walk']['walk'].config['maps'] == by['walk']['fit'].hash
    puzzle = scenes.puzzle_masks(first, study.train, study.s, quiet, 1)
    assert puzzle['maps'].hash == by['labels']['maps'].hash and puzzle['edges'].hash != by['labels']['edges'].hash


def test_half_the_maps_at_half_the_thresholds():
    "SILOP's maps reach 2; ours are half of them, and so are the thresholds."
    rng = np.random.default_rng(0)
    image, values = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8), rng.random((2, 24, 32)).astype(np.float32) * 2
    f, b = scenes.halved((.6, .4))
    assert (agreement_labels(image, values, .6, .4) == agreement_labels(image, values / 2, f, b)).all()


def test_sure_labels_by_area(photos, tmp_path):
    "The strongest half of the object's share is surely object, all but one and a half of it surely background; published thresholds are taken as they are."
    view, rng = scenes.tagged(scenes.scenes_data(photos).view('tags', 'train')), np.random.default_rng(2)
    store, s = MapStore(tmp_path/'maps'), scenes.scenes_settings('smoke')
    for i in view.ids: store.save(i, Maps((1, 2), rng.random((2, 40, 50)) ** 2))
    high, low = scenes.sure_thresholds(tmp_path, view, s)
    v = np.stack([store.load(i).values.max(0) for i in view.ids])
    assert (v > high).mean() == pytest.approx(s.area / 2, abs=.005) and (v > low).mean() == pytest.approx(1.5 * s.area, abs=.005)
    assert scenes.sure_thresholds(tmp_path, view, s, (.4, .1)) == (.4, .1)
    assert scenes.halved(None) is None and scenes.paper_settings('silop').confident_fit == (.6, .4)


# Scores

def test_sweep_is_scikit_learns(photos, tmp_path):
    "mIoU of the strongest class at thresholds, of maps at the size of the photos."
    ds = scenes.scenes_data(photos)
    rng, store = np.random.default_rng(1), MapStore(tmp_path/'maps')
    ids = scenes.tagged(ds.view('tags', 'train')).ids
    for i in ids: store.save(i, Maps(ds[i].tags, rng.random((len(ds[i].tags), *ds.read_truth(ds[i]).shape))))
    swept = scenes.class_sweep(store, ds, ids)
    for k in (0, 30, 70, 100):
        truth, said = [], []
        for i in ids:
            m, t = store.load(i), ds.read_truth(ds[i])
            mask = np.where(m.values.max(0) > np.float32(scenes.SWEEP[k]), m.keys[m.values.argmax(0)], 0)
            truth.append(t[t < 255]); said.append(mask[t < 255])
        truth, said = np.concatenate(truth), np.concatenate(said)
        present = np.union1d(truth, said)
        assert swept[k] == pytest.approx(jaccard_score(truth, said, labels=present, average='macro', zero_division=0), abs=1e-9)


def test_images_without_maps_are_background(photos, tmp_path):
    ds = scenes.scenes_data(photos)
    i, store = ds.view('masks', 'train').with_masks().ids[0], MapStore(tmp_path/'maps')
    store.save(i, Maps([], np.zeros((0, 4, 4))))
    t = ds.read_truth(ds[i])
    c = confusion_matrix(t[t < 255], np.zeros((t < 255).sum(), int), labels=range(21))
    assert scenes.class_sweep(store, ds, [i]) == pytest.approx(float(scores(c)['miou']))


class Counted:
    def __init__(self, counts): self.counts = counts
    def matrix(self): return self.counts


def test_over_seeds():
    "The mean over seeds, its spread, and an interval that a wider set of photos makes narrower."
    rng = np.random.default_rng(2)
    def result(n): return Counted(np.stack([confusion_matrix(rng.integers(0, 3, 50), rng.integers(0, 3, 50), labels=range(3)) for _ in range(n)]))
    few = [result(8) for _ in range(3)]
    each = [float(scores(r.counts.sum(0))['miou']) for r in few]
    out = scenes.over_seeds(few)
    assert out['mIoU'].value == pytest.approx(np.mean(each)) and out['spread'] == pytest.approx(max(each) - min(each))
    assert out['mIoU'].low < out['mIoU'].value < out['mIoU'].high
    many = scenes.over_seeds([result(200)])
    assert many['spread'] is None and many['mIoU'].high - many['mIoU'].low < out['mIoU'].high - out['mIoU'].low


def test_rows_score_what_they_name(first, photos):
    "The row of pseudo masks against scikit-learn over all pixels."
    study = study_of(photos, first)
    runs = scenes.silop_masks(first, study.train, study.s, quiet, 1)
    step = scenes.score_pseudo(study, 'x', [runs['pseudo']])
    pairs = [(study.dataset.read_truth(study.dataset[i]), LabelStore(runs['pseudo']/'masks').load(i)) for i in study.train.ids]
    truth, said = (np.concatenate(v) for v in zip(*((t[t < 255], m[t < 255]) for t, m in pairs)))
    want = jaccard_score(truth, said, labels=np.union1d(truth, said), average='macro', zero_division=0)
    assert scenes.over_seeds(step.results)['mIoU'].value == pytest.approx(want, abs=1e-9)
    told = Table.load(first/'silop-smoke.json').rows.set_index('step')
    assert told.loc['SILOP, through the labels: walk, dense CRF', 'mIoU'].value == pytest.approx(want, abs=1e-9)


def test_edges_stand_on_the_classifier(first, photos):
    "The edge network keeps the backbone that the classifier was trained with."
    study = study_of(photos, first)
    runs = scenes.puzzle_masks(first, study.train, study.s, quiet, 1)
    net, edges = scenes.load_classifier(runs['classifier'].folder), scenes.load_edges(runs['edges'].folder)
    for (k, a), b in zip(net.backbone.state_dict().items(), edges.backbone.state_dict().values()): assert torch.equal(a, b), k
    assert isinstance(runs['edges'], Run) and len(MapStore(runs['edges']/'edges')) == len(study.train)
